"""Weights of many tokens without a projection, in one launch: each program reads a tile of tokens
once, multiplies it by all keys and gates the scores in registers."""
# ruff: noqa: N803 - kernel arguments keep the letters of the formulas
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapt_fast.ops.gates import Gate
from sapt_fast.triton_kernels.blocks import common
from sapt_fast.triton_kernels.blocks.common import TileConfig, cdiv, with_unit_column_stride
from sapt_fast.triton_kernels.blocks.gates import activated, cosines, gate_options, scaled
from sapt_fast.triton_kernels.blocks.plans import Results, launch

MOST_KEYS = 128
"""A program has the scores of all keys in registers."""
_FEW_TOKENS = 64  # so few at most have a program each, in the kernel for pooled embeddings


@triton.jit
def _gated_tile(
    scores, ks, K, top_k, threshold,
    GATE: tl.constexpr, SPARSE: tl.constexpr, RANKED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """The weights [rows, KEYS] of a tile of scores; ks [KEYS], of which those from K on get 0.

    The top_k are found one by one: they are few where rows are tokens.
    """
    inside = (ks < K)[None, :]
    weights = activated(scores, inside, 1, GATE)
    if SPARSE:
        keep = weights >= tl.minimum(tl.max(weights, axis=1), threshold)[:, None]
        if RANKED:
            # What is still open; chosen ones become -1.
            left = tl.where(inside, weights, -1.0)
            for _ in range(top_k):
                largest = tl.max(left, axis=1)[:, None]
                first = tl.min(tl.where(left == largest, ks[None, :], K), axis=1)[:, None]
                left = tl.where(ks[None, :] == first, -1.0, left)
            keep = keep & (left == -1.0)
        weights *= keep.to(tl.float32)
    if SCALED:
        weights = scaled(weights, 1)
    return weights


@triton.jit(do_not_specialize=["N", "K", "top_k"])
def _route_tokens_kernel(
    x_ptr, keys_ptr, scores_ptr, weights_ptr,
    N, D, K, stride_xn, stride_kk, divisor, top_k, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr, COSINE: tl.constexpr, GATE: tl.constexpr, SPARSE: tl.constexpr,
    RANKED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """scores[n] = x[n] keys^T / divisor, or with weights_ptr their weights; K <= BLOCK_N.

    With COSINE the products are divided by both norms.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ks, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_rows, in_keys = (rows < N)[:, None], (ks < K)[None, :]
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_xn + offs_d[None, :]
    key_ptrs = keys_ptr + ks.to(tl.int64)[None, :] * stride_kk + offs_d[:, None]
    # [BLOCK_M tokens, BLOCK_N keys]; squares [BLOCK_M] and [BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    key_squares = tl.zeros((BLOCK_N,), tl.float32)
    for d in range(0, D, BLOCK_K):
        # x [BLOCK_M, BLOCK_K], keys [BLOCK_K, BLOCK_N]
        if EVEN_K:
            x = tl.load(x_ptrs, mask=in_rows, other=0.0)
            keys = tl.load(key_ptrs, mask=in_keys, other=0.0)
        else:
            x = tl.load(x_ptrs, mask=in_rows & (offs_d < D - d)[None, :], other=0.0)
            keys = tl.load(key_ptrs, mask=in_keys & (offs_d < D - d)[:, None], other=0.0)
        # [BLOCK_M, BLOCK_K] [BLOCK_K, BLOCK_N]
        acc = tl.dot(x.to(COMPUTE), keys.to(COMPUTE), acc, input_precision="ieee")
        if COSINE:
            wide, wide_keys = x.to(tl.float32), keys.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
            key_squares += tl.sum(wide_keys * wide_keys, axis=0)
        x_ptrs += BLOCK_K
        key_ptrs += BLOCK_K
    if COSINE:
        acc = cosines(acc, squares[:, None], key_squares[None, :])
    scores = acc / divisor
    out = rows.to(tl.int64)[:, None] * K + ks[None, :]
    if weights_ptr is None:
        tl.store(scores_ptr + out, scores, mask=in_rows & in_keys)
    else:
        weights = _gated_tile(scores, ks, K, top_k, threshold, GATE, SPARSE, RANKED, SCALED)
        tl.store(weights_ptr + out, weights, mask=in_rows & in_keys)


def serves(count: int, keys: int) -> bool:
    """Returns whether `route_tokens` should compute so many rows and keys."""
    return count > _FEW_TOKENS and 0 < keys <= MOST_KEYS


def route_tokens(
    x: Tensor, keys: Tensor, divisor: float, cosine: bool, gate: Gate | None
) -> Results:
    """Returns [scores, None], or with a gate [None, weights].

    Args:
        x: [N, D], float32, float16 or bfloat16.
        keys: [K, D], any of these dtypes.
    """
    (N, D), K = x.shape, keys.shape[0]
    x, keys = with_unit_column_stride(x), with_unit_column_stride(keys)
    out = x.new_empty((N, K), dtype=torch.float32)
    compute = x.dtype if x.dtype == keys.dtype else torch.float32
    tile = _tile(x, keys, compute.itemsize)
    with torch.cuda.device_of(x):
        launch(
            _route_tokens_kernel,
            (cdiv(N, tile.m),),
            x,
            keys,
            out if gate is None else None,
            None if gate is None else out,
            N,
            D,
            K,
            x.stride(0),
            keys.stride(0),
            divisor,
            K if gate is None else min(gate.top_k or K, K),
            0.0 if gate is None else gate.threshold or 0.0,
            **tile.launch_options(),
            EVEN_K=D % tile.k == 0,
            COMPUTE=common.compute_dtype(compute),
            COSINE=cosine,
            # Left to itself ptxas takes 80 and spills.
            maxnreg=224 if compute == torch.float32 and tile.num_warps == 8 else None,
            **gate_options(gate or Gate(), K),
        )
    return [out, None] if gate is None else [None, out]


def _tile(x: Tensor, keys: Tensor, compute_size: int) -> TileConfig:
    """Tokens, keys and step over the width: all keys, and fewer tokens if these fill no chip."""
    traits = common.device_traits(x.device)
    columns = next(size for size in (16, 64, MOST_KEYS) if size >= keys.shape[0])
    if traits.capability == 0:
        return TileConfig(16, columns, 32, num_warps=4, num_stages=1)
    many = x.shape[0] >= 64 * traits.num_sms
    rows, step = (64, 64) if many else (16, 128)
    warps = 4
    if columns > 16:
        # The scores of a row and what is left of them take registers, as do float32 operands.
        warps, step = 8, step if compute_size == 2 else 16
    tile = TileConfig(rows, columns, step, warps, num_stages=4)
    return common.fitted(tile, traits.shared, x.element_size(), keys.element_size())
