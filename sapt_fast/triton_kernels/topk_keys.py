"""Triton backend of op `topk_keys`: see `ops.topk_keys` for what is computed.

Each program streams its share of the keys past a tile of queries and keeps the best of every query
in registers, packed with their indices into int64; a second launch merges the shares. A tile whose
scores are all below the worst kept ones is not sorted. An l2 score is expanded, `2 q k - |k|^2 -
|q|^2` in float32: its error is about 1e-7 (|q|^2 + |k|^2).
"""
# ruff: noqa: N803 - kernel arguments keep the letters of the formulas
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapt_fast.triton_kernels.blocks import common
from sapt_fast.triton_kernels.blocks.common import TileConfig, with_unit_column_stride
from sapt_fast.triton_kernels.blocks.key_tiles import (
    EMPTY,
    METRICS,
    pack,
    row_squares,
    search_plan,
    tile_scores,
    unpack,
)

# Pairs kept per query and pass; more than the largest take several passes over the keys. The
# interpreter sorts slowly, so it sorts less at a time.
_KEPT = (8, 32, 64) if common.INTERPRETED else (32, 64)
# Pairs that a merging program sorts at a time.
_MERGED_PAIRS = 16 if common.INTERPRETED else 512


@triton.jit
def _best_of_both(a, b, KEPT: tl.constexpr, BLOCK_M: tl.constexpr):
    """The KEPT largest of a and b, both [BLOCK_M, KEPT], descending."""
    return tl.topk(tl.reshape(tl.join(a, b), (BLOCK_M, 2 * KEPT)), KEPT)


