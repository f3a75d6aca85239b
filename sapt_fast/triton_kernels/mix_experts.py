"""Triton backend of op `mix_experts`: see `ops.mix_experts` for what is computed.

Forward, two launches: one program per pair (row, choice) for h = x A^T, then one per row and tile
of columns for the sum over its choices. The backward runs the same two on dy with the banks
exchanged, and then one program per expert and tile of columns sums the gradient of a bank over the
pairs of that expert, which lie next to each other after sorting. No atomics: every sum has a fixed
order. Experts are read where they lie, once per pair; where many pairs share an expert, both
products run on sorted pairs instead (`grouped_experts`).
"""
# ruff: noqa: N803 - kernel arguments keep the letters of the formulas
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapt_fast.ops._presence import without_undefined
from sapt_fast.ops.mix_experts import pair_order
from sapt_fast.triton_kernels.blocks import common
from sapt_fast.triton_kernels.blocks.common import cdiv, with_unit_column_stride
from sapt_fast.triton_kernels.blocks.grouped_experts import (
    grouped_into_ranks,
    grouped_out_of_ranks,
    grouping_pays,
)
from sapt_fast.triton_kernels.blocks.plans import Results, launch, planned

if TYPE_CHECKING:
    from sapt_fast.ops.mix_experts import PairGroups

_BLOCK_RANK = 16
# Pairs of an expert that cost less one by one than the matrix unit's smallest tile.
_FEW = 4


