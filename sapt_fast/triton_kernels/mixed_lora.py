"""Triton backend of op `mixed_lora`: see `ops.mixed_lora` for what is computed.

Projections of one x that are alike but for their tensors share every launch. Forward: `shrink_fwd`
reads x once for h = x A^T and h * w, then a GEMM reduces over [x | h * w] against [W | B].
Backward: `shrink_bwd` reads each dy once for everything in rank space, dx is one GEMM over all
[dy | g * w] against [W ; A], and the factors' gradients touch the trainable rows only. The GEMMs
take the route that `routes` chooses: one kernel, or the rank terms first and cuBLAS onto them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sapt_fast.ops._dropout import Dropout
from sapt_fast.ops.projection import Projection
from sapt_fast.triton_kernels.blocks import casts, common
from sapt_fast.triton_kernels.blocks import gemm_variants as routes
from sapt_fast.triton_kernels.blocks.common import round_up, with_unit_column_stride
from sapt_fast.triton_kernels.blocks.gemm import MAX_SOURCES, RANK_ALIGN, Operands, gemm_group
from sapt_fast.triton_kernels.blocks.plans import Results, derived, planned
from sapt_fast.triton_kernels.blocks.row_reduction import Mixing, factor_grads
from sapt_fast.triton_kernels.blocks.shrink import (
    Gate,
    ShrinkGrads,
    Upstream,
    shrink_bwd,
    shrink_fwd,
)
from sapt_fast.triton_kernels.blocks.shrink_tiles import MAX_GROUP


def empty_h(x: Tensor, total_rank: int) -> Tensor:
    """Returns an uninitialised h of shape `[M, R]` with the strides `mixed_lora_fwd` gives it.

    Rows are padded to a multiple of 16 elements, so that their loads and stores are aligned.
    """
    columns = round_up(total_rank, RANK_ALIGN)
    buffer = x.new_empty((x.shape[0], columns), dtype=torch.float32)
    return buffer[:, :total_rank]


def mixed_lora_fwd(
    x: Tensor,
    mixture: Tensor,
    projections: Sequence[Projection],
    keep_h: bool = True,
    dropout: Dropout | None = None,
) -> list[tuple[Tensor, Tensor | None]]:
    """Linear layers with one input, each with the mixture of all adapters of its pool.

    Args:
        x: Of shape `[M, I]`, float32, float16 or bfloat16, any strides.
        mixture: Of shape `[S, K]`, float32; S divides M, sample s owns rows s * M/S and on.
        projections: Weights in x's dtype with any strides (a transposed view is read in place)
            or None for the mixture alone; factors in x's dtype or float32.
        keep_h: False: h may be None, or anything.
        dropout: Of the x that the adapters see, with a seed for each projection.

    Returns:
        Of each projection y of shape `[M, O]`, contiguous, in x's dtype, and h = x @ lora_a.T of
        shape `[M, R]`, float32, unweighted, a view of rows padded to a multiple of 16. With dropout
        h is as in the reference.

    Raises:
        TypeError: if x is not float32, float16 or bfloat16.
        ValueError: if the tensors are not on a CUDA device (unless the interpreter runs).
    """
    inputs = [x, mixture]
    for projection in projections:
        inputs += [t for t in projection if t is not None]
    inputs += () if dropout is None else dropout.seeds
    drops = 0 if dropout is None else dropout.drops
    given = tuple([(p.weight is None, p.bias is None) for p in projections])
    kept = [True] * len(projections) + [keep_h] * len(projections)
    found: list[Any] = planned(
        ("forward", given, keep_h, drops, routes.setting()),
        inputs,
        kept,
        lambda: _forward(x, mixture, projections, dropout),
    )
    return list(zip(found[: len(projections)], found[len(projections) :], strict=True))


def _forward(
    x: Tensor, mixture: Tensor, projections: Sequence[Projection], dropout: Dropout | None
) -> Results:
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
    projections = _cast(x, projections)
    hws: dict[int, Tensor] = {}
    if ranked:
        made = shrink_fwd(
            x,
            [with_unit_column_stride(projections[i].lora_a) for i in ranked],
            [_mixing(mixture, projections[i]) for i in ranked],
            [hs[i].as_strided((x.shape[0], hs[i].stride(0)), hs[i].stride()) for i in ranked],
            None if dropout is None else dropout.of(ranked),
        )
        hws = dict(zip(ranked, made, strict=True))
    members = []
    for i, p in enumerate(projections):
        weight = None if p.weight is None else _with_a_unit_stride(p.weight).t()
        members.append(_operands(x, weight, hws.get(i), p.lora_b, p.bias))
    windows = [(0, round_up(p.lora_a.shape[0], RANK_ALIGN)) for p in projections]
    for numbers in _of_one_kind(members, windows):
        i = numbers[0]
        own = [ys[i] for i in numbers]
        if not _products("forward", [members[i] for i in numbers], windows[i], own):
            for y, number in zip(own, numbers, strict=True):
                bias = projections[number].bias
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
    dropout: Dropout | None = None,
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
        dropout: That of the forward.

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
    inputs += () if dropout is None else dropout.seeds
    drops = 0 if dropout is None else dropout.drops
    given = tuple(
        [
            (p.weight is None, p.bias is None, None if h is None else _bounds(h), *rows)
            for p, h, rows in zip(projections, hs, train_rows, strict=True)
        ]
    )
    flags = needs_x, needs_mixture, grad_through_frozen
    dx, d_mixture, *factors = planned(
        ("backward", given, flags, drops, routes.setting()),
        inputs,
        [True] * (2 + 2 * len(projections)),
        lambda: _backward(dys, x, mixture, projections, hs, train_rows, *flags, dropout),
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
    dropout: Dropout | None,
) -> Results:
    """dx, d_mixture, then d_a and d_b of each projection."""
    dx = x.new_empty(x.shape) if needs_x else None
    d_mixture = mixture.new_empty(mixture.shape) if needs_mixture else None
    x, mixture = with_unit_column_stride(x), mixture.contiguous()
    dys = [with_unit_column_stride(dy) for dy in dys]
    plans = [
        _columns(p, spans, needs_x, needs_mixture, grad_through_frozen)
        for p, spans in zip(projections, train_rows, strict=True)
    ]
    projections = _cast(x, projections)
    made: dict[int, ShrinkGrads] = {}
    factors: dict[int, tuple[Tensor, Tensor]] = {}
    mixture_written = False
    for members, upstream in _alike(dys, mixture, projections, hs, plans):
        plan = plans[members[0]]
        keep_scale = None if dropout is None else dropout.scale
        grads = shrink_bwd(upstream, plan.gw, plan.hw, d_mixture, mixture_written, keep_scale)
        mixture_written = needs_mixture
        made |= zip(members, grads, strict=True)
        if plan.trained:
            ps = [p for each in grads for p in each if p is not None]
            sources = [source for i in members for source in (x, dys[i])]
            own = None if dropout is None else dropout.of(members)
            found = factor_grads(ps, sources, plan.trained, plan.dtype, own)
            factors |= zip(members, zip(found[::2], found[1::2], strict=True), strict=True)
    results: Results = []
    for i, (dy, plan) in enumerate(zip(dys, plans, strict=True)):
        if i in factors:
            results += factors[i]
        elif rows := plan.trained_rows:  # a batch without rows, or an output without columns
            results += [x.new_zeros((rows, t.shape[1]), dtype=plan.dtype) for t in (x, dy)]
        else:
            results += None, None
    if dx is not None:
        gws = {i: grads.gw for i, grads in made.items() if plans[i].through}
        windows = [plan.through or (0, 0) for plan in plans]
        _fill_dx(dx, dys, projections, gws, windows, dropout)
    if d_mixture is not None and not mixture_written:
        d_mixture.zero_()
    return [dx, d_mixture, *results]


def _fill_dx(
    dx: Tensor,
    dys: Sequence[Tensor],
    projections: Sequence[Projection],
    gws: dict[int, Tensor | None],
    windows: Sequence[tuple[int, int]],
    dropout: Dropout | None,
) -> None:
    """The sum over all projections of dy @ weight + gw @ lora_a, the latter after dropout."""
    members = []
    for i, (dy, p) in enumerate(zip(dys, projections, strict=True)):
        weight = None if p.weight is None else _with_a_unit_stride(p.weight)
        member = _operands(dy, weight, gws.get(i), p.lora_a, None)
        if dropout is not None and member.p is not None:
            member = member._replace(seed=dropout.seeds[i])
        members.append(member)
    drops = 0 if dropout is None else dropout.drops
    written = False
    for numbers in _of_one_kind(members, windows):
        group, window = [members[i] for i in numbers], windows[numbers[0]]
        written |= _products("backward", group, window, [dx], accumulate=written, drops=drops)
    if not written:
        dx.zero_()


class _Columns(NamedTuple):
    """Rank columns of a projection that the backward works on; ranges are multiples of 16."""

    trained: list[tuple[int, int]]  # rows of the factors that train, any numbers
    through: tuple[int, int] | None  # columns that reach x
    gw: tuple[int, int] | None  # columns of g times the weights that are needed
    hw: tuple[int, int] | None  # the same of h
    passing: list[tuple[int, int]]  # columns of gw that are not zero, any numbers
    wanted: bool  # whether anything in rank space is
    dtype: torch.dtype  # of the gradients of the factors

    @property
    def trained_rows(self) -> int:
        return sum(stop - start for start, stop in self.trained)


def _columns(
    projection: Projection,
    spans: list[int],
    needs_x: bool,
    needs_mixture: bool,
    grad_through_frozen: bool,
) -> _Columns:
    R = projection.lora_a.shape[0]
    trained = _merged(spans)
    trainable = _window(trained) if trained else None
    through = trainable
    if grad_through_frozen:
        through = (0, round_up(R, RANK_ALIGN)) if R > 0 else None
    gw = through if needs_x else trainable
    passing = trained if needs_x and not grad_through_frozen else [(0, R)]
    wanted, dtype = needs_mixture or gw is not None, projection.lora_a.dtype
    return _Columns(trained, through, gw, trainable, passing, wanted, dtype)


def _alike(
    dys: Sequence[Tensor],
    mixture: Tensor,
    projections: Sequence[Projection],
    hs: Sequence[Tensor | None],
    plans: Sequence[_Columns],
) -> Iterator[tuple[list[int], list[Upstream]]]:
    """Numbers of projections that one launch serves, and what their backward starts from."""
    groups: dict[Hashable, list[tuple[int, Upstream]]] = {}
    for i, (dy, projection, h, plan) in enumerate(zip(dys, projections, hs, plans, strict=True)):
        if dy.numel() == 0 or projection.lora_a.shape[0] == 0 or not plan.wanted:
            continue
        lora_b = with_unit_column_stride(projection.lora_b)
        gate = _gate(projection.row_scale, plan.passing)
        if h is not None:  # a hook on saved tensors may have changed its strides
            h = with_unit_column_stride(h)
        upstream = Upstream(dy, lora_b, _mixing(mixture, projection), gate, h)
        key = upstream.kind(), tuple(plan.trained), *plan[1:4], plan.dtype
        groups.setdefault(key, []).append((i, upstream))
    for group in groups.values():
        for start in range(0, len(group), MAX_GROUP):
            numbers, upstreams = zip(*group[start : start + MAX_GROUP], strict=True)
            yield [*numbers], [*upstreams]


def _operands(
    a: Tensor, b: Tensor | None, p: Tensor | None, q: Tensor, bias: Tensor | None
) -> Operands:
    """Without the products that sum nothing."""
    base = None if a.shape[1] == 0 else b
    return Operands(
        None if base is None else a,
        base,
        p,
        None if p is None else with_unit_column_stride(q),
        None if bias is None else bias.contiguous(),
    )


def _of_one_kind(
    members: Sequence[Operands], windows: Sequence[tuple[int, int]]
) -> Iterator[list[int]]:
    """Numbers of members that one launch serves."""
    kinds: dict[Hashable, list[int]] = {}
    for i, (member, window) in enumerate(zip(members, windows, strict=True)):
        kinds.setdefault((member.kind(), window), []).append(i)
    for numbers in kinds.values():
        for start in range(0, len(numbers), MAX_SOURCES):
            yield numbers[start : start + MAX_SOURCES]


def _products(
    direction: routes.Direction,
    members: Sequence[Operands],
    window: tuple[int, int],
    ys: Sequence[Tensor],
    accumulate: bool = False,
    drops: int = 0,
) -> bool:
    """Writes `ys`, or add to them, as `gemm_group` does, by the route that is faster.

    Returns:
        False where there is nothing to sum; then the ys are left as they were.
    """
    a, _, p, *_ = members[0]
    y = ys[0]
    if y.numel() == 0 or (a is None and p is None):
        return False
    if a is None:
        gemm_group(members, window, ys, accumulate=accumulate, drops=drops)
        return True
    variant = routes.Variant(routes.EXPAND_FIRST)
    if p is not None:
        traits = common.device_traits(y.device)
        variant = routes.choose(
            traits, direction, a.shape[1], y.shape[1], window[1] - window[0], y.shape[0], y.dtype
        )
    routes.run_group(variant, members, window, ys, accumulate=accumulate, drops=drops)
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


def _cast(x: Tensor, projections: Sequence[Projection]) -> list[Projection]:
    """The projections with factors in x's dtype where `casts` finds that this pays."""
    factors = casts.in_dtype_of(x, [t for p in projections for t in (p.lora_a, p.lora_b)])
    pairs = zip(factors[::2], factors[1::2], strict=True)
    return [p._replace(lora_a=a, lora_b=b) for p, (a, b) in zip(projections, pairs, strict=True)]


def _mixing(mixture: Tensor, projection: Projection) -> Mixing:
    return Mixing(mixture, projection.row_adapter, projection.row_scale)


def _with_a_unit_stride(weight: Tensor) -> Tensor:
    return weight if 1 in weight.stride() else weight.contiguous()
