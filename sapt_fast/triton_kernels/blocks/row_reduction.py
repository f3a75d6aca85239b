"""Sums over rows: gradients of the mixture weights and of the adapters' factors.

Both are two deterministic steps: partial sums per tile, then their sum in a fixed order. Atomic
additions would cost more traffic and change from run to run.
"""
# ruff: noqa: N803 - kernel arguments keep the letters of the formulas
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapt_fast.ops._dropout import Dropout
from sapt_fast.triton_kernels.blocks import common
from sapt_fast.triton_kernels.blocks.common import (
    DeviceTraits,
    TileConfig,
    cdiv,
    pointer_of,
    round_up,
)
from sapt_fast.triton_kernels.blocks.dropout import keeps, seeds_and_drops
from sapt_fast.triton_kernels.blocks.gemm import RANK_ALIGN, is_aligned
from sapt_fast.triton_kernels.blocks.plans import launch
from sapt_fast.triton_kernels.blocks.present import is_absent


@triton.jit(do_not_specialize=["S", "T", "K", "R", "tile_rows", "segments", "width"])
def _mixture_grad_kernel(
    partial_ptr,
    row_adapter_ptrs,
    mixture_ptr,
    d_mixture_ptr,
    S,
    T,
    K,
    R,
    tile_rows,
    segments,
    width,
    stride_pm,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """d_mixture[s, k] = [d_mixture[s, k] +] the sum of partial over members, tiles and ranks.

    The tiles are those that meet sample s, the ranks those of adapter k; a member has `width`
    columns of partial. Where mixture[s, k] is exactly 0, the sum of a member that is not finite
    counts as 0.

    Tile t covers rows t * tile_rows and on; its segment i, row t * segments + i of partial,
    belongs to sample t * tile_rows // T + i. The order of the sum is fixed.
    """
    k = tl.program_id(0) % K
    samples = tl.program_id(0) // K * BLOCK_S + tl.arange(0, BLOCK_S)
    safe_samples = tl.where(samples < S, samples, 0)
    # [BLOCK_S]: the tiles that meet each sample
    first_tile = safe_samples * T // tile_rows
    last_tile = ((safe_samples + 1) * T - 1) // tile_rows
    d_mixture_ptrs = d_mixture_ptr + samples.to(tl.int64) * K + k
    # [BLOCK_S]
    weights = tl.load(mixture_ptr + samples.to(tl.int64) * K + k, mask=samples < S, other=0.0)
    total = tl.zeros((BLOCK_S,), tl.float32)
    if ACCUMULATE:
        total += tl.load(d_mixture_ptrs, mask=samples < S, other=0.0)
    for member in tl.static_range(len(row_adapter_ptrs)):
        # Ranks start:stop are those of adapter k: adapters ascend with the rank rows.
        start = 0
        stop = 0
        for r in range(0, R, 1024):
            rows = r + tl.arange(0, 1024)
            adapters = tl.load(row_adapter_ptrs[member] + rows, mask=rows < R, other=2147483647)
            start += tl.sum((adapters < k).to(tl.int32), axis=0)
            stop += tl.sum((adapters <= k).to(tl.int32), axis=0)
        # [BLOCK_S, BLOCK_T]
        acc = tl.zeros((BLOCK_S, BLOCK_T), tl.float32)
        for t in range(0, (T + tile_rows - 2) // tile_rows + 1, BLOCK_T):
            # [BLOCK_S, BLOCK_T]: tile, and the segment in it that belongs to the sample
            tiles = first_tile[:, None] + (t + tl.arange(0, BLOCK_T))[None, :]
            segment = safe_samples[:, None] - tiles * tile_rows // T
            row_ptrs = partial_ptr + (tiles * segments + segment).to(tl.int64) * stride_pm
            in_sample = tiles <= last_tile[:, None]
            for r in range(start, stop, BLOCK_R):
                ranks = r + tl.arange(0, BLOCK_R)
                mask = in_sample[:, :, None] & (ranks < stop)[None, None, :]
                columns = (member * width + ranks)[None, None, :]
                # [BLOCK_S, BLOCK_T, BLOCK_R]
                values = tl.load(row_ptrs[:, :, None] + columns, mask=mask, other=0.0)
                acc += tl.sum(values, axis=2)
        # [BLOCK_S]
        own = tl.sum(acc, axis=1)
        finite = tl.abs(own) < float("inf")
        total += tl.where((weights == 0) & (finite == 0), 0.0, own)
    # [BLOCK_S]: column k of d_mixture [S, K]
    tl.store(d_mixture_ptrs, total, mask=samples < S)


@triton.jit
def _sum_over_rows(
    p_ptr, x_ptr, ranks, features, in_ranks, in_features, m_start, m_stop, stride_pm, stride_xm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr,
    seed_ptr=None, drops=None,
):  # fmt: skip
    """x[m_start:m_stop, features]^T p[m_start:m_stop, ranks], of x after dropout with a seed."""
    offs_m = tl.arange(0, BLOCK_K)
    rows = (m_start + offs_m).to(tl.int64)
    p_ptrs = p_ptr + rows[:, None] * stride_pm + ranks[None, :]
    x_ptrs = x_ptr + rows[None, :] * stride_xm + features[:, None]
    # [BLOCK_M features, BLOCK_N ranks]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    seed = 0 if seed_ptr is None else tl.load(seed_ptr)
    for m in range(m_start, m_stop, BLOCK_K):
        in_part = offs_m < m_stop - m
        # p [BLOCK_K, BLOCK_N], x^T [BLOCK_M, BLOCK_K]
        p = tl.load(p_ptrs, mask=in_part[:, None] & in_ranks[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=in_part[None, :] & in_features[:, None], other=0.0)
        if seed_ptr is not None:
            x = tl.where(tl.trans(keeps(seed, m + offs_m, features, drops)), x, 0.0)
        # x^T p, summed over rows
        acc = tl.dot(x.to(COMPUTE), p.to(COMPUTE), acc, input_precision="ieee")
        p_ptrs += BLOCK_K * stride_pm
        x_ptrs += BLOCK_K * stride_xm
    return acc


@triton.jit(
    do_not_specialize=[
        "drops", "M", "rows_per_part", "first_group", "start", "stop", "out_row", "out_rows",
        "part_size",
    ]
)  # fmt: skip
def _factor_grad_kernel(
    p_ptrs, x_ptrs, out_ptrs, parts_ptr, seed_ptrs, drops,
    M, even_width, odd_width, rows_per_part, first_group, start, stop, out_row, out_rows, part_size,
    stride_pm, even_stride, odd_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Part s = program axis 2 of p[:, start:stop]^T x of each product, over p not 0.

    Products alternate: those of even number have an x [M, even_width], the others one
    [M, odd_width]. With seeds, one for a pair, those of even number take x after dropout. A result
    goes into the rows from `out_row` on of out [out_rows, width], or, if there are parts, into
    their place in parts[s, part_size], where the outs follow each other.

    The tile is [features, ranks]: the matrix instruction wants 64 rows, and the features have
    them where a single adapter has 4 ranks. Columns of p are read from `first_group` * 16 <=
    start on, so that loads stay aligned for any start.
    """
    even_tiles = tl.cdiv(even_width, BLOCK_M)
    both_tiles = even_tiles + tl.cdiv(odd_width, BLOCK_M)
    pair, tile = tl.program_id(0) // both_tiles, tl.program_id(0) % both_tiles
    is_odd = tile >= even_tiles
    product = 2 * pair + is_odd.to(tl.int32)
    p_ptr, x_ptr = pointer_of(product, p_ptrs), pointer_of(product, x_ptrs)
    N, stride_xm, before = even_width, even_stride, pair * (even_width + odd_width)
    if is_odd:
        N, stride_xm, before = odd_width, odd_stride, before + even_width
        tile -= even_tiles
    features = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = first_group * 16 + tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    # this part of the rows; a part is never empty
    m_start = part * rows_per_part
    m_stop = min(m_start + rows_per_part, M)
    tl.assume(m_stop > m_start)
    in_ranks, in_features = ranks < tl.cdiv(stop, 16) * 16, features < N
    seed_ptr = None if seed_ptrs is None else pointer_of(pair, seed_ptrs)
    # [BLOCK_M features, BLOCK_N ranks]
    if seed_ptrs is None:
        acc = _sum_over_rows(
            p_ptr, x_ptr, ranks, features, in_ranks, in_features, m_start, m_stop, stride_pm,
            stride_xm, BLOCK_M, BLOCK_N, BLOCK_K, COMPUTE,
        )  # fmt: skip
    else:
        if is_odd:  # loops of their own, without a branch inside
            acc = _sum_over_rows(
                p_ptr, x_ptr, ranks, features, in_ranks, in_features, m_start, m_stop, stride_pm,
                stride_xm, BLOCK_M, BLOCK_N, BLOCK_K, COMPUTE,
            )  # fmt: skip
        else:
            acc = _sum_over_rows(
                p_ptr, x_ptr, ranks, features, in_ranks, in_features, m_start, m_stop, stride_pm,
                stride_xm, BLOCK_M, BLOCK_N, BLOCK_K, COMPUTE, seed_ptr, drops,
            )  # fmt: skip
    in_range = (ranks >= start) & (ranks < stop)
    undefined = ((acc != acc) & in_range[None, :]).to(tl.int32)
    if tl.max(tl.max(undefined, axis=1), axis=0) > 0:
        # Once more without the rows without weight: an infinity there is no part of the sum.
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        p_row = p_ptr + m_start.to(tl.int64) * stride_pm + ranks
        x_row = x_ptr + m_start.to(tl.int64) * stride_xm + features
        for m in tl.range(m_start, m_stop, num_stages=1):
            # p [1, BLOCK_N], x [BLOCK_M, 1]: one row at a time
            p = tl.load(p_row, mask=in_range, other=0.0).to(tl.float32)[None, :]
            x = tl.load(x_row, mask=features < N, other=0.0).to(tl.float32)[:, None]
            if seed_ptrs is not None:
                row = m + tl.arange(0, 1)
                stays = keeps(tl.load(seed_ptr), row, features, drops) | is_odd
                x = tl.where(tl.trans(stays), x, 0.0)
            acc += tl.where(is_absent(p), 0.0, x * p)
            p_row += stride_pm
            x_row += stride_xm
    mask = in_range[None, :] & in_features[:, None]
    out_offsets = (out_row + ranks - start).to(tl.int64)[None, :] * N + features[:, None]
    # [BLOCK_M, BLOCK_N], transposed into out [out_rows, N]
    if parts_ptr is None:
        out_ptr = pointer_of(product, out_ptrs)
        tl.store(out_ptr + out_offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        out_offsets += part.to(tl.int64) * part_size + before.to(tl.int64) * out_rows
        tl.store(parts_ptr + out_offsets, acc, mask=mask)


@triton.jit(do_not_specialize=["parts"])
def _sum_parts_kernel(parts_ptr, out_ptrs, parts, even_size, odd_size, BLOCK: tl.constexpr):
    """Each out = sum of its columns of parts[parts, sizes of all outs] over its first axis.

    Outs alternate between two sizes.
    """
    number = tl.program_id(1)
    size, before = even_size, number // 2 * (even_size + odd_size)
    if number % 2 == 1:
        size, before = odd_size, before + even_size
    total = len(out_ptrs) // 2 * (even_size + odd_size) + len(out_ptrs) % 2 * even_size
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    part_ptrs = parts_ptr + before + offsets
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        # [BLOCK]; the order of the sum is fixed
        acc += tl.load(part_ptrs, mask=mask, other=0.0)
        part_ptrs += total
    out_ptr = pointer_of(number, out_ptrs)
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


class Mixing(NamedTuple):
    """Mixture weights and what each rank row belongs to; see `ops.mixed_lora`."""

    mixture: Tensor  # [S, K] float32, contiguous
    row_adapter: Tensor  # [R] int32
    row_scale: Tensor  # [R] float32


def mixture_grad(
    partial: Tensor,
    mixture: Tensor,
    row_adapters: tuple[Tensor, ...],
    M: int,
    tile_rows: int,
    segments: int,
    d_mixture: Tensor,
    accumulate: bool,
) -> None:
    """Writes or add the gradient of the mixture, from the partial sums of `shrink_bwd`.

    Args:
        partial: Of shape `[tiles * segments, members * Rp]`, float32: per tile and segment, the sum
            over rows of scale * g * h of each member.
        mixture: Of shape `[S, K]`, float32, contiguous.
        row_adapters: Of each member, of shape `[R]`.
        M: Number of rows, S divides it.
        tile_rows: Rows of a tile; 1 when `partial` holds one line per row.
        segments: Lines of a tile, one per sample that it meets.
        d_mixture: Of shape `[S, K]`, float32, contiguous.
        accumulate: Add to what `d_mixture` holds.
    """
    S, K = mixture.shape
    T = M // S
    tiles_per_sample = (T + tile_rows - 2) // tile_rows + 1
    block_t = 1 if tiles_per_sample <= 2 else 8 if tiles_per_sample <= 8 else 64
    block_s = 64 // block_t
    columns = partial.shape[1]
    launch(
        _mixture_grad_kernel, (cdiv(S, block_s) * K,),
        partial, row_adapters, mixture, d_mixture, S, T, K, row_adapters[0].shape[0], tile_rows,
        segments, columns // len(row_adapters), columns,
        BLOCK_S=block_s, BLOCK_T=block_t, BLOCK_R=16, ACCUMULATE=accumulate,
    )  # fmt: skip


def sum_parts(parts: Tensor, outs: Sequence[Tensor]) -> None:
    """Fills `outs` with sums over the first axis of `parts`, float32; all contiguous.

    Args:
        parts: Of shape `[n, elements of all outs]`, in which the outs follow each other.
        outs: Up to 2 * `MAX_GROUP`, the even ones of one size, the odd ones of one size.
    """
    even, odd = outs[0].numel(), outs[-1].numel()
    launch(
        _sum_parts_kernel, (cdiv(max(even, odd), 1024), len(outs)),
        parts, tuple(outs), parts.shape[0], even, odd, BLOCK=1024,
    )  # fmt: skip


def _factor_config(
    traits: DeviceTraits, itemsize: int, ranks: int, *, aligned: bool, drops: bool
) -> TileConfig:
    """Features, ranks and rows of a step; `aligned` where rows of x begin at whole vectors."""
    if traits.capability == 0:
        return TileConfig(32, 16, 16, num_warps=4, num_stages=1)
    block_n = max(16, min(64, triton.next_power_of_2(ranks)))
    if itemsize == 4:
        return TileConfig(64, block_n, 32, num_warps=4, num_stages=3)
    # Loaded by element, a thread's 64 addresses would spill, and 32 beside their masks.
    rows = 64 if aligned else 16 if drops else 32
    return TileConfig(128, block_n, rows, num_warps=4, num_stages=4)


def factor_grads(
    ps: Sequence[Tensor],
    xs: Sequence[Tensor],
    rows: list[tuple[int, int]],
    dtype: torch.dtype,
    dropout: Dropout | None = None,
) -> list[Tensor]:
    """Returns p[:, start:stop].T @ x for each range of rows, stacked: shape `[Rt, N]`, `dtype`.

    One launch serves all products, for each range; one more adds their parts.

    Args:
        ps: Up to 2 * `MAX_GROUP` of shape `[M, Rp]`, unit column stride, of one row stride, a
            multiple of 16, M > 0; their columns outside the ranges may hold anything.
        xs: Of each product, of shape `[M, N]`, unit column stride, in p's dtype. Those of even
            number have one N and stride, the others one N and stride.
        rows: Ascending disjoint ranges within Rp.
        dtype: Of the result; sums are float32.
        dropout: Of the xs of even number, with a seed for each; the factor of what is kept belongs
            to their ps.
    """
    M = xs[0].shape[0]
    even, odd = xs[0].shape[1], xs[1].shape[1]
    count = sum(stop - start for start, stop in rows)
    outs = [x.new_empty((count, x.shape[1]), dtype=dtype) for x in xs]
    if even + odd == 0:
        return outs
    traits = common.device_traits(xs[0].device)
    size = count * (even + odd) * (len(xs) // 2)
    first_groups = [start // RANK_ALIGN for start, _ in rows]
    width = max(s - g * RANK_ALIGN for (_, s), g in zip(rows, first_groups, strict=True))
    aligned, drops = all(map(is_aligned, xs[:2])), dropout is not None
    tile = _factor_config(traits, xs[0].element_size(), width, aligned=aligned, drops=drops)
    grid = (len(xs) // 2 * (cdiv(even, tile.m) + cdiv(odd, tile.m)), cdiv(width, tile.n))
    # Two programs per multiprocessor, each at least eight steps long.
    num_parts = min(2 * traits.num_sms // (grid[0] * grid[1]), cdiv(M, 8 * tile.k))
    rows_per_part = round_up(cdiv(M, max(num_parts, 1)), tile.k)
    num_parts = cdiv(M, rows_per_part)
    done = 0
    with torch.cuda.device_of(xs[0]):
        parts = None
        if num_parts > 1:
            parts = xs[0].new_empty((num_parts, size), dtype=torch.float32)
        for (start, stop), first_group in zip(rows, first_groups, strict=True):
            launch(
                _factor_grad_kernel, (*grid, num_parts),
                tuple(ps), tuple(xs), tuple(outs), parts, *seeds_and_drops(dropout), M, even, odd,
                rows_per_part, first_group, start, stop, done, count, size, ps[0].stride(0),
                xs[0].stride(0), xs[1].stride(0),
                **tile.launch_options(), COMPUTE=common.compute_dtype(xs[0].dtype),
            )  # fmt: skip
            done += stop - start
        if parts is not None:
            sum_parts(parts, outs)
    return outs
