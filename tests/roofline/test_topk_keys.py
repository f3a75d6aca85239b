"""The bytes of `cases.topk_keys` are those that the kernels move, tensor by tensor."""

import pytest
import torch
from cases.topk_keys import Search, topk_keys_passes
from kernel_traffic import check, tiles

from sapt_fast.triton_kernels.topk_keys import topk_keys_fwd


@pytest.mark.parametrize(("k", "metric"), [(5, "cosine"), (30, "l2"), (70, "dot")])
def test_topk_keys(k, metric):
    kept = next((size for size in (8, 32, 64) if size >= k), 64)
    m, n, d = (8, 90, 37) if k <= kept else (2, 90, 17)
    query, keys = torch.randn(m, d).half(), torch.randn(n, d).half()
    c = Search(m, n, d, k, metric, kept)
    block = max(16, kept)
    check(
        lambda: dict(zip(("scores", "index"), topk_keys_fwd(query, keys, k, metric), strict=True)),
        {"query": query, "keys": keys},
        topk_keys_passes(c),
        {"keys": tiles(m, 2) * tiles(n, block) * block / n, "query": tiles(n, block)},
    )


def test_topk_keys_in_splits(four_multiprocessors):
    """Keys are read once all the same; what the shares keep goes through memory."""
    m, n, d = 3, 300, 17
    query, keys = torch.randn(m, d).half(), torch.randn(n, d).half()
    c = Search(m, n, d, 3, kept=8, splits=3)
    check(
        lambda: dict(zip(("scores", "index"), topk_keys_fwd(query, keys, 3, "dot"), strict=True)),
        {"query": query, "keys": keys},
        topk_keys_passes(c),
        {},
    )