@triton.jit(do_not_specialize=["k", "N", "R"])
def _into_ranks_kernel(
    x_ptr,
    bank_ptr,
    index_ptr,
    h_ptr,
    k,
    N,
    R,
    D,
    stride_xm,
    stride_bn,
    stride_br,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h[pair, ranks of the tile] = x[row] bank[index[pair], ranks]^T; 0 without an expert."""
    pair = tl.program_id(0).to(tl.int64)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs = tl.arange(0, BLOCK_K)
    expert = tl.load(index_ptr + pair)
    # [BLOCK_R, BLOCK_K], summed over its columns at the end
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    if (expert >= 0) & (expert < N):
        x_ptrs = x_ptr + pair // k * stride_xm + offs
        a_ptrs = bank_ptr + expert * stride_bn + ranks.to(tl.int64)[:, None] * stride_br
        for d in range(0, D, BLOCK_K):
            inside = offs < D - d
            # x [BLOCK_K], a [BLOCK_R, BLOCK_K]
            x = tl.load(x_ptrs + d, mask=inside, other=0.0).to(tl.float32)
            mask = (ranks < R)[:, None] & inside[None, :]
            a = tl.load(a_ptrs + (d + offs)[None, :], mask=mask, other=0.0).to(tl.float32)
            acc += a * x[None, :]
    # [BLOCK_R] of h [M k, R], float32
    tl.store(h_ptr + pair * R + ranks, tl.sum(acc, axis=1), mask=ranks < R)


@triton.jit(do_not_specialize=["k", "N", "R", "scaling"])
def _out_of_ranks_kernel(
    h_ptr,
    weights_ptr,
    bank_ptr,
    index_ptr,
    out_ptr,
    k,
    N,
    R,
    D,
    scaling,
    stride_bn,
    stride_br,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[row, columns] = sum over j and ranks of scaling weights[row, j] h[row, j] bank[n_j]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # [BLOCK_R, BLOCK_N], summed over its rows at the end
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for first in tl.range(0, k * R, BLOCK_R, loop_unroll_factor=2):
        # [BLOCK_R] factors: rank after rank of choice after choice
        factors = first + tl.arange(0, BLOCK_R)
        inside = factors < k * R
        pairs = row * k + factors // R
        expert = tl.load(index_ptr + pairs, mask=inside, other=-1)
        weight = tl.load(weights_ptr + pairs, mask=inside, other=0.0)
        # Nothing is read for a pair without an expert or weight.
        used = (expert >= 0) & (expert < N) & (weight != 0)
        # h [BLOCK_R], b [BLOCK_R, BLOCK_N]
        h = tl.load(h_ptr + row * k * R + factors, mask=used, other=0.0)
        b_rows = bank_ptr + expert * stride_bn + (factors % R).to(tl.int64) * stride_br
        mask = used[:, None] & (columns < D)[None, :]
        b = tl.load(b_rows[:, None] + columns[None, :], mask=mask, other=0.0)
        acc += (h * weight * scaling)[:, None] * b.to(tl.float32)
    out = tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty)
    # [BLOCK_N]
    tl.store(out_ptr + row * D + columns, out, mask=columns < D)


@triton.jit(do_not_specialize=["k", "rows", "R", "scaling"])
def _bank_grad_kernel(
    h_ptr,
    weights_ptr,
    x_ptr,
    order_ptr,
    target_ptr,
    start_ptr,
    stop_ptr,
    out_ptr,
    k,
    rows,
    R,
    D,
    scaling,
    stride_xm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FEW: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """out[target, ranks, columns] = sum over the pairs of a target of scaling weights h (x) x[row].

    Program p of axis 0 sums the sorted pairs from start[p] to stop[p], which may be none, into
    target[p], if that is a row of out; axis 1 counts tiles of columns, axis 2 tiles of ranks. The
    tile is [columns, ranks]. Up to FEW pairs are added one by one, more on the matrix unit.
    """
    start = tl.load(start_ptr + tl.program_id(0)).to(tl.int32)
    stop = tl.load(stop_ptr + tl.program_id(0)).to(tl.int32)
    target = tl.load(target_ptr + tl.program_id(0))
    if (target >= 0) & (target < rows):
        columns = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        ranks = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
        offs = tl.arange(0, BLOCK_K)
        # [BLOCK_M columns, BLOCK_N ranks]: the matrix instruction wants 64 rows
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if stop - start <= FEW:
            for p in range(start, stop):
                pair = tl.load(order_ptr + p)
                weight = tl.load(weights_ptr + pair) * scaling
                # h [BLOCK_N], x [BLOCK_M]
                h = tl.load(h_ptr + pair * R + ranks, mask=ranks < R, other=0.0)
                x_ptrs = x_ptr + pair // k * stride_xm + columns
                x = tl.load(x_ptrs, mask=columns < D, other=0.0).to(tl.float32)
                acc += x[:, None] * (h * weight)[None, :]
        else:
            for p in range(start, stop, BLOCK_K):
                inside = offs < stop - p
                # [BLOCK_K] pairs and their weights
                pairs = tl.load(order_ptr + p + offs, mask=inside, other=0)
                weights = tl.load(weights_ptr + pairs, mask=inside, other=0.0) * scaling
                h_mask = inside[:, None] & (ranks < R)[None, :]
                # h [BLOCK_K, BLOCK_N], x [BLOCK_K, BLOCK_M]
                h = tl.load(h_ptr + pairs[:, None] * R + ranks[None, :], mask=h_mask, other=0.0)
                x_ptrs = x_ptr + (pairs // k)[:, None] * stride_xm + columns[None, :]
                x = tl.load(x_ptrs, mask=inside[:, None] & (columns < D)[None, :], other=0.0)
                hw = h * weights[:, None]
                # x^T (h * w), summed over pairs
                acc = tl.dot(x.to(COMPUTE).T, hw.to(COMPUTE), acc, input_precision="ieee")
        out_rows = (target * R + ranks) * D
        mask = (columns < D)[:, None] & (ranks < R)[None, :]
        out_ptrs = out_ptr + out_rows[None, :] + columns[:, None]
        # [BLOCK_M, BLOCK_N], transposed into out [rows, R, D]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def mix_experts_fwd(
    x: Tensor,
    bank_a: Tensor,
    bank_b: Tensor,
    index: Tensor,
    weights: Tensor,
    scaling: float,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the weighted sum of the chosen experts' outputs.

    Args:
        x: Of shape `[M, I]`, float32, float16 or bfloat16, any strides.
        bank_a: Of shape `[N, r, I]`, in x's dtype or float32; copied unless its columns are
            adjacent in memory.
        bank_b: Of shape `[N, r, O]`, likewise.
        index: Of shape `[M, k]`, int64; values outside [0, N) mean no expert.
        weights: Of shape `[M, k]`, float32.
        scaling: Of all experts.
        order: That of `pair_order`, if it is known; read where experts are crowded.

    Returns:
        delta of shape `[M, O]`, contiguous, in x's dtype, and h = x A^T of shape `[M, k, r]`,
        float32, 0 where there is no expert.

    Raises:
        TypeError: if x is not float32, float16 or bfloat16.
        ValueError: if the tensors are not on a CUDA device (unless the interpreter runs).
    """
    common.compute_dtype(x.dtype)
    common.device_traits(x.device)
    y, h = planned(
        ("mix_experts", scaling, order is None),
        [x, bank_a, bank_b, index, weights, *([] if order is None else [order])],
        [True, True],
        lambda: _mixed(x, bank_a, bank_b, index, weights, scaling, order),
    )
    return cast(Tensor, y), cast(Tensor, h)


def _mixed(
    x: Tensor,
    bank_a: Tensor,
    bank_b: Tensor,
    index: Tensor,
    weights: Tensor,
    scaling: float,
    order: Tensor | None,
) -> Results:
    bank_a, bank_b = _with_unit_stride(bank_a), _with_unit_stride(bank_b)
    index, weights = index.contiguous(), weights.contiguous()
    order = _order_if_crowded(index, weights, bank_a, bank_b, order)
    h = _into_ranks(with_unit_column_stride(x), bank_a, index, order)
    return [_out_of_ranks(h, bank_b, index, weights, order, scaling, x.dtype), h]


def mix_experts_bwd(
    dy: Tensor,
    x: Tensor,
    bank_a: Tensor,
    bank_b: Tensor,
    index: Tensor,
    weights: Tensor,
    h: Tensor,
    scaling: float,
    groups: PairGroups | None,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients of `mix_experts_fwd`; deterministic.

    Args:
        dy: Of shape `[M, O]`, any strides, also expanded.
        x, bank_a, bank_b, index, weights, scaling: As in the forward.
        h: The h that the forward returned.
        groups: The pairs sorted by expert, if the banks' gradients are wanted.
        needs_x: Whether dx is wanted.
        needs_weights: Whether d_weights is wanted.

    Returns:
        dx `[M, I]`, d_weights `[M, k]` float32, d_a `[rows, r, I]` and d_b `[rows, r, O]` in the
        banks' dtype, rows those of `groups`. None for what is not wanted.

    Raises:
        TypeError, ValueError: as in the forward.
    """
    bank_a, bank_b = _with_unit_stride(bank_a), _with_unit_stride(bank_b)
    dy, x = with_unit_column_stride(dy), with_unit_column_stride(x)
    index, weights, h = index.contiguous(), weights.contiguous(), h.contiguous()
    if groups is not None:
        groups = groups._replace(order=groups.order.contiguous())
    known = None if groups is None else groups.order
    order = _order_if_crowded(index, weights, bank_a, bank_b, known)
    g = _into_ranks(dy, bank_b, index, order)
    dx = d_weights = d_a = d_b = None
    if needs_x:
        dx = _out_of_ranks(g, bank_a, index, weights, order, scaling, x.dtype)
    if needs_weights:
        d_weights = without_undefined((g * h).sum(-1) * scaling, weights)
    if groups is not None:
        segments = _segments(groups)
        d_a = _bank_grad(g, weights, x, groups, segments, scaling, bank_a.dtype)
        d_b = _bank_grad(h, weights, dy, groups, segments, scaling, bank_b.dtype)
    return dx, d_weights, d_a, d_b


def _order_if_crowded(
    index: Tensor, weights: Tensor, bank_a: Tensor, bank_b: Tensor, order: Tensor | None
) -> Tensor | None:
    """The order of the pairs, if not yet known; None where experts are gathered pair by pair."""
    experts, rank, inputs = bank_a.shape
    width = inputs + bank_b.shape[2]
    empty = 0 in (index.numel(), bank_a.numel(), bank_b.numel())
    if empty or not grouping_pays(index.numel(), experts, rank, width, bank_a.element_size()):
        return None
    return pair_order(index, weights, experts) if order is None else order


def _segments(groups: PairGroups) -> tuple[Tensor, Tensor, Tensor]:
    """(target, start, stop): of each program its target and the sorted pairs that it sums.

    One program per target, or one per pair where these are fewer; then the first of a target
    works and the others have none.
    """
    pairs = groups.target
    one_per_pair = _one_per_pair(groups)
    target = pairs if one_per_pair else torch.arange(groups.rows, device=pairs.device)
    start, stop = (torch.searchsorted(pairs, target, right=right) for right in (False, True))
    if one_per_pair:
        first = start == torch.arange(len(pairs), device=pairs.device)
        target = torch.where(first, target, -1)
    return target, start, stop


def _one_per_pair(groups: PairGroups) -> bool:
    return groups.target.shape[0] < groups.rows


def _into_ranks(x: Tensor, bank: Tensor, index: Tensor, order: Tensor | None) -> Tensor:
    """h [M, k, r]: every row times its experts' factors [r, D]; by groups if `order` is given."""
    (M, k), (N, R, D) = index.shape, bank.shape
    if order is not None:
        return grouped_into_ranks(x, bank, index, order)
    h = x.new_empty((M, k, R), dtype=torch.float32)
    if h.numel() == 0:
        return h
    block_r = min(_BLOCK_RANK, triton.next_power_of_2(R))
    with torch.cuda.device_of(x):
        launch(
            _into_ranks_kernel,
            (M * k, cdiv(R, block_r)),
            x,
            bank,
            index,
            h,
            k,
            N,
            R,
            D,
            x.stride(0),
            bank.stride(0),
            bank.stride(1),
            BLOCK_R=block_r,
            BLOCK_K=min(512, max(16, triton.next_power_of_2(D))),
            num_warps=4,
        )
    return h


def _out_of_ranks(
    h: Tensor,
    bank: Tensor,
    index: Tensor,
    weights: Tensor,
    order: Tensor | None,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """[M, D]: the weighted sum of the experts' factors [r, D], with coefficients h [M, k, r]."""
    (M, k), (N, R, D) = index.shape, bank.shape
    if order is not None:
        return grouped_out_of_ranks(h, bank, index, weights, order, scaling, dtype)
    out = h.new_empty((M, D), dtype=dtype)
    if out.numel() == 0:
        return out
    block_r = min(_BLOCK_RANK, triton.next_power_of_2(max(k * R, 1)))
    block_n = min(256, max(16, triton.next_power_of_2(D)))
    with torch.cuda.device_of(h):
        launch(
            _out_of_ranks_kernel,
            (M, cdiv(D, block_n)),
            h,
            weights,
            bank,
            index,
            out,
            k,
            N,
            R,
            D,
            scaling,
            bank.stride(0),
            bank.stride(1),
            BLOCK_R=block_r,
            BLOCK_N=block_n,
            num_warps=4,
        )
    return out


def _bank_grad(
    h: Tensor,
    weights: Tensor,
    x: Tensor,
    groups: PairGroups,
    segments: tuple[Tensor, Tensor, Tensor],
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """[rows, r, D]: for each target the sum over its pairs of weighted h [r] (x) x [D]."""
    (_, k, R), D, programs = h.shape, x.shape[1], segments[0].shape[0]
    shape = (groups.rows, R, D)
    # With a program per target every element is written.
    fill = x.new_zeros if _one_per_pair(groups) else x.new_empty
    out = fill(shape, dtype=dtype)
    if out.numel() == 0 or programs == 0:
        return out
    interpreted = common.device_traits(x.device).capability == 0
    single = x.element_size() == 4
    scattered = groups.order.numel() < _FEW * programs
    block_d = 32 if interpreted else 512 if scattered and R <= 16 and not single else 128
    block_r = 16 if interpreted else max(16, min(64, triton.next_power_of_2(R)))
    with torch.cuda.device_of(x):
        _bank_grad_kernel[(programs, cdiv(D, block_d), cdiv(R, block_r))](
            h,
            weights,
            x,
            groups.order,
            *segments,
            out,
            k,
            groups.rows,
            R,
            D,
            scaling,
            x.stride(0),
            BLOCK_M=block_d,
            BLOCK_N=block_r,
            BLOCK_K=16 if single or interpreted or scattered else 32,
            FEW=_FEW,
            COMPUTE=common.compute_dtype(x.dtype),
            num_warps=4,
            num_stages=3,
            maxnreg=224 if single else None,  # where ptxas stops at 128 it spills a few bytes
        )
    return out


def _with_unit_stride(bank: Tensor) -> Tensor:
    return bank if bank.stride(2) == 1 else bank.contiguous()
