"""Scores of a tile of keys against a tile of queries, their order as integers, and the tiles.

Keys are the rows of the matrix product: there are always many of them, so that its unit is used
even for a single query.
"""
# ruff: noqa: N803 - kernel arguments keep the letters of the formulas
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapt_fast.triton_kernels.blocks import common
from sapt_fast.triton_kernels.blocks.common import TileConfig, cdiv
from sapt_fast.triton_kernels.blocks.plans import launch

METRICS = {"dot": 0, "cosine": 1, "l2": 2}
MAX_KEYS = 2**31 - 2**12
"""A packed index has 31 bits; what is left of them keeps the last tile's from overflowing."""

LOWEST: tl.constexpr = tl.constexpr(-(2**31))
"""The ordered score of NaN."""

EMPTY: tl.constexpr = tl.constexpr(-(2**63))
"""Less than every packed pair."""


@triton.jit
def tile_scores(
    query_ptr,
    keys_ptr,
    query_squares_ptr,
    key_squares_ptr,
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
    SUM_SQUARES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """[BLOCK_N, BLOCK_M] float32, keys x queries; garbage for rows >= M and keys >= stop.

    The squared norms |k|^2 are loaded from key_squares_ptr, or with SUM_SQUARES summed on the way
    and, unless it is None, stored there. An l2 score lacks |q|^2, which does not change the order
    of a query's keys, if query_squares_ptr is None.
    """
    tl.assume(D > 0)
    offs_d = tl.arange(0, BLOCK_K)
    inside = key_ids < stop
    # Keys past the end read the first; queries past the end read nothing.
    safe_keys = tl.where(inside, key_ids, 0).to(tl.int64)
    in_rows = (rows < M)[None, :]
    q_ptrs = query_ptr + rows.to(tl.int64)[None, :] * stride_qm + offs_d[:, None]
    k_ptrs = keys_ptr + safe_keys[:, None] * stride_kn + offs_d[None, :]
    # [BLOCK_N keys, BLOCK_M queries]; squares [BLOCK_N]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for d in range(0, D, BLOCK_K):
        # k [BLOCK_N, BLOCK_K], q [BLOCK_K, BLOCK_M]
        if EVEN_K:
            k = tl.load(k_ptrs)
            q = tl.load(q_ptrs, mask=in_rows, other=0.0)
        else:
            k = tl.load(k_ptrs, mask=offs_d[None, :] < D - d, other=0.0)
            q = tl.load(q_ptrs, mask=(offs_d < D - d)[:, None] & in_rows, other=0.0)
        # [BLOCK_N, BLOCK_K] [BLOCK_K, BLOCK_M]
        acc = tl.dot(k.to(COMPUTE), q.to(COMPUTE), acc, input_precision="ieee")
        if SUM_SQUARES:
            wide = k.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
        k_ptrs += BLOCK_K
        q_ptrs += BLOCK_K
    if METRIC != 0:
        if not SUM_SQUARES:
            squares = tl.load(key_squares_ptr + safe_keys)
        elif key_squares_ptr is not None:
            tl.store(key_squares_ptr + key_ids, squares, mask=inside)
        # [BLOCK_M]
        query_squares = tl.zeros((BLOCK_M,), tl.float32)
        if query_squares_ptr is not None:
            query_squares = tl.load(query_squares_ptr + rows, mask=rows < M, other=0.0)
        if METRIC == 1:
            acc = acc * _inverse_root(squares)[:, None] * _inverse_root(query_squares)[None, :]
        else:
            # -|k|^2 + 2 q k; with the next term -|q - k|^2, which is at most 0
            acc = 2.0 * acc - squares[:, None]
            if query_squares_ptr is not None:
                acc = tl.minimum(acc - query_squares[None, :], 0.0, tl.PropagateNan.ALL)
    return acc


@triton.jit
def _inverse_root(squares):
    return tl.where(squares == 0.0, 0.0, 1.0 / tl.sqrt(tl.where(squares == 0.0, 1.0, squares)))


@triton.jit
def ordered(scores):
    """int32 that orders as the float32 scores do; -0 and +0 tie, and NaN comes last."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    # flips the magnitude of negative numbers, so that integers order as floats do
    return tl.where(scores == scores, bits ^ ((bits >> 31) & 0x7FFFFFFF), LOWEST)


@triton.jit
def pack(values, key_ids):
    """Ordered score and index in one int64 that orders as (score, then lower index).

    Pairs of different keys differ, and all are greater than EMPTY.
    """
    return (values.to(tl.int64) << 32) | (0x7FFFFFFF - key_ids).to(tl.int64)


@triton.jit
def unpack(pairs):
    """(scores float32, index int64) of packed pairs."""
    values = (pairs >> 32).to(tl.int32)
    bits = values ^ ((values >> 31) & 0x7FFFFFFF)
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
    launch(
        _row_squares_kernel, (cdiv(x.shape[0], 4),),
        x, out, x.shape[0], x.shape[1], x.stride(0), BLOCK_M=4, BLOCK_K=256, num_warps=4,
    )  # fmt: skip
    return out


def search_tile(query: Tensor, keys: Tensor) -> TileConfig:
    """Queries, keys and step over the key width.

    Up to a tile of queries the keys are read once, and a long tile of keys reads the queries
    seldom; more queries take squarer tiles, for which both are read least. Where these are too few
    for the chip, they are small.
    """
    traits = common.device_traits(query.device)
    M, D = query.shape
    if traits.capability == 0:
        return TileConfig(2, 8, 16, num_warps=4, num_stages=1)
    if query.element_size() == 4 or D % 16:
        return TileConfig(16 if M <= 16 else 64, 64, 16, num_warps=8, num_stages=3)
    # The largest tiles whose accumulators and epilogues do not spill.
    if traits.capability == 90:
        few, many = TileConfig(64, 512, 32, 8, 4), TileConfig(128, 256, 64, 8, 3)
    else:
        few, many = TileConfig(64, 128, 32, 8, 4), TileConfig(128, 128, 32, 8, 3)
        if traits.capability in (100, 103):
            many = few
    tile = few if M <= 64 else many
    if cdiv(M, tile.m) * cdiv(keys.shape[0], tile.n) < traits.num_sms:
        return TileConfig(64, 64, 64, num_warps=8, num_stages=4)
    return tile


def search_options(query: Tensor, tile: TileConfig) -> dict[str, object]:
    """Returns the keyword arguments of a launch that computes `tile_scores` with this tile."""
    # For a small tile ptxas stops at 80 to 128 registers, and spills a few bytes.
    return {
        **tile.launch_options(),
        "EVEN_K": query.shape[1] % tile.k == 0,
        "COMPUTE": common.compute_dtype(query.dtype),
        "maxnreg": 224 if tile.m * tile.n <= 64 * 128 else None,
    }


def checked_count(keys: Tensor) -> int:
    """Returns N, the number of keys.

    Raises:
        ValueError: if there are more keys than an index can express.
    """
    N = keys.shape[0]
    if N >= MAX_KEYS:
        raise ValueError(
            f"keys: got {N} keys, expected fewer than {MAX_KEYS}: the Triton kernels hold an index"
            " in 31 bits"
        )
    return N
