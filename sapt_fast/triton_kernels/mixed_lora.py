"""Triton backend of op `mixed_lora`: see `ops.mixed_lora` for what is computed.

Forward, two launches: `shrink_fwd` reads x once for h = x A^T and h * w, then one GEMM reduces
over [x | h * w] against [W | B]. Backward: `shrink_bwd` reads dy once for everything in rank
space, dx is one GEMM over [dy | g * w] against [W ; A], and the factors' gradients touch the
trainable rows only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sapt_fast.ops.projection import Projection
from sapt_fast.triton_kernels.common import round_up, with_unit_column_stride
from sapt_fast.triton_kernels.gemm import RANK_ALIGN, two_source_gemm
from sapt_fast.triton_kernels.row_reduction import Mixing, factor_grad
from sapt_fast.triton_kernels.shrink import shrink_bwd, shrink_fwd


def empty_h(x: Tensor, total_rank: int) -> Tensor:
    """Return an uninitialised h of shape `[M, R]` with the strides `mixed_lora_fwd` gives it.

    Rows are padded to a multiple of 16 elements, so that their loads and stores are aligned.
    """
    columns = round_up(total_rank, RANK_ALIGN)
    buffer = x.new_empty((x.shape[0], columns), dtype=torch.float32)
    return buffer[:, :total_rank]


def mixed_lora_fwd(
    x: Tensor, mixture: Tensor, projections: Sequence[Projection]
) -> list[tuple[Tensor, Tensor]]:
    """Linear layers with one input, each with the mixture of all adapters of its pool.

    Args:
        x: Of shape `[M, I]`, float32, float16 or bfloat16, any strides.
        mixture: Of shape `[S, K]`, float32; S divides M, sample s owns rows s * M/S and on.
        projections: Weights in x's dtype with any strides (a transposed view is read in place)
            or None for the mixture alone; factors in x's dtype or float32.

    Returns:
        Of each projection y of shape `[M, O]`, contiguous, in x's dtype, and h = x @ lora_a.T of
        shape `[M, R]`, float32, unweighted, a view of rows padded to a multiple of 16.

    Raises:
        TypeError: x is not float32, float16 or bfloat16.
        ValueError: the tensors are not on a CUDA device (unless the interpreter runs).
    """
    return [_forward(x, mixture, projection) for projection in projections]


def _forward(x: Tensor, mixture: Tensor, projection: Projection) -> tuple[Tensor, Tensor]:
    weight, bias, lora_a, lora_b, row_adapter, row_scale = projection
    M, R = x.shape[0], lora_a.shape[0]
    y = x.new_empty((M, lora_b.shape[1]))
    h = empty_h(x, R)
    if y.numel() == 0:
        return y, h
    x = with_unit_column_stride(x)
    weight_t = None if weight is None else _with_a_unit_stride(weight).t()
    hw = None
    if R > 0:
        padded_h = h.as_strided((M, h.stride(0)), h.stride())
        mixing = Mixing(mixture.contiguous(), row_adapter, row_scale)
        (hw,) = shrink_fwd(x, [with_unit_column_stride(lora_a)], [mixing], [padded_h])
    window = (0, round_up(R, RANK_ALIGN))
    two_source_gemm(
        None if weight_t is None else x,
        weight_t,
        hw,
        None if hw is None else with_unit_column_stride(lora_b),
        None if bias is None else bias.contiguous(),
        window,
        y,
    )
    return y, h


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
    """Gradients of `mixed_lora_fwd`; deterministic.

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
        TypeError, ValueError: As in the forward.
    """
    dx = d_mixture = None
    factors = []
    for dy, projection, h, spans in zip(dys, projections, hs, train_rows, strict=True):
        own_dx, own_mixture, d_a, d_b = _backward(
            dy, x, mixture, projection, h, spans, needs_x, needs_mixture, grad_through_frozen
        )
        if own_dx is not None:
            dx = own_dx if dx is None else dx.add_(own_dx)
        if own_mixture is not None:
            d_mixture = own_mixture if d_mixture is None else d_mixture.add_(own_mixture)
        factors.append((d_a, d_b))
    return dx, d_mixture, factors


def _backward(
    dy: Tensor,
    x: Tensor,
    mixture: Tensor,
    projection: Projection,
    h: Tensor | None,
    train_rows: list[int],
    needs_x: bool,
    needs_mixture: bool,
    grad_through_frozen: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    weight, _, lora_a, lora_b, row_adapter, row_scale = projection
    M, R = x.shape[0], lora_a.shape[0]
    ranges = [r for r in zip(train_rows[::2], train_rows[1::2], strict=True) if r[0] < r[1]]
    if M == 0 or R == 0:
        return _bwd_without_rank(
            dy, x, weight, lora_a, lora_b, mixture, ranges, needs_x, needs_mixture
        )
    dy, x = with_unit_column_stride(dy), with_unit_column_stride(x)
    lora_a, lora_b = with_unit_column_stride(lora_a), with_unit_column_stride(lora_b)
    mixing = Mixing(mixture.contiguous(), row_adapter, row_scale)

    everything = (0, round_up(R, RANK_ALIGN))
    trainable = _window(ranges) if ranges else None
    through = everything if grad_through_frozen else trainable  # rank columns that reach x
    columns = everything if needs_mixture or (needs_x and grad_through_frozen) else trainable
    gate = None
    if needs_x and not grad_through_frozen and ranges:
        gate = _only_rows(row_scale, ranges)
    elif ranges or (needs_x and through is not None):
        gate = row_scale
    gw = hw = d_mixture = d_a = d_b = dx = None
    if columns is not None:
        gw, hw, d_mixture = shrink_bwd(
            dy, lora_b, mixing, gate, h, columns, trainable, needs_mixture
        )
    if gw is not None and hw is not None:
        d_a = factor_grad(gw, x, ranges, lora_a.dtype)
        d_b = factor_grad(hw, dy, ranges, lora_b.dtype)
    if needs_x:
        dx = _input_grad(dy, x, weight, gw, lora_a, through)
    return dx, d_mixture, d_a, d_b


def _input_grad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    gw: Tensor | None,
    lora_a: Tensor,
    window: tuple[int, int] | None,
) -> Tensor:
    """dy @ weight + gw[:, window] @ lora_a[window], either of them absent."""
    if weight is None and window is None:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    return two_source_gemm(
        None if weight is None else dy,
        None if weight is None else _with_a_unit_stride(weight),
        gw if window else None,
        lora_a if window else None,
        None,
        window or (0, 0),
        x.new_empty(x.shape),
    )


def _bwd_without_rank(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mixture: Tensor,
    ranges: list[tuple[int, int]],
    needs_x: bool,
    needs_mixture: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The backward of a batch without rows or a pool without ranks."""
    dx = d_a = d_b = None
    if needs_x:
        empty = x.new_empty(x.shape)
        dx = empty
        if empty.numel():
            dx = _input_grad(with_unit_column_stride(dy), x, weight, None, lora_a, None)
    d_mixture = torch.zeros_like(mixture) if needs_mixture else None
    if ranges:
        trained = sum(stop - start for start, stop in ranges)
        d_a = lora_a.new_zeros((trained, lora_a.shape[1]))
        d_b = lora_b.new_zeros((trained, lora_b.shape[1]))
    return dx, d_mixture, d_a, d_b


def _window(ranges: list[tuple[int, int]]) -> tuple[int, int]:
    """Hull of the ranges, widened to multiples of 16."""
    return ranges[0][0] // RANK_ALIGN * RANK_ALIGN, round_up(ranges[-1][1], RANK_ALIGN)


def _only_rows(row_scale: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
    """row_scale in the ranges, 0 elsewhere: the window of the ranges covers other rows too."""
    gate = torch.zeros_like(row_scale)
    for start, stop in ranges:
        gate[start:stop] = row_scale[start:stop]
    return gate


def _with_a_unit_stride(weight: Tensor) -> Tensor:
    return weight if 1 in weight.stride() else weight.contiguous()
