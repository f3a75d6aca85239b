"""What the kernels of `shrink` share: their tiles, the product, and its split into parts."""
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
    RANK_ALIGN,
    DeviceTraits,
    TileConfig,
    cdiv,
    fitted,
    pointer_of,
    round_up,
)
from sapt_fast.triton_kernels.blocks.dropout import keeps, seeds_and_drops
from sapt_fast.triton_kernels.blocks.plans import launch

_MAX_SEGMENTS = 4
_MOST_ROWS = 128  # of a tile
_LEAST_STEPS = 2  # of a part of the reduction: d 1024 in up to 8 parts

MAX_GROUP = 8
"""Projections that one launch of the forward serves at most."""


@triton.jit
def member_tile(tile, ranks, lo, BLOCK_N: tl.constexpr, MEMBERS: tl.constexpr):
    """Member, its total rank, its first column among all members' and the tile within it.

    Columns of a member start at `lo` and are padded to a multiple of 16.
    """
    member, begin, column, first, first_column, R = 0, 0, 0, 0, 0, ranks[0]
    for i in tl.static_range(1, MEMBERS):
        width = tl.cdiv(ranks[i - 1], 16) * 16 - lo
        begin += tl.cdiv(width, BLOCK_N)
        column += width
        if tile >= begin:
            member, first, first_column, R = i, begin, column, ranks[i]
    return member, R, first_column, tile - first


@triton.jit
def tile_product(
    x_ptr,
    a_ptr,
    rows,
    ranks,
    M,
    R,
    k_start,
    k_stop,
    stride_xm,
    stride_ar,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    stride_ak=1,
    PRECISION: tl.constexpr = "ieee",
    seed_ptr=None,
    drops=None,
):
    """x[rows, k_start:k_stop] a[ranks, k_start:k_stop]^T, float32; k_stop > k_start.

    With a seed, of x after dropout, without the factor of what is kept.
    """
    tl.assume(k_stop > k_start)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows and ranks past the end are not read, and are zero in the product.
    in_rows, in_ranks = (rows < M)[:, None], (ranks < R)[None, :]
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_xm + (k_start + offs_k)[None, :]
    steps_of_a = (k_start + offs_k).to(tl.int64) * stride_ak
    a_ptrs = a_ptr + ranks.to(tl.int64)[None, :] * stride_ar + steps_of_a[:, None]
    # [BLOCK_M, BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    seed = 0 if seed_ptr is None else tl.load(seed_ptr)
    for k in range(k_start, k_stop, BLOCK_K):
        if EVEN_K:
            # x [BLOCK_M, BLOCK_K], a [BLOCK_K, BLOCK_N]
            x = tl.load(x_ptrs, mask=in_rows, other=0.0)
            a = tl.load(a_ptrs, mask=in_ranks, other=0.0)
        else:
            x = tl.load(x_ptrs, mask=in_rows & (offs_k[None, :] < k_stop - k), other=0.0)
            a = tl.load(a_ptrs, mask=in_ranks & (offs_k[:, None] < k_stop - k), other=0.0)
        if seed_ptr is not None:
            x = tl.where(keeps(seed, rows, k + offs_k, drops), x, 0.0)
        # [BLOCK_M, BLOCK_K] [BLOCK_K, BLOCK_N]; "ieee": float32 is not cut to tf32
        acc = tl.dot(x.to(COMPUTE), a.to(COMPUTE), acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        a_ptrs += BLOCK_K * stride_ak
    return acc


@triton.jit
def column_block(tile, number: tl.constexpr, COUNT: tl.constexpr):
    """The columns of a tile that are its part `number` of COUNT equal ones; COUNT is 1, 2 or 4."""
    if COUNT > 1:
        left, right = _halves(tile)
        tile = left if 2 * number < COUNT else right
    if COUNT > 2:
        left, right = _halves(tile)
        tile = left if number % 2 == 0 else right
    return tile


@triton.jit
def _halves(tile):
    """The left and the right columns of a tile; a matrix unit's threads have some of both."""
    halves = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(halves, (0, 2, 1)))


@triton.jit
def _product_or_zero(value, by):
    """value * by; 0 where `by` is, even of an infinity or a NaN."""
    return tl.where(by == 0, 0.0, value * by)


