"""Products into rank space: x [M, I] times lora_a [R, I], and dy [M, O] times lora_b [R, O].

The epilogues apply the mixture weights while the product is still in registers. Weights are
constant over the T = M // S rows of a sample, so a tile that meets few samples reads one weight
row per sample ("segment"); a tile that meets many gathers one weight per element. D is the
reduced dimension, I in the forward and O in the backward.

The forward serves a group of projections of one x with one launch: a row of programs per row tile
of x, one program per tile of rank columns of any member. What belongs to the member (its factor,
its h) is chosen before the loop, which therefore stays pipelined.
"""
# ruff: noqa: N803 - kernel arguments keep the letters of the formulas
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapt_fast.ops._dropout import Dropout
from sapt_fast.triton_kernels.blocks import common
from sapt_fast.triton_kernels.blocks.common import pointer_of, round_up
from sapt_fast.triton_kernels.blocks.dropout import seeds_and_drops
from sapt_fast.triton_kernels.blocks.gemm import RANK_ALIGN
from sapt_fast.triton_kernels.blocks.plans import launch
from sapt_fast.triton_kernels.blocks.row_reduction import Mixing, mixture_grad
from sapt_fast.triton_kernels.blocks.shrink_tiles import (
    MAX_GROUP,
    RANK_ARGUMENTS,
    column_block,
    member_tile,
    plan_shrink,
    rank_arguments,
    sum_of_parts,
    tile_product,
    weighted,
)

_WIDTH = 64  # columns that the backward finishes at a time: their h and gw are in registers too


