"""Triton backend of op `route`: see `ops.route` for what is computed.

From the pooled embedding to the weights it is one launch with one program per sample: its vectors
stay in the caches while the program streams the projection and the keys, everything in float32.
"""
# ruff: noqa: N803 - kernel arguments keep the letters of the formulas
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapt_fast.triton_kernels.blocks import common
from sapt_fast.triton_kernels.blocks.plans import Results, launch, planned

if TYPE_CHECKING:
    from sapt_fast.ops.route import QueryProjection


@triton.jit
def _products(
    matrix_ptr,
    vector_ptr,
    rows,
    ROWS,
    COLS,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """matrix[rows, COLS] @ vector[COLS] in float32; zero for rows beyond ROWS."""
    row_ptrs = matrix_ptr + rows.to(tl.int64)[:, None] * COLS
    in_rows = (rows < ROWS)[:, None]
    # [BLOCK_ROWS, BLOCK_COLS], summed over its columns at the end
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for c in range(0, COLS, BLOCK_COLS):
        cols = c + tl.arange(0, BLOCK_COLS)
        in_cols = cols < COLS
        # matrix [BLOCK_ROWS, BLOCK_COLS], vector [BLOCK_COLS]
        matrix = tl.load(row_ptrs + cols[None, :], mask=in_rows & in_cols[None, :], other=0.0)
        vector = tl.load(vector_ptr + cols, mask=in_cols, other=0.0)
        acc += matrix.to(tl.float32) * vector.to(tl.float32)[None, :]
    return tl.sum(acc, axis=1)


@triton.jit
def _softmax_weights(
    scores_ptr,
    weights_ptr,
    K,
    top_k,
    threshold,
    KEYS: tl.constexpr,
    SPARSE: tl.constexpr,
    RANKED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """weights[K] = the softmax of scores[K], K <= KEYS, small ones dropped as `ops.route` says.

    A weight's rank, the number of larger ones and of equal ones before it, tells whether it is
    among the top_k: K^2 comparisons in registers are fewer steps than a sort.
    """
    ks = tl.arange(0, KEYS)
    in_keys = ks < K
    # [KEYS]; the largest is subtracted before exp
    scores = tl.load(scores_ptr + ks, mask=in_keys, other=float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=0))
    weights = weights / tl.sum(weights, axis=0)
    if SPARSE:
        keep = weights >= tl.minimum(tl.max(weights, axis=0), threshold)
        if RANKED:
            # [KEYS]
            tl.store(weights_ptr + ks, weights, mask=in_keys)
            tl.debug_barrier()
            rank = tl.zeros((KEYS,), tl.int32)
            for k in range(0, K, BLOCK_K):
                others = k + tl.arange(0, BLOCK_K)
                # other [1, BLOCK_K], own [KEYS, 1]
                other = tl.load(weights_ptr + others, mask=others < K, other=-1.0)[None, :]
                own = weights[:, None]
                ahead = (other > own) | ((other == own) & (others[None, :] < ks[:, None]))
                rank += tl.sum(ahead.to(tl.int32), axis=1)
            keep = keep & (rank < top_k)
            tl.debug_barrier()
        weights *= keep.to(tl.float32)
        weights = weights / tl.sum(weights, axis=0)
    tl.store(weights_ptr + ks, weights, mask=in_keys)


@triton.jit(do_not_specialize=["K", "top_k"])
def _route_kernel(
    pooled_ptr, down_ptr, up_ptr, norm_weight_ptr, norm_bias_ptr, keys_ptr, hidden_ptr,
    query_ptr, scores_ptr, weights_ptr,
    D, H, K, eps, divisor, top_k, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, KEYS: tl.constexpr, SPARSE: tl.constexpr, RANKED: tl.constexpr,
):  # fmt: skip
    """scores[b] = LayerNorm(SiLU(up down pooled[b])) keys^T / divisor; without down: no query.

    With weights_ptr also weights[b], from the scores. hidden [B, H] and query [B, D] are float32
    scratch of this program: what its threads write is read by others of them, hence the barriers.
    """
    b = tl.program_id(0).to(tl.int64)
    pooled_ptr += b * D
    if down_ptr is not None:
        hidden_ptr += b * H
        query_ptr += b * D
        for h in range(0, H, BLOCK_M):
            rows = h + tl.arange(0, BLOCK_M)
            # hidden [BLOCK_M] = down [BLOCK_M, D] pooled [D]
            hidden = _products(down_ptr, pooled_ptr, rows, H, D, BLOCK_M, BLOCK_N)
            tl.store(hidden_ptr + rows, hidden, mask=rows < H)
        tl.debug_barrier()

        total = tl.zeros((BLOCK_M,), tl.float32)
        for d in range(0, D, BLOCK_M):
            rows = d + tl.arange(0, BLOCK_M)
            # z [BLOCK_M] = up [BLOCK_M, H] hidden [H], then SiLU
            z = _products(up_ptr, hidden_ptr, rows, D, H, BLOCK_M, BLOCK_H)
            z = z / (1.0 + tl.exp(-z))
            total += z
            tl.store(query_ptr + rows, z, mask=rows < D)
        mean = tl.sum(total, axis=0) / D
        tl.debug_barrier()

        # LayerNorm in two passes: the mean first, then the squares about it
        squares = tl.zeros((BLOCK_D,), tl.float32)
        for d in range(0, D, BLOCK_D):
            cols = d + tl.arange(0, BLOCK_D)
            z = tl.load(query_ptr + cols, mask=cols < D, other=0.0)
            squares += tl.where(cols < D, (z - mean) * (z - mean), 0.0)
        deviation = tl.sqrt(tl.sum(squares, axis=0) / D + eps)
        for d in range(0, D, BLOCK_D):
            cols = d + tl.arange(0, BLOCK_D)
            in_cols = cols < D
            z = tl.load(query_ptr + cols, mask=in_cols, other=0.0)
            # weight, bias [BLOCK_D]
            weight = tl.load(norm_weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
            bias = tl.load(norm_bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
            tl.store(query_ptr + cols, (z - mean) / deviation * weight + bias, mask=in_cols)
        tl.debug_barrier()
    else:
        query_ptr = pooled_ptr

    for k in range(0, K, BLOCK_K):
        rows = k + tl.arange(0, BLOCK_K)
        # scores [BLOCK_K] = keys [BLOCK_K, D] query [D]
        scores = _products(keys_ptr, query_ptr, rows, K, D, BLOCK_K, BLOCK_D)
        tl.store(scores_ptr + b * K + rows, scores / divisor, mask=rows < K)
    if weights_ptr is not None:
        tl.debug_barrier()
        _softmax_weights(
            scores_ptr + b * K, weights_ptr + b * K, K, top_k, threshold,
            KEYS, SPARSE, RANKED, BLOCK_K,
        )  # fmt: skip


def route_scores_fwd(
    pooled: Tensor, keys: Tensor, projection: QueryProjection | None, divisor: float
) -> Tensor:
    """Scores of every key for each pooled embedding.

    Args:
        pooled: Of shape `[B, D]`, float32, float16 or bfloat16.
        keys: Of shape `[K, D]`, any of these dtypes.
        projection: The query projection in any of these dtypes and of any width; None for the
            identity.
        divisor: What the scores are divided by.

    Returns:
        Of shape `[B, K]`, float32, computed in float32 throughout.

    Raises:
        ValueError: if the tensors are not on a CUDA device (unless the interpreter runs).
    """
    scores, _ = _planned(pooled, keys, projection, divisor, False, None, None)
    return cast(Tensor, scores)


def route_fwd(
    pooled: Tensor,
    keys: Tensor,
    projection: QueryProjection | None,
    divisor: float,
    top_k: int | None,
    threshold: float | None,
) -> Tensor:
    """Weights of every adapter for each pooled embedding, from its scores.

    Args:
        pooled, keys, projection, divisor: As in `route_scores_fwd`.
        top_k: Weights that each sample keeps; None for all.
        threshold: Weights below it are dropped, except the largest; None for 0.

    Returns:
        Of shape `[B, K]`, float32; rows sum to 1.

    Raises:
        ValueError: as in `route_scores_fwd`.
    """
    _, weights = _planned(pooled, keys, projection, divisor, True, top_k, threshold)
    return cast(Tensor, weights)


def _planned(
    pooled: Tensor,
    keys: Tensor,
    projection: QueryProjection | None,
    divisor: float,
    weighs: bool,
    top_k: int | None,
    threshold: float | None,
) -> Results:
    """Scores and, if `weighs`, weights; a plan gives the last of them alone."""

    def compute() -> Results:
        scores = pooled.new_empty((pooled.shape[0], keys.shape[0]), dtype=torch.float32)
        weights = torch.empty_like(scores) if weighs else None
        _launch(pooled, keys, projection, divisor, scores, weights, top_k, threshold)
        return [scores, weights]

    factors, eps = ((), 0.0) if projection is None else (projection[:4], projection.eps)
    options = "route", eps, divisor, weighs, top_k, threshold
    return planned(options, [pooled, keys, *factors], [not weighs, weighs], compute)


def _launch(
    pooled: Tensor,
    keys: Tensor,
    projection: QueryProjection | None,
    divisor: float,
    scores: Tensor,
    weights: Tensor | None,
    top_k: int | None,
    threshold: float | None,
) -> None:
    """Fills `scores` [B, K], and `weights` [B, K] unless it is None."""
    (B, D), K = pooled.shape, keys.shape[0]
    interpreted = common.device_traits(pooled.device).capability == 0
    if scores.numel() == 0:
        return
    factors: list[Tensor | None] = [None] * 4
    hidden = query = None
    H, eps = 1, 0.0
    if projection is not None:
        factors = [t.contiguous() for t in projection[:4]]
        H, eps = projection.down.shape[0], projection.eps
        hidden = scores.new_empty((B, H))
        query = scores.new_empty((B, D))
    # As much in flight as the registers hold: fewer elements if they are wide or load singly.
    itemsize = max(t.element_size() for t in (keys, *factors) if t is not None)
    block_m, block_d = (128, 512) if itemsize == 2 and D % 16 == 0 else (64, 128)
    block_n, block_k = 128, 16
    if interpreted:
        block_m, block_n, block_k, block_d = 16, 16, 4, 32
    ranked = top_k is not None and top_k < K
    # Two sizes only: a pool that grows should not recompile.
    selection: dict[str, Any] = {
        "KEYS": 1 if weights is None else 64 if K <= 64 else max(1024, triton.next_power_of_2(K)),
        "SPARSE": ranked or bool(threshold),
        "RANKED": ranked,
    }
    with torch.cuda.device_of(pooled):
        launch(
            _route_kernel,
            (B,),
            pooled.contiguous(),
            *factors,
            keys.contiguous(),
            hidden,
            query,
            scores,
            weights,
            D,
            H,
            K,
            eps,
            divisor,
            min(top_k or K, K),
            threshold or 0.0,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_H=min(block_n, triton.next_power_of_2(H)),
            BLOCK_K=block_k,
            BLOCK_D=min(block_d, triton.next_power_of_2(D)),
            num_warps=16,
            maxnreg=128,  # all that 16 warps can have; left to itself ptxas takes 64 and spills
            **selection,
        )