@triton.jit
def _coefficient(value, by):
    """value * by; +0 where `by` is 0, while a product of 0 is -0: see `present.is_absent`."""
    product = value * by
    return tl.where(by == 0, 0.0, tl.where(product == 0, -0.0, product))


@triton.jit
def weighted(tile, mixture_ptr, adapters, scales, samples, first, S, K, SEGMENTS: tl.constexpr):
    """tile * mixture[sample, adapter] * scale; SEGMENTS = 0 gathers, else samples per tile.

    Where the mixture or the scale is exactly 0 the result is +0, whatever the tile holds.
    """
    if SEGMENTS == 0:
        # [BLOCK_M, BLOCK_N]: a weight for each element
        offsets = samples.to(tl.int64)[:, None] * K + adapters[None, :]
        weights = _product_or_zero(scales[None, :], tl.load(mixture_ptr + offsets))
        return _coefficient(tile, weights)
    # [BLOCK_N]: the weights of the first sample serve all rows
    weights = tl.load(mixture_ptr + first.to(tl.int64) * K + adapters)
    result = _coefficient(tile, _product_or_zero(scales, weights)[None, :])
    for i in tl.static_range(1, SEGMENTS):
        sample = tl.minimum(first + i, S - 1)
        weights = tl.load(mixture_ptr + sample.to(tl.int64) * K + adapters)
        # [BLOCK_M, BLOCK_N], taken in the rows of sample first + i
        own = _coefficient(tile, _product_or_zero(scales, weights)[None, :])
        result = tl.where((samples == first + i)[:, None], own, result)
    return result