@triton.jit(do_not_specialize=["parts", "drops", "M", "S", "T", "K", "tiles_r", *RANK_ARGUMENTS])
def _shrink_fwd_kernel(
    x_ptr, a_ptrs, parts_ptr,
    parts, seed_ptrs, drops, keep_scale, mixture_ptr, row_adapter_ptrs, row_scale_ptrs, h_ptrs,
    hw_ptr, M, D, S, T, K, tiles_r, rank_0, rank_1, rank_2, rank_3, rank_4, rank_5, rank_6, rank_7,
    stride_xm, stride_ar, stride_hwm,
    MEMBERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, SEGMENTS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One tile of one member's h = x a^T and hw = h * w, with zeros in the padding of its ranks.

    h is [M, Rp] for each member; hw is [M, stride_hwm] with the members side by side. With seeds, x
    is the one after dropout, but for the factor `keep_scale`, which comes into hw.
    """
    ranks_of = (rank_0, rank_1, rank_2, rank_3, rank_4, rank_5, rank_6, rank_7)
    member, R, column, tile_r = member_tile(
        tl.program_id(0) % tiles_r, ranks_of, 0, BLOCK_N, MEMBERS
    )
    hi = tl.cdiv(R, 16) * 16
    # M: BLOCK_M rows of x; N: BLOCK_N rank columns of one member; K: steps over D
    first_row = tl.program_id(0) // tiles_r * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    ranks = tile_r * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (ranks < hi)[None, :]
    # into hw [M, stride_hwm], where this member begins at `column`
    hw_offsets = rows.to(tl.int64)[:, None] * stride_hwm + (column + ranks)[None, :]
    if parts_ptr is None:
        a_ptr = pointer_of(member, a_ptrs)
        # h [BLOCK_M, BLOCK_N] = x [BLOCK_M, D] a [BLOCK_N, D]^T, float32
        h = tile_product(
            x_ptr, a_ptr, rows, ranks, M, R, 0, D, stride_xm, stride_ar,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, COMPUTE,
            seed_ptr=None if seed_ptrs is None else pointer_of(member, seed_ptrs), drops=drops,
        )  # fmt: skip
    else:
        part_size = M.to(tl.int64) * stride_hwm
        # h [BLOCK_M, BLOCK_N], of the parts that `_split_kernel` left
        h = sum_of_parts(parts_ptr, parts, hw_offsets, part_size, mask, BLOCK_M, BLOCK_N)

    # Ranks in the padding read those of rank 0: their h is zeroed below.
    safe_ranks = tl.where(ranks < R, ranks, 0)
    # [BLOCK_N] int32, float32
    adapters = tl.load(pointer_of(member, row_adapter_ptrs) + safe_ranks)
    scales = tl.load(pointer_of(member, row_scale_ptrs) + safe_ranks)
    if keep_scale is not None:
        scales *= keep_scale
    h = tl.where((ranks < R)[None, :], h, 0.0)
    h_ptr = pointer_of(member, h_ptrs)
    # into h [M, hi], hi the ranks and their padding
    h_offsets = rows.to(tl.int64)[:, None] * hi + ranks[None, :]
    # [BLOCK_M, BLOCK_N] float32: the backward needs h unrounded
    tl.store(h_ptr + h_offsets, h.to(h_ptr.dtype.element_ty), mask=mask)
    # [BLOCK_M]: the sample of each row
    samples = tl.where(rows < M, rows, 0) // T
    hw = weighted(h, mixture_ptr, adapters, scales, samples, first_row // T, S, K, SEGMENTS)
    # [BLOCK_M, BLOCK_N] in x's dtype, as the product with lora_b takes it
    tl.store(hw_ptr + hw_offsets, hw.to(hw_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "parts", "M", "R", "S", "T", "K", "tiles_r", "rank_lo", "rank_hi", "gw_lo", "gw_hi",
        "train_lo", "train_hi", "gate_start", "gate_stop",
    ]
)  # fmt: skip
def _shrink_bwd_kernel(
    dy_ptrs, b_ptrs, parts_ptr,
    parts, keep_scale, mixture_ptr, row_adapter_ptrs, row_scale_ptrs, gate_ptrs, h_ptrs, gw_ptr,
    hw_ptr, partial_ptr, M, D, R, S, T, K, tiles_r, rank_lo, rank_hi, gw_lo, gw_hi, train_lo,
    train_hi, gate_start, gate_stop, h_columns, stride_dym, stride_br, stride_hm, stride_gm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    SEGMENTS: tl.constexpr, COMPUTE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One tile of a member's g = dy b^T in the columns lo:hi, never stored itself.

    Members are alike but for their tensors. Column r of member i is column r + i (hi - lo) of each
    output. Outputs, None if unwanted:

    gw = g * w in its own columns, w taken with the scale `gate` of each rank; hw = h * w in the
    columns of the trainable rows; partial sums of scale * g * h over the rows of each segment, or
    (SEGMENTS = 0) that product for each row. All scales are times `keep_scale`, that of dropout.
    """
    lo, hi = rank_lo * 16, rank_hi * 16
    # All rank tiles of a row tile follow each other, so that its dy stays in L2.
    member_tiles = tl.program_id(0) // tiles_r
    tile_r = tl.program_id(0) % tiles_r
    tile_m, member = member_tiles // len(b_ptrs), member_tiles % len(b_ptrs)
    first_row = tile_m * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    in_rows = (rows < M)[:, None]
    row_offsets = rows.to(tl.int64)[:, None] * stride_gm
    first_rank = lo + tile_r * BLOCK_N
    ranks = first_rank + tl.arange(0, BLOCK_N)
    if parts_ptr is None:
        dy_ptr, b_ptr = pointer_of(member, dy_ptrs), pointer_of(member, b_ptrs)
        # g [BLOCK_M, BLOCK_N] = dy [BLOCK_M, D] b [BLOCK_N, D]^T, float32
        whole = tile_product(
            dy_ptr, b_ptr, rows, ranks, M, R, 0, D, stride_dym, stride_br,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, COMPUTE,
        )  # fmt: skip
    else:
        part_size = M.to(tl.int64) * stride_gm
        offsets = row_offsets + (member * (hi - lo) + ranks)[None, :]
        mask = in_rows & (ranks < hi)[None, :]
        # g [BLOCK_M, BLOCK_N], of the parts that `_split_kernel` left
        whole = sum_of_parts(parts_ptr, parts, offsets, part_size, mask, BLOCK_M, BLOCK_N)

    # [BLOCK_M]: the sample of each row; `first` is that of the tile
    samples = tl.where(rows < M, rows, 0) // T
    first = first_row // T
    # WIDTH columns of a wide tile at a time: h and gw of all of them would spill.
    WIDTH: tl.constexpr = BLOCK_N // BLOCKS
    for block in tl.static_range(BLOCKS):
        ranks = first_rank + block * WIDTH + tl.arange(0, WIDTH)
        columns = member * (hi - lo) + ranks
        # into gw, hw and partial, all of row stride stride_gm
        offsets = row_offsets + columns[None, :]
        safe_ranks = tl.where(ranks < R, ranks, 0)
        # [WIDTH] int32
        adapters = tl.load(pointer_of(member, row_adapter_ptrs) + safe_ranks)
        g = tl.where((ranks < R)[None, :], column_block(whole, block, BLOCKS), 0.0)
        # gw goes out before h comes in: both in registers at once would spill.
        if gw_ptr is not None:
            # [WIDTH]: the scale, or 0 where no gradient reaches the input
            gates = tl.load(pointer_of(member, gate_ptrs) + safe_ranks)
            if keep_scale is not None:
                gates *= keep_scale
            gates = tl.where((ranks >= gate_start) & (ranks < gate_stop), gates, 0.0)
            gw = weighted(g, mixture_ptr, adapters, gates, samples, first, S, K, SEGMENTS)
            in_gw = (ranks >= gw_lo * 16) & (ranks < gw_hi * 16)
            in_gw = in_rows & in_gw[None, :]
            # [BLOCK_M, WIDTH] in dy's dtype, in the columns of its window
            tl.store(gw_ptr + offsets, gw.to(gw_ptr.dtype.element_ty), mask=in_gw)
        if h_ptrs is not None:
            # [WIDTH]
            scales = tl.load(pointer_of(member, row_scale_ptrs) + safe_ranks)
            if keep_scale is not None:
                scales *= keep_scale
            h_offsets = rows.to(tl.int64)[:, None] * stride_hm + ranks[None, :]
            # [BLOCK_M, WIDTH]; the columns that pad R may hold anything
            in_h = in_rows & (ranks < h_columns)[None, :]
            h = tl.load(pointer_of(member, h_ptrs) + h_offsets, mask=in_h, other=0.0).to(tl.float32)
            h = tl.where((ranks < R)[None, :], h, 0.0)
            if hw_ptr is not None:
                hw = weighted(h, mixture_ptr, adapters, scales, samples, first, S, K, SEGMENTS)
                trains = (ranks >= train_lo * 16) & (ranks < train_hi * 16)
                # [BLOCK_M, WIDTH] in the columns of the rows that train
                tl.store(
                    hw_ptr + offsets, hw.to(hw_ptr.dtype.element_ty), mask=in_rows & trains[None, :]
                )
            if partial_ptr is not None:
                # [BLOCK_M, WIDTH]: what each row and rank adds to the gradient of its weight
                product = tl.where((scales == 0)[None, :], 0.0, g * h * scales[None, :])
                if SEGMENTS == 0:
                    tl.store(partial_ptr + offsets, product, mask=in_rows & (ranks < hi)[None, :])
                else:
                    sum_ptrs = partial_ptr + (tile_m * SEGMENTS).to(tl.int64) * stride_gm + columns
                    _store_sums(sum_ptrs, product, samples - first, stride_gm, ranks < hi, SEGMENTS)


@triton.jit
def _store_sums(sum_ptrs, product, segments, stride, mask, SEGMENTS: tl.constexpr):
    """Line i: the sum of product [BLOCK_M, WIDTH] over the rows of segment i."""
    for i in tl.static_range(SEGMENTS):
        inside = (segments == i)[:, None]
        # [WIDTH]
        sums = tl.sum(tl.where(inside, product, 0.0), axis=0)
        tl.store(sum_ptrs + i * stride, sums, mask=mask)


def shrink_fwd(
    x: Tensor,
    factors: Sequence[Tensor],
    mixings: Sequence[Mixing],
    hs: Sequence[Tensor],
    dropout: Dropout | None = None,
) -> list[Tensor]:
    """Fills each member's h with x @ lora_a.T and return it times the mixture weights.

    One launch serves up to `MAX_GROUP` members (two if few rows make it split the reduction).

    Args:
        x: Of shape `[M, I]`, M > 0, unit column stride.
        factors: Each member's lora_a, of shape `[R, I]`, R > 0, unit column stride, in x's dtype
            or float32.
        mixings: Each member's weights of the rows' samples, of one mixture.
        hs: Each member's h, of shape `[M, Rp]`, float32, contiguous, Rp the multiple of 16 from R
            on.
        dropout: Of x, with a seed for each member.

    Returns:
        For each member hw of shape `[M, Rp]` in x's dtype, rows aligned to 16 elements, zero in
        the columns from R on; views of one tensor if one launch made them.
    """
    dtypes = dict.fromkeys(factor.dtype for factor in factors)
    if len(factors) > MAX_GROUP or len(dtypes) > 1:
        found: dict[int, Tensor] = {}
        for dtype in dtypes:
            of_dtype = [i for i, factor in enumerate(factors) if factor.dtype == dtype]
            for start in range(0, len(of_dtype), MAX_GROUP):
                members = of_dtype[start : start + MAX_GROUP]
                hws = shrink_fwd(
                    x, [factors[i] for i in members], [mixings[i] for i in members],
                    [hs[i] for i in members], None if dropout is None else dropout.of(members),
                )  # fmt: skip
                found |= dict(zip(members, hws, strict=True))
        return [found[i] for i in range(len(factors))]

    M, D = x.shape
    row_strides = {factor.stride(0) for factor in factors if factor.shape[0] > 1} or {D}
    if len(row_strides) > 1:
        factors, row_strides = [factor.contiguous() for factor in factors], {D}
    (stride_ar,) = row_strides
    S, K = mixings[0].mixture.shape
    widths = [h.shape[1] for h in hs]
    hw = x.new_empty((M, sum(widths)))
    with torch.cuda.device_of(x):
        plan = plan_shrink([x], factors, stride_ar, None, S, backward=False, dropout=dropout)
        launch(
            _shrink_fwd_kernel, (plan.tiles_m * plan.tiles_r,),
            x, tuple(factors), plan.parts, plan.num_parts, *seeds_and_drops(dropout),
            None if dropout is None else dropout.scale, mixings[0].mixture,
            tuple(mixing.row_adapter for mixing in mixings),
            tuple(mixing.row_scale for mixing in mixings), tuple(hs), hw, M, D, S, M // S, K,
            plan.tiles_r, *rank_arguments([factor.shape[0] for factor in factors]), x.stride(0),
            stride_ar, hw.stride(0), MEMBERS=len(factors), **plan.tile.launch_options(),
            EVEN_K=D % plan.tile.k == 0, SEGMENTS=plan.segments,
            COMPUTE=common.compute_dtype(x.dtype),
        )  # fmt: skip
    return list(hw.split(widths, dim=1))


class Gate(NamedTuple):
    """The rank rows through which gradients reach the input."""

    scale: Tensor  # [R] float32: row_scale, or 0 for a row within start:stop to leave out
    start: int
    stop: int


class Upstream(NamedTuple):
    """What the backward of a projection starts from."""

    dy: Tensor  # [M, O], M > 0, unit column stride
    lora_b: Tensor  # [R, O], R > 0, unit column stride, in dy's dtype or float32
    mixing: Mixing
    gate: Gate  # which rows take part in gw; the others are zero
    h: Tensor | None  # [M, R], unit column stride; needed for hw and d_mixture

    def kind(self) -> Hashable:
        """Equal for those that one launch may serve."""
        dy, lora_b, h = self.dy, self.lora_b, self.h
        of_h = None if h is None else (h.stride(0), readable_columns(h))
        return (
            dy.shape, dy.stride(0), lora_b.shape, lora_b.stride(0), lora_b.dtype, *self.gate[1:],
            of_h,
        )  # fmt: skip


class ShrinkGrads(NamedTuple):
    """What the backward needs in rank space; None where it was not asked for."""

    gw: Tensor | None  # [M, Rp] in dy's dtype, written in the columns of its window
    hw: Tensor | None  # [M, Rp] in dy's dtype, written in the columns of the trainable rows


def shrink_bwd(
    members: Sequence[Upstream],
    gw_window: tuple[int, int] | None,
    train_window: tuple[int, int] | None,
    d_mixture: Tensor | None,
    accumulate: bool,
    keep_scale: float | None = None,
) -> list[ShrinkGrads]:
    """Returns each member's weighted g = dy @ lora_b.T and weighted h; fill or add to `d_mixture`.

    One launch serves all members (two if few rows make it split the reduction), and one more
    `d_mixture`. Windows are ranges of columns, multiples of 16. All columns of g are computed for
    `d_mixture`, otherwise those of `gw_window`.

    Args:
        members: Up to `MAX_GROUP`, of one `kind`.
        gw_window: Columns in which gw is wanted, or None.
        train_window: Columns in which hw is wanted, within `gw_window`, or None.
        d_mixture: Of shape `[S, K]`, float32, contiguous, or None where it is not wanted.
        accumulate: Add to what `d_mixture` holds.
        keep_scale: `Dropout.scale`; None without dropout.
    """
    dy, lora_b, mixing, gate, h = members[0]
    if d_mixture is None and train_window is None:
        h = None
    M, D = dy.shape
    R = lora_b.shape[0]
    S, K = mixing.mixture.shape
    gw_lo, gw_hi = gw_window or (0, 0)
    train_lo, train_hi = train_window or (0, 0)
    lo, hi = (gw_lo, gw_hi) if d_mixture is None else (0, round_up(R, RANK_ALIGN))
    columns = lo + len(members) * (hi - lo)
    gw = None if gw_window is None else dy.new_empty((M, columns))
    hw = None if train_window is None else dy.new_empty((M, columns))
    partial = None
    row_adapters = tuple(m.mixing.row_adapter for m in members)
    with torch.cuda.device_of(dy):
        dys, factors = tuple(m.dy for m in members), tuple(m.lora_b for m in members)
        plan = plan_shrink(dys, factors, lora_b.stride(0), (lo, hi), S, backward=True)
        if d_mixture is not None:
            partial_rows = plan.tiles_m * plan.segments if plan.segments else M
            partial = dy.new_empty((partial_rows, columns), dtype=torch.float32)
        launch(
            _shrink_bwd_kernel, (plan.tiles_m * plan.tiles_r,),
            dys, factors, plan.parts, plan.num_parts, keep_scale, mixing.mixture, row_adapters,
            tuple(m.mixing.row_scale for m in members), tuple(m.gate.scale for m in members),
            None if h is None else tuple(m.h for m in members), gw, hw, partial, M,
            D, R, S, M // S, K, plan.tiles_r // len(members), lo // RANK_ALIGN, hi // RANK_ALIGN,
            gw_lo // RANK_ALIGN, gw_hi // RANK_ALIGN, train_lo // RANK_ALIGN,
            train_hi // RANK_ALIGN, gate.start, gate.stop,
            0 if h is None else readable_columns(h), dy.stride(0), lora_b.stride(0),
            0 if h is None else h.stride(0), columns, **plan.tile.launch_options(),
            EVEN_K=D % plan.tile.k == 0, SEGMENTS=plan.segments,
            COMPUTE=common.compute_dtype(dy.dtype), BLOCKS=max(1, plan.tile.n // _WIDTH),
        )  # fmt: skip
        if partial is not None and d_mixture is not None:
            tile_rows = plan.tile.m if plan.segments else 1
            segments = max(plan.segments, 1)
            mixture_grad(
                partial, mixing.mixture, row_adapters, M, tile_rows, segments, d_mixture, accumulate
            )

    def views(made: Tensor | None) -> list[Tensor | None]:
        starts = range(0, len(members) * (hi - lo), hi - lo)
        return [None if made is None else made[:, i : i + hi] for i in starts]

    return [ShrinkGrads(*pair) for pair in zip(views(gw), views(hw), strict=True)]


def readable_columns(h: Tensor) -> int:
    """Columns of h that may be read: with its padding the loads are whole vectors."""
    columns = round_up(h.shape[1], RANK_ALIGN)
    last = h.storage_offset() + (h.shape[0] - 1) * h.stride(0) + columns
    padded = h.stride(0) >= columns and last <= h.untyped_storage().nbytes() // h.element_size()
    return columns if padded else h.shape[1]
