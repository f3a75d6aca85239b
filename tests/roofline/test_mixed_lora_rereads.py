"""What tiles of `mixed_lora` read again is what the kernels load, tensor by tensor.

Ranks fill whole tiles: what a tile loads past its end is no matter of the formula.
"""

import pytest
import torch
from cases.mixed_lora import (
    Member,
    MixedLora,
    Tiles,
    mixed_lora_backward,
    mixed_lora_forward,
    on_h200,
    padded,
    with_rereads,
)
from kernel_traffic import check, check_rereads

from sapt_fast.ops.projection import Projection
from sapt_fast.triton_kernels.blocks import gemm_variants, shrink_tiles
from sapt_fast.triton_kernels.blocks.common import DeviceTraits
from sapt_fast.triton_kernels.mixed_lora import mixed_lora_bwd, mixed_lora_fwd

TILES = Tiles((16, 32), (16, 32), (16, 32), factors=(32, 16))  # the interpreter's
MEMBERS = Member(96, 32, (0, 32)), Member(64, 64, (32, 64))
CASES = {
    "descriptors": MixedLora(80, 64, 1, 4, MEMBERS, tile_rows=16),
    "pointers": MixedLora(32, 64, 2, 4, MEMBERS, tile_rows=16),
}


def _inputs(c: MixedLora):
    projections, named = [], {}
    for j, m in enumerate(c.members):
        adapter = torch.arange(m.r, dtype=torch.int32) * c.adapters // m.r
        weight, a, b = (torch.randn(s).half() for s in ((m.o, c.i), (m.r, c.i), (m.r, m.o)))
        projections.append(Projection(weight, None, a, b, adapter, torch.rand(m.r)))
        named |= {f"weight{j}": weight, f"a{j}": a, f"b{j}": b}
    x = torch.randn(c.m, c.i).half()
    mixture = torch.softmax(torch.randn(c.samples, c.adapters), -1)
    return x, mixture, projections, {"x": x, **named}


@pytest.mark.parametrize("route", ["fused", "expand_first"])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name, route):
    c = CASES[name]
    x, mixture, projections, named = _inputs(c)
    small = {"mixture": mixture}
    for j, p in enumerate(projections):
        small |= {f"row_adapter{j}": p.row_adapter, f"row_scale{j}": p.row_scale}
    dys = [torch.randn(c.m, m.o).half() for m in c.members]
    hs = [h for _, h in mixed_lora_fwd(x, mixture, projections)]

    def forward():
        with gemm_variants.forced(route):
            outputs = mixed_lora_fwd(x, mixture, projections)
        return {f"{n}{j}": t for j, o in enumerate(outputs) for n, t in zip("yh", o, strict=True)}

    def backward():
        train = [list(m.train) for m in c.members]
        with gemm_variants.forced(route):
            dx, d_mixture, factors = mixed_lora_bwd(
                dys, x, mixture, projections, hs, train, True, True, True
            )
        grads = {"dx": dx, "d_mixture": d_mixture}
        for j, (d_a, d_b) in enumerate(factors):
            grads |= {f"d_a{j}": d_a, f"d_b{j}": d_b}
        return grads

    words = route.replace("_", " ")
    passes = with_rereads(c, mixed_lora_forward(c, words), TILES)
    looked_at = check_rereads(check(forward, named | small, passes, {}), passes)
    assert looked_at == {n for n in named if route == "fused" or not n.startswith("weight")}
    named |= {f"dy{j}": dy for j, dy in enumerate(dys)} | {f"h{j}": h for j, h in enumerate(hs)}
    passes = with_rereads(c, mixed_lora_backward(c, words), TILES)
    check_rereads(check(backward, named | small, passes, {}), passes)


def test_a_library_names_no_rereads():
    c = CASES["pointers"]
    passes = with_rereads(c, mixed_lora_forward(c, "expand first"))
    assert [bool(p.rereads) for p in passes] == [not p.library for p in passes]
    assert not all(p.rereads for p in passes)


@pytest.mark.parametrize("ranks", [60, 240, 1024])
@pytest.mark.parametrize("members", [1, 2])
def test_the_tiles_of_an_h200_are_those_that_are_launched(ranks, members):
    h200, l40s = DeviceTraits(90, 132), DeviceTraits(89, 142, shared=101376)

    def sides(backward, rows=8192, segments=1, traits=h200):
        given = (2, 2), rows, [padded(ranks)] * members, segments, backward
        return shrink_tiles._shrink_config(traits, *given)[:2]

    tiles = on_h200(ranks, members)
    assert (sides(False), sides(True)) == (tiles.shrink, tiles.shrink_backward)
    # dy is read once for each 256 ranks where there are rows enough, of one sample each tile.
    assert sides(True, 32768) == (128, 64 if ranks == 60 else 256)
    assert sides(True, 32768, segments=2) == (128, 64)
    assert sides(True, 32768, traits=l40s)[1] <= 128