@triton.jit
def sum_of_parts(
    parts_ptr, parts, offsets, part_size, mask, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Sum of the partial products that `_split_kernel` left, in their order."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    part_ptrs = parts_ptr + offsets
    for _ in tl.range(parts, loop_unroll_factor=4):
        # [BLOCK_M, BLOCK_N] float32
        acc += tl.load(part_ptrs, mask=mask, other=0.0)
        part_ptrs += part_size
    return acc


RANK_ARGUMENTS = [f"rank_{i}" for i in range(MAX_GROUP)]
"""Names of the members' total ranks: scalars, since the elements of a tuple are specialised, and
a pool that grows must not recompile."""


@triton.jit(do_not_specialize=["drops", "M", "steps", "tiles_r", "rank_lo", *RANK_ARGUMENTS])
def _split_kernel(
    x_ptrs,
    a_ptrs,
    parts_ptr,
    seed_ptrs,
    drops,
    M,
    D,
    steps,
    tiles_r,
    rank_lo,
    rank_0,
    rank_1,
    rank_2,
    rank_3,
    rank_4,
    rank_5,
    rank_6,
    rank_7,
    stride_xm,
    stride_ar,
    stride_ak,
    stride_pm,
    MEMBERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    EVEN_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Part s = program axis 1 of x a^T into parts[s, M, stride_pm]: more programs for few tiles.

    The members may have one x or one each.
    """
    ranks_of = (rank_0, rank_1, rank_2, rank_3, rank_4, rank_5, rank_6, rank_7)
    lo = rank_lo * 16
    member, R, column, tile_r = member_tile(
        tl.program_id(0) % tiles_r, ranks_of, lo, BLOCK_N, MEMBERS
    )
    x_ptr, a_ptr = pointer_of(member, x_ptrs), pointer_of(member, a_ptrs)
    if EVEN_R:  # where a is contiguous along them, its loads are whole vectors for that
        R = R // 16 * 16
    # [BLOCK_M]; ranks [BLOCK_N]
    rows = tl.program_id(0) // tiles_r * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = lo + tile_r * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    # this part of the reduced dimension
    k_start = part * steps * BLOCK_K
    k_stop = min(k_start + steps * BLOCK_K, D)
    # [BLOCK_M, BLOCK_N]
    acc = tile_product(
        x_ptr, a_ptr, rows, ranks, M, R, k_start, k_stop, stride_xm, stride_ar,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, COMPUTE, stride_ak, PRECISION,
        None if seed_ptrs is None else pointer_of(member, seed_ptrs), drops,
    )  # fmt: skip
    mask = (rows < M)[:, None] & (ranks < tl.cdiv(R, 16) * 16)[None, :]
    offsets = (part.to(tl.int64) * M + rows[:, None]) * stride_pm + (column + ranks)[None, :]
    # [BLOCK_M, BLOCK_N] float32, of parts [s, M, stride_pm]
    tl.store(parts_ptr + offsets, acc, mask=mask)


def _shrink_config(
    traits: DeviceTraits,
    itemsizes: tuple[int, int],  # of x and of the factors
    M: int,
    widths: Sequence[int],
    segments: int,
    backward: bool,
) -> TileConfig:
    """Returns the tile for members of so many columns each, of no more shared memory than is.

    `segments` are those of a tile of `_MOST_ROWS` rows.
    """
    tile = _wanted_tile(traits, itemsizes[0], M, widths, segments, backward)
    return tile if traits.capability == 0 else fitted(tile, traits.shared, *itemsizes)


def _wanted_tile(
    traits: DeviceTraits,
    itemsize: int,
    M: int,
    widths: Sequence[int],
    segments: int,
    backward: bool,
) -> TileConfig:
    columns = max(widths)
    if traits.capability == 0:
        return TileConfig(16, 16 if columns <= 16 else 32, 32, num_warps=4, num_stages=1)
    block_n = max(16, min(64, triton.next_power_of_2(columns)))
    if itemsize == 4:
        # Of 64 columns a step takes 1024 cycles or more: one hides a load, and a third would spill.
        return TileConfig(64, block_n, 32, num_warps=4, num_stages=2 if block_n == 64 else 3)
    gathers = segments == 0 or (segments > 2 and not backward)
    if gathers and traits.capability in (100, 103):
        # There a thread has half a row, and beside it the weights of each sample would spill.
        return TileConfig(64, block_n, 64, num_warps=8, num_stages=4)
    if segments > 0 and traits.capability < 120:
        # The larger the tile, the less traffic; but each multiprocessor should get one.
        for wide in _wide(traits, columns, segments, backward):
            if _fills(traits, cdiv(M, _MOST_ROWS) * _tiles(widths, wide)):
                return TileConfig(_MOST_ROWS, wide, 64, num_warps=8, num_stages=3)
        if _fills(traits, cdiv(M, _MOST_ROWS) * _tiles(widths, block_n)):
            return TileConfig(_MOST_ROWS, block_n, 64, num_warps=8, num_stages=4)
    return TileConfig(64, block_n, 64, num_warps=4, num_stages=4)


def _wide(traits: DeviceTraits, columns: int, segments: int, backward: bool) -> list[int]:
    """Widths above 64 that a tile of 128 rows may have, in 16 bit, the best first."""
    # The backward would spill where its rows are of several samples.
    if (segments > 1) if backward else (traits.capability != 90):
        return []
    # Past their end, matrix instructions multiply zeros: no more than a quarter of them.
    widths = [256] if backward and 4 * round_up(columns, 256) <= 5 * columns else []
    widths += [128] if columns > 64 else []
    return [n for n in widths if 3 * 64 * 2 * (128 + n) <= traits.shared]


def _fills(traits: DeviceTraits, tiles: int) -> bool:
    return 10 * tiles >= 9 * traits.num_sms


def segments_of(block_m: int, S: int, T: int) -> int:
    """Samples that a tile of rows meets at most, rounded up to 1, 2 or 4; 0 for more."""
    if S == 1 or T % block_m == 0:
        return 1
    most = min(S, block_m // T if block_m % T == 0 else (block_m + T - 2) // T + 1)
    return 0 if most > _MAX_SEGMENTS else triton.next_power_of_2(most)


class Plan(NamedTuple):
    """How a shrink is cut into programs."""

    tile: TileConfig
    tiles_m: int
    tiles_r: int  # of all members
    segments: int  # 0 gathers the weights
    parts: Tensor | None  # partial products over parts of the reduction, if it was split
    num_parts: int


def plan_shrink(
    xs: Sequence[Tensor],
    factors: Sequence[Tensor],
    stride_ar: int,
    window: tuple[int, int] | None,
    S: int,
    backward: bool,
    dropout: Dropout | None = None,
) -> Plan:
    """Choose the tile; with few tiles, split the reduction and compute its parts (>= 2 steps).

    `xs` are of one shape and row stride, one for all factors or one each. Rows of all factors are
    `stride_ar` elements apart. `window` restricts the columns of factors of one rank; those of the
    parts then begin at window[0] as well. `dropout` has a seed for each factor.
    """
    x = xs[0]
    M, D = x.shape
    T = M // S
    ranks = [factor.shape[0] for factor in factors]
    first = 0
    if window is not None:
        first, ranks = window[0], [min(window[1], rank) for rank in ranks]
    widths = [round_up(rank, RANK_ALIGN) - first for rank in ranks]
    columns = first + sum(widths)
    traits = common.device_traits(x.device)
    sizes = x.element_size(), factors[0].element_size()
    segments = segments_of(_MOST_ROWS, S, T)
    tile = _shrink_config(traits, sizes, M, widths, segments, backward=backward)
    if dropout is not None and 0 < traits.capability < 90 and tile.m == _MOST_ROWS:
        tile = tile._replace(m=64, num_warps=4)  # beside the masks 128 rows would spill
    if dropout is not None and traits.capability and D % RANK_ALIGN:
        tile = tile._replace(k=32)  # elements loaded one by one take registers beside their masks
    tiles_r = _tiles(widths, tile.n)
    steps = cdiv(D, tile.k)
    num_parts = min(traits.num_sms // (cdiv(M, tile.m) * tiles_r), steps // _LEAST_STEPS)
    parts = None
    if num_parts > 1:
        parts = products_in_parts(
            xs, factors, (stride_ar, 1), (first, ranks), columns, tile._replace(parts=num_parts),
            dropout=dropout,
        )  # fmt: skip
        num_parts = parts.shape[0]
        # What remains has no matrix product: short tiles give it more programs, and a thread loads
        # four sums at a time.
        tile = tile._replace(m=16, num_warps=tile.n // 8)
    return Plan(tile, cdiv(M, tile.m), tiles_r, segments_of(tile.m, S, T), parts, num_parts)


def products_in_parts(
    xs: Sequence[Tensor],
    factors: Sequence[Tensor],
    strides: tuple[int, int],
    window: tuple[int, Sequence[int]],
    columns: int,
    tile: TileConfig,
    precision: str = "ieee",
    dropout: Dropout | None = None,
) -> Tensor:
    """Returns x @ factor.T of all factors side by side, in partial sums over the columns of x.

    Args:
        xs: Of shape `[M, D]`, unit column stride, of one row stride; one for all factors, or each.
        factors: Of shape `[R, D]`.
        strides: Elements from one row of a factor to the next, and from one column to the next.
        window: First row of the factors that takes part, a multiple of 16, and of each factor the
            row behind the last.
        columns: Of the result: the rows of all factors, each rounded up to a multiple of 16.
        tile: Its parts are the most that there will be.
        precision: As of `tl.dot`.
        dropout: Of x, with a seed for each factor.

    Returns:
        Of shape `[parts, M, columns]`, float32; written in the columns of the window.
    """
    x = xs[0]
    (M, D), (first, ranks) = x.shape, window
    steps = cdiv(D, tile.k)
    steps_per_part = cdiv(steps, tile.parts)
    parts = x.new_empty((cdiv(steps, steps_per_part), M, columns), dtype=torch.float32)
    tiles_r = _tiles([round_up(rank, RANK_ALIGN) - first for rank in ranks], tile.n)
    launch(
        _split_kernel, (cdiv(M, tile.m) * tiles_r, parts.shape[0]),
        tuple(xs), tuple(factors), parts, *seeds_and_drops(dropout), M, D, steps_per_part,
        tiles_r, first // RANK_ALIGN,
        *rank_arguments(ranks), x.stride(0), *strides, columns, MEMBERS=len(factors),
        **tile.launch_options(), EVEN_K=D % tile.k == 0, COMPUTE=common.compute_dtype(x.dtype),
        EVEN_R=strides[1] != 1 and all(rank % 16 == 0 for rank in ranks), PRECISION=precision,
    )  # fmt: skip
    return parts


def _tiles(widths: Sequence[int], block_n: int) -> int:
    return sum(cdiv(width, block_n) for width in widths)


def rank_arguments(ranks: Sequence[int]) -> list[int]:
    return [*ranks, *[0] * (MAX_GROUP - len(ranks))]
