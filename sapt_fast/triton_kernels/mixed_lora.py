"""Triton backend of op `mixed_lora`: see `ops.mixed_lora` for what is computed.

Forward: one launch of `shrink_fwd` reads x once for h = x A^T and h * w of all projections, then
one GEMM for each reduces over [x | h * w] against [W | B]. Backward: `shrink_bwd` reads dy once
for everything in rank space, dx is one GEMM over [dy | g * w] against [W ; A], to which each
further projection adds in place, and the factors' gradients touch the trainable rows only. The
GEMMs take the route that `routes` chooses: one kernel, or the rank term first and cuBLAS onto it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sapt_fast.ops.projection import Projection
from sapt_fast.triton_kernels.blocks import common
from sapt_fast.triton_kernels.blocks import gemm_variants as routes
from sapt_fast.triton_kernels.blocks.common import round_up, with_unit_column_stride
from sapt_fast.triton_kernels.blocks.gemm import RANK_ALIGN, two_source_gemm
from sapt_fast.triton_kernels.blocks.plans import Results, derived, planned
from sapt_fast.triton_kernels.blocks.row_reduction import Mixing, factor_grad
from sapt_fast.triton_kernels.blocks.shrink import Gate, shrink_bwd, shrink_fwd


def empty_h(x: Tensor, total_rank: int) -> Tensor:
    """Returns an uninitialised h of shape `[M, R]` with the strides `mixed_lora_fwd` gives it.

    Rows are padded to a multiple of 16 elements, so that their loads and stores are aligned.
    """
    columns = round_up(total_rank, RANK_ALIGN)
    buffer = x.new_empty((x.shape[0], columns), dtype=torch.float32)
    return buffer[:, :total_rank]


def mixed_lora_fwd(
    x: Tensor, mixture: Tensor, projections: Sequence[Projection], keep_h: bool = True
) -> list[tuple[Tensor, Tensor | None]]:
    """Linear layers with one input, each with the mixture of all adapters of its pool.

    Args:
        x: Of shape `[M, I]`, float32, float16 or bfloat16, any strides.
        mixture: Of shape `[S, K]`, float32; S divides M, sample s owns rows s * M/S and on.
        projections: Weights in x's dtype with any strides (a transposed view is read in place)
            or None for the mixture alone; factors in x's dtype or float32.
        keep_h: False: h may be None, or anything.

    Returns:
        Of each projection y of shape `[M, O]`, contiguous, in x's dtype, and h = x @ lora_a.T of
        shape `[M, R]`, float32, unweighted, a view of rows padded to a multiple of 16.

    Raises:
        TypeError: if x is not float32, float16 or bfloat16.
        ValueError: if the tensors are not on a CUDA device (unless the interpreter runs).
    """
    inputs = [x, mixture]
    for projection in projections:
        inputs += [t for t in projection if t is not None]
    given = tuple([(p.weight is None, p.bias is None) for p in projections])
    kept = [True] * len(projections) + [keep_h] * len(projections)
    found: list[Any] = planned(
        ("forward", given, keep_h, routes.setting()),
        inputs,
        kept,
        lambda: _forward(x, mixture, projections),
    )
    return list(zip(found[: len(projections)], found[len(projections) :], strict=True))


def _forward(x: Tensor, mixture: Tensor, projections: Sequence[Projection]) -> Results:
    """y of each projection, then h of each."""
    ys = [x.new_empty((x.shape[0], p.lora_b.shape[1])) for p in projections]
    hs = [empty_h(x, p.lora_a.shape[0]) for p in projections]
    if x.shape[0] == 0:
        return [*ys, *hs]
    x, mixture = with_unit_column_stride(x), mixture.contiguous()
    ranked = [i for i, p in enumerate(projections) if p.lora_a.numel() > 0]
    if x.shape[1] == 0:
        for h in hs:
            h.zero_()
    hws: dict[int, Tensor] = {}
    if ranked:
        made = shrink_fwd(
            x,
            [with_unit_column_stride(projections[i].lora_a) for i in ranked],
            [_mixing(mixture, projections[i]) for i in ranked],
            [hs[i].as_strided((x.shape[0], hs[i].stride(0)), hs[i].stride()) for i in ranked],
        )
        hws = dict(zip(ranked, made, strict=True))
    for i, (projection, y) in enumerate(zip(projections, ys, strict=True)):
        weight, bias = projection.weight, projection.bias
        written = _product(
            "forward",
            x,
            None if weight is None else _with_a_unit_stride(weight).t(),
            hws.get(i),
            projection.lora_b,
            None if bias is None else bias.contiguous(),
            (0, round_up(projection.lora_a.shape[0], RANK_ALIGN)),
            y,
        )
        if not written:
            y.zero_() if bias is None else y.copy_(bias)
    return [*ys, *hs]


def mixed_lora_bwd(
    dys: Sequence[Tensor],
    x: Tensor,
    mixture: Tensor,
    projections: Sequence[Projection],
    hs: Sequence[Tensor | None],
    train_rows: Sequence[list[int]],
    needs_x: bool,
    needs_mixture: bool,
    grad_through_frozen: bool,
) -> tuple[Tensor | None, Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """Returns the gradients of `mixed_lora_fwd`; deterministic.

    Args:
        dys: Of each projection, of shape `[M, O]`, any strides, also expanded; never written to.
        x, mixture, projections: As in the forward.
        hs: The h that the forward returned; may be None without `needs_mixture` and `train_rows`.
        train_rows: Ascending disjoint ranges [start, stop, start, stop, ...] of rank rows.
        needs_x: Whether dx is wanted.
        needs_mixture: Whether d_mixture is wanted.
        grad_through_frozen: False leaves the rank rows outside `train_rows` out of dx.

    Returns:
        dx of shape `[M, I]` and d_mixture `[S, K]` in mixture's dtype, summed over the
        projections, and of each d_a `[Rt, I]` and d_b `[Rt, O]` in the factors' dtype, rows in
        the order of its ranges. None for what is not wanted, and for d_a and d_b without
        `train_rows`.

    Raises:
        TypeError, ValueError: as in the forward.
    """
    inputs = [*dys, x, mixture]
    for projection in projections:
        inputs += [t for t in projection if t is not None]
    inputs += [h for h in hs if h is not None]
    given = tuple(
        [
            (p.weight is None, p.bias is None, None if h is None else _bounds(h), *rows)
            for p, h, rows in zip(projections, hs, train_rows, strict=True)
        ]
    )
    flags = needs_x, needs_mixture, grad_through_frozen
    dx, d_mixture, *factors = planned(
        ("backward", given, flags, routes.setting()),
        inputs,
        [True] * (2 + 2 * len(projections)),
        lambda: _backward(dys, x, mixture, projections, hs, train_rows, *flags),
    )
    return dx, d_mixture, list(zip(factors[::2], factors[1::2], strict=True))


def _bounds(h: Tensor) -> tuple[int, int]:
    """What `readable_columns` depends on besides size and strides."""
    return h.untyped_storage().nbytes(), int(h.storage_offset())


def _backward(
    dys: Sequence[Tensor],
    x: Tensor,
    mixture: Tensor,
    projections: Sequence[Projection],
    hs: Sequence[Tensor | None],
    train_rows: Sequence[list[int]],
    needs_x: bool,
    needs_mixture: bool,
    grad_through_frozen: bool,
) -> Results:
    """dx, d_mixture, then d_a and d_b of each projection."""
    dx = x.new_empty(x.shape) if needs_x else None
    d_mixture = mixture.new_empty(mixture.shape) if needs_mixture else None
    x, mixture = with_unit_column_stride(x), mixture.contiguous()
    x_written = mixture_written = False
    factors: Results = []
    for dy, projection, h, spans in zip(dys, projections, hs, train_rows, strict=True):
        dy = with_unit_column_stride(dy)
        lora_a, R = projection.lora_a, projection.lora_a.shape[0]
        trained = _merged(spans)
        trainable = _window(trained) if trained else None
        through = trainable  # rank columns that reach x
        if grad_through_frozen:
            through = (0, round_up(R, RANK_ALIGN)) if R > 0 else None
        gw_window = through if needs_x else trainable
        gw = hw = None
        if dy.numel() > 0 and R > 0 and (needs_mixture or gw_window):
            cut = needs_x and not grad_through_frozen
            gw, hw = shrink_bwd(
                dy,
                with_unit_column_stride(projection.lora_b),
                _mixing(mixture, projection),
                _gate(projection.row_scale, trained if cut else [(0, R)]),
                h,
                gw_window,
                trainable,
                d_mixture,
                mixture_written,
            )
            mixture_written = needs_mixture
        factors += _factor_grads(gw, hw, x, dy, projection, trained)
        if dx is not None:
            weight = projection.weight
            x_written |= _product(
                "backward",
                dy,
                None if weight is None else _with_a_unit_stride(weight),
                gw if through else None,
                lora_a,
                None,
                through or (0, 0),
                dx,
                accumulate=x_written,
            )
    if dx is not None and not x_written:
        dx.zero_()
    if d_mixture is not None and not mixture_written:
        d_mixture.zero_()
    return [dx, d_mixture, *factors]


def _factor_grads(
    gw: Tensor | None,
    hw: Tensor | None,
    x: Tensor,
    dy: Tensor,
    projection: Projection,
    trained: list[tuple[int, int]],
) -> tuple[Tensor | None, Tensor | None]:
    """d_a and d_b, stacked over the trained rows; zero for a batch without rows (no gw, hw)."""
    if not trained:
        return None, None
    lora_a, lora_b = projection.lora_a, projection.lora_b
    if gw is None or hw is None:
        rows = sum(stop - start for start, stop in trained)
        return lora_a.new_zeros((rows, x.shape[1])), lora_b.new_zeros((rows, dy.shape[1]))
    return factor_grad(gw, x, trained, lora_a.dtype), factor_grad(hw, dy, trained, lora_b.dtype)


def _product(
    direction: routes.Direction,
    a: Tensor,
    b: Tensor | None,
    p: Tensor | None,
    q: Tensor,
    bias: Tensor | None,
    window: tuple[int, int],
    y: Tensor,
    accumulate: bool = False,
) -> bool:
    """Writes `y`, or add to it, as `two_source_gemm` does, by the route that is faster.

    Returns:
        False where there is nothing to sum; then `y` is left as it was.
    """
    if y.numel() == 0:
        return False
    q = with_unit_column_stride(q)
    if b is None or a.shape[1] == 0:
        if p is None:
            return False
        two_source_gemm(None, None, p, q, bias, window, y, accumulate=accumulate)
        return True
    variant = routes.Variant(routes.EXPAND_FIRST)
    if p is not None:
        traits = common.device_traits(y.device)
        variant = routes.choose(
            traits, direction, a.shape[1], y.shape[1], window[1] - window[0], y.shape[0], y.dtype
        )
    q_or_none = None if p is None else q
    routes.run(variant, a, b, p, q_or_none, bias, window, y, accumulate=accumulate)
    return True


def _merged(spans: list[int]) -> list[tuple[int, int]]:
    """The ranges [start, stop, start, stop, ...] without empty ones; neighbours become one."""
    ranges: list[tuple[int, int]] = []
    for start, stop in zip(spans[::2], spans[1::2], strict=True):
        if ranges and ranges[-1][1] == start:
            ranges[-1] = ranges[-1][0], stop
        elif start < stop:
            ranges.append((start, stop))
    return ranges


def _window(ranges: list[tuple[int, int]]) -> tuple[int, int]:
    """Hull of the ranges, widened to multiples of 16."""
    return ranges[0][0] // RANK_ALIGN * RANK_ALIGN, round_up(ranges[-1][1], RANK_ALIGN)


def _gate(row_scale: Tensor, passing: list[tuple[int, int]]) -> Gate:
    """Scale of the rows in the ranges, none for others: a window covers more rows than they."""
    if not passing:
        return Gate(row_scale, 0, 0)
    start, stop = passing[0][0], passing[-1][1]
    if len(passing) == 1:
        return Gate(row_scale, start, stop)
    return Gate(derived(_only, row_scale, passing), start, stop)


def _only(row_scale: Tensor, passing: list[tuple[int, int]]) -> Tensor:
    """The scales in the ranges, 0 elsewhere."""
    scale = torch.zeros_like(row_scale)
    for first, last in passing:
        scale[first:last] = row_scale[first:last]
    return scale


def _mixing(mixture: Tensor, projection: Projection) -> Mixing:
    return Mixing(mixture, projection.row_adapter, projection.row_scale)


def _with_a_unit_stride(weight: Tensor) -> Tensor:
    return weight if 1 in weight.stride() else weight.contiguous()
