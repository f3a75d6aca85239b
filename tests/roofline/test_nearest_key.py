"""The bytes of `cases.nearest_key` are those that the kernels move, tensor by tensor."""

import torch
from cases.nearest_key import Search, nearest_key_passes
from kernel_traffic import check, tiles

from sapt_fast.triton_kernels.nearest_key import nearest_key_fwd


def test_nearest_key():
    m, n, d = 8, 50, 37
    query, keys, radius = torch.randn(m, d).half(), torch.randn(n, d).half(), torch.rand(n)
    found = nearest_key_fwd(query, keys, radius)[2].unique().numel()
    check(
        lambda: dict(
            zip(("distance", "index", "nearest"), nearest_key_fwd(query, keys, radius), strict=True)
        ),
        {"query": query, "keys": keys, "radius": radius},
        nearest_key_passes(Search(m, n, d, tile_m=2, tile_n=8, found=found)),
        {"keys": tiles(m, 2) * tiles(n, 8) * 8 / n, "query": tiles(n, 8)},
    )


def test_nearest_key_in_splits(four_multiprocessors):
    """Keys are read once all the same; what the shares keep goes through memory."""
    m, n, d = 3, 300, 17
    query, keys, radius = torch.randn(m, d).half(), torch.randn(n, d).half(), torch.rand(n)
    inputs = {"query": query, "keys": keys, "radius": radius}
    found = nearest_key_fwd(query, keys, radius)[2].unique().numel()
    check(
        lambda: dict(
            zip(("distance", "index", "nearest"), nearest_key_fwd(query, keys, radius), strict=True)
        ),
        inputs,
        nearest_key_passes(Search(m, n, d, tile_m=2, tile_n=8, splits=8, found=found)),
        {},
    )
