"""The bytes of `cases.mixed_lora` are those that the kernels move, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from cases.mixed_lora import (
    Member,
    MixedLora,
    base_linear,
    mixed_lora_backward,
    mixed_lora_forward,
    padded,
)
from kernel_traffic import check, tiles
from passes import Pass, total_bytes, total_flops
from torch import Tensor

from sapt_fast.ops._dropout import Dropout, drop_count
from sapt_fast.ops.projection import Projection
from sapt_fast.triton_kernels.blocks import gemm_variants as routes
from sapt_fast.triton_kernels.mixed_lora import mixed_lora_bwd, mixed_lora_fwd

MIXED = {
    # 16-bit and more than 64 rows: tensor descriptors; else pointers.
    "one, descriptors": MixedLora(96, 40, 2, 5, (Member(48, 20, (16, 20)),), tile_rows=16),
    "two, descriptors": MixedLora(
        80, 40, 1, 5, (Member(48, 20, (16, 20)), Member(24, 35, (21, 35))), tile_rows=16
    ),
    "two alike, pointers": MixedLora(32, 40, 2, 5, (Member(48, 20, (16, 20)),) * 2, tile_rows=16),
    "two alike, descriptors": MixedLora(
        80, 40, 1, 5, (Member(48, 20, (16, 20)),) * 2, tile_rows=16
    ),
    "two, pointers": MixedLora(
        32, 33, 2, 3, (Member(41, 6, (4, 6), bias=True), Member(17, 18, (0, 18))), tile_rows=16
    ),
    "float32": MixedLora(32, 33, 2, 3, (Member(41, 6, (4, 6)),), 4, 4, tile_rows=16),
    "float32 factors": MixedLora(32, 40, 2, 3, (Member(48, 6, (0, 6)),), 2, 4, tile_rows=16),
    "two alike, dropout": MixedLora(
        32, 40, 2, 5, (Member(48, 20, (16, 20)),) * 2, tile_rows=16, drops=True
    ),
}
ROUTES = {"fused": routes.FUSED, "expand first": routes.EXPAND_FIRST}
_DTYPE = {2: torch.float16, 4: torch.float32}


def _projections(c: MixedLora) -> tuple[list[Projection], dict[str, Tensor]]:
    dtype, factor_dtype = _DTYPE[c.itemsize], _DTYPE[c.factor_itemsize]
    projections, named = [], {}
    for j, m in enumerate(c.members):
        adapter = torch.arange(m.r, dtype=torch.int32) * c.adapters // m.r
        p = Projection(
            torch.randn(m.o, c.i).to(dtype),
            torch.randn(m.o).to(dtype) if m.bias else None,
            torch.randn(m.r, c.i).to(factor_dtype),
            torch.randn(m.r, m.o).to(factor_dtype),
            adapter,
            torch.rand(m.r),
        )
        projections.append(p)
        names = ("weight", "bias", "a", "b", "row_adapter", "row_scale")
        named |= {f"{name}{j}": t for name, t in zip(names, p, strict=True)}
    return projections, named


def _mixed_inputs(c: MixedLora):
    projections, named = _projections(c)
    x = torch.randn(c.m, c.i).to(_DTYPE[c.itemsize])
    mixture = torch.softmax(torch.randn(c.samples, c.adapters), -1)
    return x, mixture, projections, {"x": x, "mixture": mixture, **named}


def _dropout(c: MixedLora, inputs: dict[str, Tensor]) -> Dropout | None:
    """With its seeds among the inputs."""
    if not c.drops:
        return None
    seeds = [torch.tensor([j]) for j in range(len(c.members))]
    inputs |= {f"seed{j}": seed for j, seed in enumerate(seeds)}
    return Dropout(drop_count(0.25), seeds)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", MIXED)
def test_mixed_lora_forward(name, route):
    c = MIXED[name]
    x, mixture, projections, inputs = _mixed_inputs(c)
    dropout = _dropout(c, inputs)

    def call():
        with routes.forced(ROUTES[route]):
            outputs = mixed_lora_fwd(x, mixture, projections, dropout=dropout)
        return {
            f"{n}{j}": t for j, pair in enumerate(outputs) for n, t in zip("yh", pair, strict=True)
        }

    # Tiles of 16 x 32: a row tile of x meets every tile of rank columns, and of columns of y.
    widths = [padded(m.r) for m in c.members]
    block = 16 if max(widths) <= 16 else 32
    meets = sum(tiles(w, block) for w in widths)
    own = 1
    if route == "fused":
        meets += sum(tiles(m.o, 32) for m in c.members)
        own += len({(m.o, m.r, m.bias) for m in c.members})
    tiles_m = tiles(c.m, 16)
    rereads = {"x": meets / own}
    for j in range(len(c.members)):
        rereads[f"a{j}"] = rereads[f"b{j}"] = tiles_m
        if route == "fused":
            rereads[f"weight{j}"] = tiles_m
    check(call, inputs, mixed_lora_forward(c, route), rereads)


def test_a_decoding_step_reads_little_more_than_once():
    """Every tile of columns reads x again, but of a tile of rows those that there are."""
    c = MixedLora(3, 64, 3, 15, (Member(128, 60),))
    x, mixture, projections, inputs = _mixed_inputs(c)

    def call():
        with routes.forced(routes.FUSED):
            [(y, h)] = mixed_lora_fwd(x, mixture, projections)
        return {"y0": y, "h0": h}

    operands = "x", "weight0", "a0", "b0"
    traffic = check(call, inputs, mixed_lora_forward(c, "fused"), dict.fromkeys(operands[1:], 1))
    read = sum(traffic.reads[name].total for name in operands)
    # The shrink and the product read x; the formula counts it in both.
    assert read <= 1.15 * sum(inputs[name].nbytes for name in operands)


@pytest.mark.parametrize("through_frozen", [True, False], ids=["all", "trained"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", MIXED)
def test_mixed_lora_backward(name, route, through_frozen):
    c = MIXED[name]
    x, mixture, projections, inputs = _mixed_inputs(c)
    dropout = _dropout(c, inputs)
    hs = [h for _, h in mixed_lora_fwd(x, mixture, projections, dropout=dropout)]
    dys = [torch.randn(c.m, m.o).to(x.dtype) for m in c.members]
    inputs |= {f"h{j}": h for j, h in enumerate(hs)} | {f"dy{j}": d for j, d in enumerate(dys)}
    train = [list(m.train) for m in c.members]

    def call():
        with routes.forced(ROUTES[route]):
            dx, d_mixture, factors = mixed_lora_bwd(
                dys, x, mixture, projections, hs, train, True, True, through_frozen, dropout
            )
        grads = {
            f"{n}{j}": t
            for j, pair in enumerate(factors)
            for n, t in zip(("d_a", "d_b"), pair, strict=True)
        }
        return {"dx": dx, "d_mixture": d_mixture, **grads}

    # dy meets the tiles of rank columns, those of trained columns for dB, and those of dx; x those
    # of the trained columns of all members, one launch of equal members reading it once.
    of_x = [tiles(m.window[1] - m.window[0], 16) for m in c.members]
    rereads = {"x": sum(of_x) / len(set(c.members))}
    for j, m in enumerate(c.members):
        rank = padded(m.r)
        block = 16 if rank <= 16 else 32
        meets, own = tiles(rank, block) + tiles(m.window[1] - m.window[0], 16), 2
        if route == "fused":
            meets, own = meets + tiles(c.i, 32), 3
            rereads[f"weight{j}"] = tiles(c.m, 16)
        rereads[f"dy{j}"] = meets / own
        rereads[f"h{j}"] = 1
    check(call, inputs, mixed_lora_backward(c, route, through_frozen), rereads)


# --- the check can fail ------------------------------------------------------------------------


@triton.jit
def _store_kernel(out_ptr, size, BLOCK: tl.constexpr):  # noqa: N803
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, 0.0, mask=offsets < size)


def _forward(c: MixedLora, run: Callable[..., list[tuple[Tensor, Tensor]]]):
    """(call, inputs) of a forward that may do what it should not."""
    x, mixture, projections, inputs = _mixed_inputs(c)

    def call():
        with routes.forced(routes.FUSED):
            outputs = run(x, mixture, projections)
        return {
            f"{n}{j}": t for j, pair in enumerate(outputs) for n, t in zip("yh", pair, strict=True)
        }

    return call, inputs


def test_a_stored_product_of_every_adapter_is_seen():
    """K x M x d, as the loop of the original SAPT code stores it."""
    c = MIXED["one, descriptors"]
    size = c.adapters * c.m * c.i

    def forward(x, mixture, projections):
        _store_kernel[(tiles(size, 1024),)](x.new_empty(size), size, BLOCK=1024)
        return mixed_lora_fwd(x, mixture, projections)

    call, inputs = _forward(c, forward)
    passes = mixed_lora_forward(c, "fused")
    for extra in ([], [Pass("a launch that stores nothing", {}, {})]):
        with pytest.raises(AssertionError):
            check(call, inputs, [*passes, *extra], {})
    stated = Pass("a stated product", {}, {"product": size * c.itemsize})
    check(call, inputs, [*passes, stated], {})


def test_a_shrink_for_each_projection_is_seen():
    """Without the group's one launch x is read once more."""
    c = MIXED["two, pointers"]

    def forward(x, mixture, projections):
        return [mixed_lora_fwd(x, mixture, [p])[0] for p in projections]

    call, inputs = _forward(c, forward)
    passes = mixed_lora_forward(c, "fused")
    again = {"mixture": c.mixture}
    for extra in ([], [Pass("a shrink without x", again, {})]):
        with pytest.raises(AssertionError):
            check(call, inputs, [*passes, *extra], {})
    again["x"] = c.m * c.i * c.itemsize
    check(call, inputs, [*passes, Pass("a second shrink", again, {})], {})


def test_reading_more_often_than_the_tiles_explain_is_seen():
    c = MIXED["one, descriptors"]
    call, inputs = _forward(c, mixed_lora_fwd)
    with pytest.raises(AssertionError, match=r"^x"):
        check(call, inputs, mixed_lora_forward(c, "fused"), {"x": 1})


def test_the_formulas_give_the_known_sizes():
    """At d 4096, R 60: base product and rank products in FLOPs, and M R 4 bytes for h."""
    c = MixedLora(8192, 4096, 16, 15, (Member(4096, 60, (56, 60)),))
    forward = mixed_lora_forward(c, "fused")
    assert total_flops(base_linear(c)) == 2 * 8192 * 4096 * 4096
    assert total_flops(forward) == 2 * 8192 * 4096 * (4096 + 60 + 60)
    assert forward[0].writes["h0"] == 8192 * 64 * 4
    extra = total_bytes(mixed_lora_forward(c, "expand first"))
    assert extra - total_bytes(forward) == 2 * 8192 * 4096 * 2
    for through, most in ((True, 1.0), (False, 0.999)):
        exact = total_bytes(mixed_lora_backward(c, "fused"))
        assert total_bytes(mixed_lora_backward(c, "fused", through)) <= most * exact
