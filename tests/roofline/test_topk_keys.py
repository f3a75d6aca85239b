"""The bytes of `cases.topk_keys` are those that the kernels move, tensor by tensor."""

import importlib

import pytest
import torch
from cases.topk_keys import Search, topk_keys_passes
from kernel_traffic import check
from passes import l2_bytes

from sapt_fast.triton_kernels.blocks import common, key_tiles

topk = importlib.import_module("sapt_fast.triton_kernels.topk_keys")


@pytest.mark.parametrize(
    ("m", "k", "metric", "group"),
    [(3, 3, "l2", 8), (2, 2, "cosine", 8), (3, 5, "l2", 1), (2, 5, "dot", 1)],
)
def test_topk_keys(m, k, metric, group, monkeypatch):
    n, d = 61, 17
    query, keys = torch.randn(m, d).half(), torch.randn(n, d).half()
    monkeypatch.setattr(topk, "_GROUPS_PER_CHOSEN", 1 if group > 1 else n)
    chosen, select = [], topk._select
    monkeypatch.setattr(topk, "_select", lambda *a: select(*a) or chosen.append(a[2].clone()))

    def search():
        found = topk.topk_keys_fwd(query, keys, k, metric)
        return dict(zip(("scores", "index"), found, strict=True))

    search()
    # Keys that are scored again; past the end the first key is read.
    again = chosen[0].unsqueeze(-1) * group + torch.arange(group)
    found = torch.where(again < n, again, 0).unique().numel()
    c = Search(m, n, d, k, metric, tile_m=2, tile_n=8, group=group, found=found)
    passes = topk_keys_passes(c)
    traffic = check(search, {"query": query, "keys": keys}, passes, {})
    for name in ("query", "keys"):
        read = sum(p.reads.get(name, 0) + p.rereads.get(name, 0) for p in passes)
        assert traffic.reads[name].total == read, name


def test_bytes_from_the_l2_cache(monkeypatch):
    """Of 64 queries on an H200, over those of queries and keys alone."""
    traits = common.DeviceTraits(capability=90, num_sms=132)
    monkeypatch.setattr(common, "device_traits", lambda device: traits)
    query, keys = (torch.empty(rows, 512, device="meta").half() for rows in (64, 1_000_000))
    tile, c = key_tiles.search_tile(query, keys), Search(64, 1_000_000, 512, 32)
    assert (tile.m, tile.n) == (c.tile_m, c.tile_n)
    assert l2_bytes(topk_keys_passes(c)) / (c.query + c.keys) < 1.3