@triton.jit(do_not_specialize=["M", "N", "keys_per_split"])
def _topk_stream_kernel(
    query_ptr,
    keys_ptr,
    squares_ptr,
    bound_ptr,
    kept_ptr,
    M,
    N,
    D,
    keys_per_split,
    stride_qm,
    stride_kn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KEPT: tl.constexpr,
    EVEN_K: tl.constexpr,
    METRIC: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """kept[s, m, KEPT]: the best packed pairs of query m in the share s of the keys.

    Pairs at or above bound[m], if given, belong to an earlier pass and are left out.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    start = split * keys_per_split
    # Not start + keys_per_split, which may pass 2^31.
    stop = start + min(keys_per_split, N - start)
    # [BLOCK_M, KEPT], descending; worst [BLOCK_M]
    kept = tl.full((BLOCK_M, KEPT), EMPTY, tl.int64)
    worst = tl.full((BLOCK_M,), EMPTY, tl.int64)
    for tile in range(0, tl.cdiv(stop - start, BLOCK_N)):
        key_ids = start + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        # [BLOCK_N, BLOCK_M]
        scores = tile_scores(
            query_ptr, keys_ptr, squares_ptr, rows, key_ids, M, stop, D, stride_qm, stride_kn,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, METRIC, COMPUTE,
        )  # fmt: skip
        # [BLOCK_M, BLOCK_N] int64
        pairs = pack(tl.trans(scores), key_ids[None, :])
        pairs = tl.where((key_ids < stop)[None, :], pairs, EMPTY)
        if bound_ptr is not None:
            bound = tl.load(bound_ptr + tl.where(rows < M, rows, 0))
            pairs = tl.where(pairs < bound[:, None], pairs, EMPTY)
        # Flat: Triton 3.6 fails on a reduction by rows and then by columns on sm_100.
        above = tl.reshape((pairs > worst[:, None]).to(tl.int32), (BLOCK_M * BLOCK_N,))
        better = tl.max(above, axis=0)
        if better > 0:
            # Rare once the best are found: a tile without a better key is not sorted.
            kept = _best_of_both(kept, tl.topk(pairs, KEPT), KEPT, BLOCK_M)
            worst = tl.min(kept, axis=1)
    places = (split.to(tl.int64) * M + rows[:, None]) * KEPT + tl.arange(0, KEPT)[None, :]
    # [BLOCK_M, KEPT] of kept [splits, M, KEPT]
    tl.store(kept_ptr + places, kept, mask=(rows < M)[:, None])


@triton.jit(do_not_specialize=["M", "splits", "k", "first"])
def _topk_merge_kernel(
    kept_ptr,
    scores_ptr,
    index_ptr,
    bound_ptr,
    M,
    splits,
    k,
    first,
    KEPT: tl.constexpr,
    SHARES: tl.constexpr,
):
    """One query: the best of all shares into the places `first` and on of its k; the last of
    them, if bound_ptr is given, bounds the next pass."""
    m = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, SHARES * KEPT)
    # [1, KEPT], descending
    kept = tl.full((1, KEPT), EMPTY, tl.int64)
    for s in range(0, splits, SHARES):
        share = (s + places // KEPT).to(tl.int64)
        # [SHARES KEPT]
        pairs = tl.load(
            kept_ptr + (share * M + m) * KEPT + places % KEPT, mask=share < splits, other=EMPTY
        )
        best = tl.topk(tl.reshape(pairs, (1, SHARES * KEPT)), KEPT)
        kept = _best_of_both(kept, best, KEPT, 1)
    scores, index = unpack(kept)
    out = first + tl.arange(0, KEPT)[None, :]
    # [1, KEPT], of which k - first are wanted
    tl.store(scores_ptr + m * k + out, scores, mask=out < k)
    tl.store(index_ptr + m * k + out, index, mask=out < k)
    if bound_ptr is not None:
        tl.store(bound_ptr + m, tl.min(tl.min(kept, axis=1), axis=0))


def _tile(query: Tensor, kept: int) -> TileConfig:
    """Queries, keys (no fewer than `kept`) and step over the key width."""
    if common.device_traits(query.device).capability == 0:
        return TileConfig(2, max(16, kept), 16, num_warps=4, num_stages=1)
    if query.element_size() == 4 or query.shape[1] % 16:
        return TileConfig(16, 64, 16, num_warps=8, num_stages=3)
    # More queries, or 8 kept pairs, spill on some target of some Triton version.
    return TileConfig(16, 64, 64, num_warps=8, num_stages=4)


def _register_limit(query: Tensor, kept: int) -> int | None:
    """More registers per thread where ptxas would stop at 128, for a second program per
    multiprocessor, and spill a few bytes."""
    capability = common.device_traits(query.device).capability
    unaligned = query.element_size() == 4 or query.shape[1] % 16
    return 224 if unaligned or (capability == 80 and kept > 32) else None


def topk_keys_fwd(query: Tensor, keys: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """Returns the k best keys of every query, best first.

    Args:
        query: Of shape `[M, D]`, float32, float16 or bfloat16, any strides.
        keys: Of shape `[N, D]`, query's dtype, k <= N < 2^31 - 1; copied unless its columns are
            adjacent in memory.
        k: At least 1. Above 64 the keys are read once per 64.
        metric: "dot", "cosine" or "l2".

    Returns:
        scores `[M, k]` float32 and index `[M, k]` int64.

    Raises:
        TypeError: if query is not float32, float16 or bfloat16.
        ValueError: if the number of keys is too large.
        ValueError: if the tensors are not on a CUDA device (unless the interpreter runs).
    """
    M, D = query.shape
    compute = common.compute_dtype(query.dtype)
    scores = query.new_empty((M, k), dtype=torch.float32)
    index = query.new_empty((M, k), dtype=torch.int64)
    if M == 0:
        return scores, index
    query, keys = with_unit_column_stride(query), with_unit_column_stride(keys)
    kept = next((size for size in _KEPT if size >= k), _KEPT[-1])
    plan = search_plan(query, keys, _tile(query, kept))
    pairs = query.new_empty((plan.splits, M, kept), dtype=torch.int64)
    bound = query.new_empty((M,), dtype=torch.int64) if k > kept else None
    with torch.cuda.device_of(query):
        squares = None if metric == "dot" else row_squares(query)
        for first in range(0, k, kept):
            _topk_stream_kernel[(plan.tiles_m, plan.splits)](
                query,
                keys,
                squares,
                bound if first else None,
                pairs,
                M,
                keys.shape[0],
                D,
                plan.keys_per_split,
                query.stride(0),
                keys.stride(0),
                **plan.tile.launch_options(),
                KEPT=kept,
                EVEN_K=D % plan.tile.k == 0,
                METRIC=METRICS[metric],
                COMPUTE=compute,
                maxnreg=_register_limit(query, kept),
            )
            _topk_merge_kernel[(M,)](
                pairs,
                scores,
                index,
                bound,
                M,
                plan.splits,
                k,
                first,
                KEPT=kept,
                SHARES=max(2, _MERGED_PAIRS // kept),
            )
    return scores, index
