"""Triton backend of op `router`: see `ops.router` for what is computed.

Scores take one launch with one program per sample: its vectors stay in the caches while the
program streams the projection and the keys, everything in float32.
"""
# ruff: noqa: N803 - kernel arguments keep the letters of the formulas
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapt_fast.triton_kernels import common
from sapt_fast.triton_kernels.pool_tokens import pool_tokens_bwd, pool_tokens_fwd

if TYPE_CHECKING:
    from sapt_fast.ops.router import QueryProjection

__all__ = ["pool_tokens_bwd", "pool_tokens_fwd", "route_scores_fwd"]


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
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for c in range(0, COLS, BLOCK_COLS):
        cols = c + tl.arange(0, BLOCK_COLS)
        in_cols = cols < COLS
        matrix = tl.load(row_ptrs + cols[None, :], mask=in_rows & in_cols[None, :], other=0.0)
        vector = tl.load(vector_ptr + cols, mask=in_cols, other=0.0)
        acc += matrix.to(tl.float32) * vector.to(tl.float32)[None, :]
    return tl.sum(acc, axis=1)


@triton.jit(do_not_specialize=["K"])
def _scores_kernel(
    pooled_ptr,
    down_ptr,
    up_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    keys_ptr,
    hidden_ptr,
    query_ptr,
    scores_ptr,
    D,
    H,
    K,
    eps,
    divisor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """scores[b] = LayerNorm(SiLU(up down pooled[b])) keys^T / divisor; without down: no query.

    hidden [B, H] and query [B, D] are float32 scratch of this program: what its threads write is
    read by others of them, hence the barriers.
    """
    b = tl.program_id(0).to(tl.int64)
    pooled_ptr += b * D
    if down_ptr is not None:
        hidden_ptr += b * H
        query_ptr += b * D
        for h in range(0, H, BLOCK_M):
            rows = h + tl.arange(0, BLOCK_M)
            hidden = _products(down_ptr, pooled_ptr, rows, H, D, BLOCK_M, BLOCK_N)
            tl.store(hidden_ptr + rows, hidden, mask=rows < H)
        tl.debug_barrier()

        total = tl.zeros((BLOCK_M,), tl.float32)
        for d in range(0, D, BLOCK_M):
            rows = d + tl.arange(0, BLOCK_M)
            z = _products(up_ptr, hidden_ptr, rows, D, H, BLOCK_M, BLOCK_H)
            z = z / (1.0 + tl.exp(-z))
            total += z
            tl.store(query_ptr + rows, z, mask=rows < D)
        mean = tl.sum(total, axis=0) / D
        tl.debug_barrier()

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
            weight = tl.load(norm_weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
            bias = tl.load(norm_bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
            tl.store(query_ptr + cols, (z - mean) / deviation * weight + bias, mask=in_cols)
        tl.debug_barrier()
    else:
        query_ptr = pooled_ptr

    for k in range(0, K, BLOCK_K):
        rows = k + tl.arange(0, BLOCK_K)
        scores = _products(keys_ptr, query_ptr, rows, K, D, BLOCK_K, BLOCK_D)
        tl.store(scores_ptr + b * K + rows, scores / divisor, mask=rows < K)


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
        ValueError: the tensors are not on a CUDA device (unless the interpreter runs).
    """
    (B, D), K = pooled.shape, keys.shape[0]
    scores = pooled.new_empty((B, K), dtype=torch.float32)
    interpreted = common.device_traits(pooled.device).capability == 0
    if scores.numel() == 0:
        return scores
    weights: list[Tensor | None] = [None] * 4
    hidden = query = None
    H, eps = 1, 0.0
    if projection is not None:
        weights = [t.contiguous() for t in projection[:4]]
        H, eps = projection.down.shape[0], projection.eps
        hidden = scores.new_empty((B, H))
        query = scores.new_empty((B, D))
    # As much in flight as the registers hold: fewer elements if they are wide or load singly.
    itemsize = max(t.element_size() for t in (keys, *weights) if t is not None)
    block_m, block_d = (128, 512) if itemsize == 2 and D % 16 == 0 else (64, 128)
    block_n, block_k = 128, 16
    if interpreted:
        block_m, block_n, block_k, block_d = 16, 16, 4, 32
    with torch.cuda.device_of(pooled):
        _scores_kernel[(B,)](
            pooled.contiguous(),
            *weights,
            keys.contiguous(),
            hidden,
            query,
            scores,
            D,
            H,
            K,
            eps,
            divisor,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_H=min(block_n, triton.next_power_of_2(H)),
            BLOCK_K=block_k,
            BLOCK_D=min(block_d, triton.next_power_of_2(D)),
            num_warps=16,
        )
    return scores
