"""Triton backend of op `nearest_key`: see `ops.nearest_key` for what is computed.

Each program streams its share of the keys past a tile of queries and keeps, for every query, the
best score and its index; a second launch takes the best of the shares. Keys are compared by
`2 q k - |k|^2` in float32, so keys whose distances differ by less than its rounding may change
places; the distance returned is then summed anew from the differences. One tile of queries sums
|k|^2 on the way; for more they are computed once, before.
"""
# ruff: noqa: N803 - kernel arguments keep the letters of the formulas
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapt_fast.triton_kernels.blocks import common
from sapt_fast.triton_kernels.blocks.common import cdiv, round_up, with_unit_column_stride
from sapt_fast.triton_kernels.blocks.key_tiles import (
    EMPTY,
    METRICS,
    checked_count,
    ordered,
    pack,
    row_squares,
    search_options,
    search_tile,
    tile_scores,
    unpack,
)
from sapt_fast.triton_kernels.blocks.plans import Results, launch, planned

_NO_KEY = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=["M", "N", "tiles_m", "keys_per_split"])
def _nearest_stream_kernel(
    query_ptr,
    keys_ptr,
    key_squares_ptr,
    best_ptr,
    M,
    N,
    D,
    tiles_m,
    keys_per_split,
    stride_qm,
    stride_kn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    METRIC: tl.constexpr,
    SUM_SQUARES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """best[s, m]: the packed best key of query m in the share s of the keys."""
    # The tiles of queries of the same keys follow each other: the L2 cache keeps the keys.
    rows = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(0) // tiles_m
    start = split * keys_per_split
    # Not start + keys_per_split, which may pass 2^31.
    stop = start + min(keys_per_split, N - start)
    # [BLOCK_M]
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    at = tl.full((BLOCK_M,), _NO_KEY, tl.int32)
    for tile in range(0, tl.cdiv(stop - start, BLOCK_N)):
        key_ids = start + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        # [BLOCK_N, BLOCK_M]: l2 without the square of the query
        scores = tile_scores(
            query_ptr, keys_ptr, None, key_squares_ptr, rows, key_ids, M, stop, D,
            stride_qm, stride_kn, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, METRIC, SUM_SQUARES, COMPUTE,
        )  # fmt: skip
        scores = tl.where((scores == scores) & (key_ids < stop)[:, None], scores, float("-inf"))
        # [BLOCK_M]: the greatest, and its lowest index; a later tile must be better
        top = tl.max(scores, axis=0)
        first = tl.min(tl.where(scores == top[None, :], key_ids[:, None], _NO_KEY), axis=0)
        at = tl.where(top > best, first, at)
        best = tl.maximum(top, best)
    # [BLOCK_M] int64
    packed = tl.where(at == _NO_KEY, EMPTY, pack(ordered(best), at))
    tl.store(best_ptr + split.to(tl.int64) * M + rows, packed, mask=rows < M)


@triton.jit(do_not_specialize=["M", "splits"])
def _nearest_merge_kernel(
    query_ptr,
    keys_ptr,
    radius_ptr,
    best_ptr,
    index_ptr,
    distance_ptr,
    nearest_ptr,
    M,
    D,
    splits,
    stride_qm,
    stride_kn,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One query: the best of the shares, its distance, and whether that is within its radius."""
    m = tl.program_id(0).to(tl.int64)
    offs_s, offs_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_K)
    # [BLOCK_S] shares at a time
    best = tl.full((BLOCK_S,), EMPTY, tl.int64)
    for s in range(0, splits, BLOCK_S):
        share = (s + offs_s).to(tl.int64)
        best = tl.maximum(best, tl.load(best_ptr + share * M + m, mask=share < splits, other=EMPTY))
    winner = tl.max(best, axis=0)
    found = winner != EMPTY
    _, at = unpack(winner)
    at = tl.where(found, at, 0)
    # [BLOCK_K]; from the differences, which the expanded square would lose
    acc = tl.zeros((BLOCK_K,), tl.float32)
    for d in range(0, D, BLOCK_K):
        mask = offs_d < D - d
        # q, k [BLOCK_K]
        q = tl.load(query_ptr + m * stride_qm + d + offs_d, mask=mask, other=0.0).to(tl.float32)
        k = tl.load(keys_ptr + at * stride_kn + d + offs_d, mask=mask, other=0.0).to(tl.float32)
        acc += (q - k) * (q - k)
    distance = tl.where(found, tl.sqrt(tl.sum(acc, axis=0)), float("inf"))
    # of a query that is infinite, or so far from its nearest key
    found = found & (distance < float("inf"))
    accepted = found & (distance <= tl.load(radius_ptr + at))
    tl.store(index_ptr + m, tl.where(accepted, at, -1))
    tl.store(distance_ptr + m, distance)
    tl.store(nearest_ptr + m, tl.where(found, at, -1))


def nearest_key_fwd(query: Tensor, keys: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest key of every query.

    Args:
        query: Of shape `[M, D]`, float32, float16 or bfloat16, any strides.
        keys: Of shape `[N, D]`, query's dtype, N < 2^31 - 1; copied unless its columns are
            adjacent in memory.
        radius: Of shape `[N]`, float32.

    Returns:
        distance `[M]` float32 to the nearest key, infinite if there is none; index `[M]` int64, -1
        where that key is farther than its radius; nearest `[M]` int64, accepted or not, -1 if
        there is none.

    Raises:
        TypeError: if query is not float32, float16 or bfloat16.
        ValueError: if the number of keys is too large.
        ValueError: if the tensors are not on a CUDA device (unless the interpreter runs).
    """
    checked_count(keys)
    common.compute_dtype(query.dtype)
    common.device_traits(query.device)
    distance, index, nearest = planned(
        "nearest_key", [query, keys, radius], [True] * 3, lambda: _nearest(query, keys, radius)
    )
    return cast(Tensor, distance), cast(Tensor, index), cast(Tensor, nearest)


def _nearest(query: Tensor, keys: Tensor, radius: Tensor) -> Results:
    """distance, index, nearest."""
    (M, D), N = query.shape, keys.shape[0]
    index = query.new_empty((M,), dtype=torch.int64)
    distance = query.new_empty((M,), dtype=torch.float32)
    nearest = query.new_empty((M,), dtype=torch.int64)
    if M == 0 or N == 0:
        return [distance.fill_(float("inf")), index.fill_(-1), nearest.fill_(-1)]
    query, keys, radius = (
        with_unit_column_stride(query), with_unit_column_stride(keys), radius.contiguous()
    )  # fmt: skip
    tile = search_tile(query, keys)
    tiles_m = cdiv(M, tile.m)
    # Four programs per multiprocessor, each at least four tiles long.
    programs = 4 * common.device_traits(query.device).num_sms
    splits = max(1, min(cdiv(programs, tiles_m), cdiv(N, 4 * tile.n)))
    keys_per_split = round_up(cdiv(N, splits), tile.n)
    splits = cdiv(N, keys_per_split)
    best = query.new_empty((splits, M), dtype=torch.int64)
    with torch.cuda.device_of(query):
        key_squares = row_squares(keys) if tiles_m > 1 else None
        launch(
            _nearest_stream_kernel,
            (tiles_m * splits,),
            query,
            keys,
            key_squares,
            best,
            M,
            N,
            D,
            tiles_m,
            keys_per_split,
            query.stride(0),
            keys.stride(0),
            **search_options(query, tile),
            METRIC=METRICS["l2"],
            SUM_SQUARES=key_squares is None,
        )
        launch(
            _nearest_merge_kernel,
            (M,),
            query,
            keys,
            radius,
            best,
            index,
            distance,
            nearest,
            M,
            D,
            splits,
            query.stride(0),
            keys.stride(0),
            BLOCK_S=128,
            BLOCK_K=512,
        )
    return [distance, index, nearest]
