"""Scores of a tile of keys against a tile of queries, and how a search is cut into programs.

Keys are the rows of the matrix product: there are always many of them, so that its unit is used
even for a single query.
"""
# ruff: noqa: N803 - kernel arguments keep the letters of the formulas
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapt_fast.triton_kernels.blocks import common
from sapt_fast.triton_kernels.blocks.common import TileConfig, cdiv, round_up

METRICS = {"dot": 0, "cosine": 1, "l2": 2}
MAX_KEYS = 2**31 - 2**12
"""A packed index has 31 bits; what is left of them keeps the last tile's from overflowing."""

EMPTY: tl.constexpr = tl.constexpr(-(2**63))
"""Less than every packed pair."""


@triton.jit
def tile_scores(
    query_ptr,
    keys_ptr,
    squares_ptr,
    rows,
    key_ids,
    M,
    stop,
    D,
    stride_qm,
    stride_kn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    METRIC: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """[BLOCK_N, BLOCK_M] float32, keys x queries; garbage for rows >= M and keys >= stop.

    squares_ptr holds the squared norm of each query, or is None: then an l2 score lacks that
    term, which does not change the order of a query's keys.
    """
    tl.assume(D > 0)
    offs_d = tl.arange(0, BLOCK_K)
    # Rows and keys past the end read the first: the caller masks them.
    safe_rows = tl.where(rows < M, rows, 0)
    safe_keys = tl.where(key_ids < stop, key_ids, 0).to(tl.int64)
    q_ptrs = query_ptr + safe_rows.to(tl.int64)[None, :] * stride_qm + offs_d[:, None]
    k_ptrs = keys_ptr + safe_keys[:, None] * stride_kn + offs_d[None, :]
    # [BLOCK_N keys, BLOCK_M queries]; squares [BLOCK_N]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for d in range(0, D, BLOCK_K):
        if EVEN_K:
            # k [BLOCK_N, BLOCK_K], q [BLOCK_K, BLOCK_M]
            k = tl.load(k_ptrs)
            q = tl.load(q_ptrs)
        else:
            k = tl.load(k_ptrs, mask=offs_d[None, :] < D - d, other=0.0)
            q = tl.load(q_ptrs, mask=offs_d[:, None] < D - d, other=0.0)
        # [BLOCK_N, BLOCK_K] [BLOCK_K, BLOCK_M]
        acc = tl.dot(k.to(COMPUTE), q.to(COMPUTE), acc, input_precision="ieee")
        if METRIC != 0:
            wide = k.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
        k_ptrs += BLOCK_K
        q_ptrs += BLOCK_K
    if METRIC == 1:
        # [BLOCK_M]
        query_squares = tl.load(squares_ptr + safe_rows)
        acc = acc * _inverse_root(squares)[:, None] * _inverse_root(query_squares)[None, :]
    elif METRIC == 2:
        # -|k|^2 + 2 q k; with the next term -|q - k|^2, which is at most 0
        acc = 2.0 * acc - squares[:, None]
        if squares_ptr is not None:
            acc = tl.minimum(
                acc - tl.load(squares_ptr + safe_rows)[None, :], 0.0, tl.PropagateNan.ALL
            )
    return acc


@triton.jit
def _inverse_root(squares):
    return tl.where(squares == 0.0, 0.0, 1.0 / tl.sqrt(tl.where(squares == 0.0, 1.0, squares)))


@triton.jit
def pack(scores, key_ids):
    """Score and index in one int64 that orders as (score, then lower index); NaN comes last."""
    # -0 and +0 tie
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    # flips the magnitude of negative numbers, so that integers order as floats do
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = tl.where(scores == scores, ordered, -2147483648)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - key_ids).to(tl.int64)


@triton.jit
def unpack(pairs):
    """(scores float32, index int64) of packed pairs."""
    ordered = (pairs >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True), 0x7FFFFFFF - (pairs & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["M"])
def _row_squares_kernel(
    x_ptr, out_ptr, M, D, stride_xm, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """out[m] = sum of the squares of row m, float32."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    row_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_xm + offs[None, :]
    for d in range(0, D, BLOCK_K):
        mask = (rows < M)[:, None] & (offs < D - d)[None, :]
        # [BLOCK_M, BLOCK_K]
        x = tl.load(row_ptrs + d, mask=mask, other=0.0).to(tl.float32)
        acc += x * x
    # [BLOCK_M]
    tl.store(out_ptr + rows, tl.sum(acc, axis=1), mask=rows < M)


def row_squares(x: Tensor) -> Tensor:
    """Squared norms `[M]`, float32, of rows `[M, D]` with unit column stride."""
    out = x.new_empty(x.shape[:1], dtype=torch.float32)
    _row_squares_kernel[(cdiv(x.shape[0], 4),)](
        x, out, x.shape[0], x.shape[1], x.stride(0), BLOCK_M=4, BLOCK_K=256, num_warps=4
    )
    return out


class SearchPlan(NamedTuple):
    """How a search is cut into programs."""

    tile: TileConfig  # queries, keys, step over the key width
    tiles_m: int
    splits: int
    keys_per_split: int


def search_plan(query: Tensor, keys: Tensor, tile: TileConfig) -> SearchPlan:
    """Split the keys until the chip is full.

    Raises:
        ValueError: if there are more keys than an index can express.
    """
    N = keys.shape[0]
    if N >= MAX_KEYS:
        raise ValueError(
            f"keys: got {N} keys, expected fewer than {MAX_KEYS}: the Triton kernels hold an index"
            " in 31 bits"
        )
    tiles_m = cdiv(query.shape[0], tile.m)
    # Four programs per multiprocessor, each at least eight tiles long.
    programs = 4 * common.device_traits(query.device).num_sms
    splits = max(1, min(cdiv(programs, tiles_m), cdiv(N, 8 * tile.n)))
    keys_per_split = round_up(cdiv(N, splits), tile.n)
    return SearchPlan(tile, tiles_m, cdiv(N, keys_per_split), keys_per_split)
