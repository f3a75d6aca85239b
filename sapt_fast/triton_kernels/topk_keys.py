"""Triton backend of op `topk_keys`: see `ops.topk_keys` for what is computed.

A matrix product of tiles of keys and queries stores, for each query, the greatest score of every
group of adjacent keys. Of each query the k groups with the greatest maxima are chosen, the scores
of their keys are computed again, and the k best of these are the result. This is exact:

    Order the keys by score, ties by lower index, and the groups by maximum, ties by lower index.
    Let a key t lie in a group g, and let k other groups come before g. Each has a key that scores
    at least as much as its group's maximum, so at least as much as t; if it ties with t, its group
    is lower than g, and so is its index. Then k keys come before t: it is not one of the k best.

Both times a score is the same element-wise sum in the same order, so that it has the same bits: the
tile has the same sizes, and an element of a product depends on its own row and column alone. NaN
counts as the lowest score. Where few keys would be spared, a group is one key and nothing is
computed again. An l2 score is expanded, `2 q k - |k|^2 - |q|^2` in float32: its error is about 1e-7
(|q|^2 + |k|^2). Where one of these squares is infinite or overflows, it is NaN.
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
from sapt_fast.triton_kernels.blocks.common import cdiv, with_unit_column_stride
from sapt_fast.triton_kernels.blocks.key_tiles import (
    EMPTY,
    LOWEST,
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

# Keys of a group, and groups per chosen one from which choosing pays: a key that is scored again
# is read for one query alone. The interpreter has few keys.
_GROUP, _GROUPS_PER_CHOSEN = (8, 2) if common.INTERPRETED else (32, 64)
# Bytes of the scores or maxima of as many queries as are searched at a time.
_SCRATCH_BYTES = 1 << 26
# Pairs that the selection keeps, torch selects more, and that it sorts at a time. The interpreter
# sorts slowly.
_KEPT = (8,) if common.INTERPRETED else (32, 64)
_SORTED = 16 if common.INTERPRETED else 512


@triton.jit(do_not_specialize=["M", "N", "tiles_m", "groups"])
def _group_maxima_kernel(
    query_ptr,
    keys_ptr,
    query_squares_ptr,
    key_squares_ptr,
    maxima_ptr,
    M,
    N,
    D,
    tiles_m,
    groups,
    stride_qm,
    stride_kn,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    METRIC: tl.constexpr,
    SUM_SQUARES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """maxima[m, g]: the greatest ordered score of query m in the group g of keys, int32."""
    # The tiles of queries of the same keys follow each other: the L2 cache keeps the keys.
    rows = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(0) // tiles_m
    key_ids = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # [BLOCK_N, BLOCK_M]
    best = ordered(
        tile_scores(
            query_ptr, keys_ptr, query_squares_ptr, key_squares_ptr, rows, key_ids, M, N, D,
            stride_qm, stride_kn, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, METRIC, SUM_SQUARES, COMPUTE,
        )
    )  # fmt: skip
    if GROUP > 1:
        best = tl.where((key_ids < N)[:, None], best, LOWEST)
        # [BLOCK_N / GROUP, BLOCK_M]
        best = tl.max(tl.reshape(best, (BLOCK_N // GROUP, GROUP, BLOCK_M)), axis=1)
    group_ids = tile * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    places = rows.to(tl.int64)[None, :] * groups + group_ids[:, None]
    tl.store(maxima_ptr + places, best, mask=(rows < M)[None, :] & (group_ids < groups)[:, None])


@triton.jit(do_not_specialize=["M", "N", "k"])
def _group_scores_kernel(
    query_ptr,
    keys_ptr,
    query_squares_ptr,
    key_squares_ptr,
    chosen_ptr,
    pairs_ptr,
    M,
    N,
    D,
    k,
    stride_qm,
    stride_kn,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    METRIC: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """pairs[m, k GROUP]: the packed keys of the groups that chosen[m, k] names; one query m.

    The tile is that of the maxima, with the query among the same others: so are the scores.
    """
    m = tl.program_id(0)
    rows = m // BLOCK_M * BLOCK_M + tl.arange(0, BLOCK_M)
    places = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = places < k * GROUP
    chosen = tl.load(chosen_ptr + m.to(tl.int64) * k + places // GROUP, mask=wanted, other=0)
    # [BLOCK_N]
    key_ids = chosen.to(tl.int32) * GROUP + places % GROUP
    # [BLOCK_N, BLOCK_M], of which the column of m is wanted
    values = ordered(
        tile_scores(
            query_ptr, keys_ptr, query_squares_ptr, key_squares_ptr, rows, key_ids, M, N, D,
            stride_qm, stride_kn, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, METRIC, False, COMPUTE,
        )
    )  # fmt: skip
    values = tl.max(tl.where((rows == m)[None, :], values, LOWEST), axis=1)
    pairs = tl.where(key_ids < N, pack(values, key_ids), EMPTY)
    tl.store(pairs_ptr + m.to(tl.int64) * k * GROUP + places, pairs, mask=wanted)


@triton.jit
def _load_pairs(values_ptr, places, C):
    """Packed pairs; ordered scores are packed with their places."""
    if values_ptr.dtype.element_ty == tl.int64:
        return tl.load(values_ptr + places, mask=places < C, other=EMPTY)
    values = tl.load(values_ptr + places, mask=places < C, other=0)
    return tl.where(places < C, pack(values, places), EMPTY)


@triton.jit(do_not_specialize=["C", "k"])
def _best_kernel(
    values_ptr,
    scores_ptr,
    index_ptr,
    C,
    k,
    KEPT: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """scores, index[m, k]: the k best of values[m, C], best first; one query m.

    values are packed pairs, at most LANES, or any number of ordered scores, of which index gives
    the places. The k best lie in the k best of LANES interleaved groups: pairs never tie.
    """
    m = tl.program_id(0).to(tl.int64)
    values_ptr += m * C
    lanes = tl.arange(0, LANES)
    best = tl.full((LANES,), EMPTY, tl.int64)
    for c in range(0, C, LANES):
        best = tl.maximum(best, _load_pairs(values_ptr, c + lanes, C))
    # [1, KEPT], descending
    kept = tl.topk(tl.reshape(best, (1, LANES)), KEPT)
    if C > LANES:
        # [STEPS, KEPT]
        lane = (unpack(kept)[1] % LANES).to(tl.int32)
        members = tl.arange(0, STEPS)[:, None] * LANES + lane
        kept = tl.full((1, KEPT), EMPTY, tl.int64)
        for c in range(0, C, STEPS * LANES):
            pairs = tl.reshape(_load_pairs(values_ptr, c + members, C), (1, STEPS * KEPT))
            both = tl.join(kept, tl.topk(pairs, KEPT))
            kept = tl.topk(tl.reshape(both, (1, 2 * KEPT)), KEPT)
    scores, index = unpack(kept)
    out = tl.arange(0, KEPT)[None, :]
    # [1, KEPT], of which k are wanted
    tl.store(scores_ptr + m * k + out, scores, mask=out < k)
    tl.store(index_ptr + m * k + out, index, mask=out < k)


def _select(values: Tensor, scores: Tensor, index: Tensor) -> None:
    """Fills scores and index `[M, k]` with the k best of values `[M, C]`, as `_best_kernel`."""
    (M, C), k = values.shape, scores.shape[1]
    if k > _KEPT[-1]:
        if values.dtype == torch.int32:
            places = torch.arange(C, device=values.device)
            values = (values.long() << 32) | (0x7FFFFFFF - places)
        pairs = values.topk(k).values
        best = (pairs >> 32).int()
        scores.copy_((best ^ ((best >> 31) & 0x7FFFFFFF)).view(torch.float32))
        index.copy_(0x7FFFFFFF - (pairs & 0x7FFFFFFF))
        return
    kept = next(size for size in _KEPT if size >= k)
    lanes = kept * _GROUP
    launch(
        _best_kernel,
        (M,),
        values,
        scores,
        index,
        C,
        k,
        KEPT=kept,
        LANES=lanes,
        STEPS=max(2, _SORTED // kept),
        num_warps=8,
    )


def topk_keys_fwd(query: Tensor, keys: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """Returns the k best keys of every query, best first.

    Beside its results it holds 4 bytes for each query and group of 32 keys, 256 for each query and
    chosen group, and 4 for each key, of as many queries at a time as fit into 64 MiB, at least one.

    Args:
        query: Of shape `[M, D]`, float32, float16 or bfloat16, any strides.
        keys: Of shape `[N, D]`, query's dtype, k <= N < 2^31 - 1; copied unless its columns are
            adjacent in memory.
        k: At least 1.
        metric: "dot", "cosine" or "l2".

    Returns:
        scores `[M, k]` float32 and index `[M, k]` int64.

    Raises:
        TypeError: if query is not float32, float16 or bfloat16.
        ValueError: if the number of keys is too large.
        ValueError: if the tensors are not on a CUDA device (unless the interpreter runs).
    """
    checked_count(keys)
    common.compute_dtype(query.dtype)
    common.device_traits(query.device)
    scores, index = planned(
        ("topk_keys", k, metric), [query, keys], [True, True], lambda: _best(query, keys, k, metric)
    )
    return cast(Tensor, scores), cast(Tensor, index)


def _best(query: Tensor, keys: Tensor, k: int, metric: str) -> Results:
    """scores, index."""
    (M, D), N = query.shape, keys.shape[0]
    scores = query.new_empty((M, k), dtype=torch.float32)
    index = query.new_empty((M, k), dtype=torch.int64)
    if M == 0:
        return [scores, index]
    query, keys = with_unit_column_stride(query), with_unit_column_stride(keys)
    tile = search_tile(query, keys)
    options = {**search_options(query, tile), "METRIC": METRICS[metric]}
    group = _GROUP if _GROUPS_PER_CHOSEN * k < cdiv(N, _GROUP) else 1
    groups = cdiv(N, group)
    per_query = 4 * groups + (8 * k * group if group > 1 else 0)
    step = max(1, _SCRATCH_BYTES // per_query)
    step = min(M, step // tile.m * tile.m or step)
    maxima = query.new_empty((step, groups), dtype=torch.int32)
    with torch.cuda.device_of(query):
        query_squares = key_squares = None
        # One tile of queries: the keys are read for it alone, and their squares on the way.
        sums = metric != "dot" and tile.m >= M == step
        if metric != "dot":
            query_squares = row_squares(query)
            key_squares = query.new_empty(N, dtype=torch.float32) if sums else row_squares(keys)
        for first in range(0, M, step):
            part = slice(first, first + step)
            q, values = query[part], maxima[: M - first]
            squares = None if query_squares is None else query_squares[part]
            tiles_m = cdiv(len(q), tile.m)
            launch(
                _group_maxima_kernel, (tiles_m * cdiv(N, tile.n),),
                q, keys, squares, key_squares, values, len(q), N, D, tiles_m, groups,
                query.stride(0), keys.stride(0), GROUP=group, SUM_SQUARES=sums, **options,
            )  # fmt: skip
            if group > 1:
                chosen, values = index[part], q.new_empty((len(q), k * group), dtype=torch.int64)
                _select(maxima[: len(q)], scores[part], chosen)
                launch(
                    _group_scores_kernel, (len(q), cdiv(k * group, tile.n)),
                    q, keys, squares, key_squares, chosen, values, len(q), N, D, k,
                    query.stride(0), keys.stride(0), GROUP=group, **options,
                )  # fmt: skip
            _select(values, scores[part], index[part])
    return [scores, index]
