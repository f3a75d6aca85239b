"""The two products of `mix_experts` with the pairs (row, choice) sorted by expert.

Where many rows choose an expert, its factors are read once per tile of pairs instead of once per
pair, and multiply the tile on the matrix unit. The second product gives one row per pair; a last
kernel adds the choices of a row in their order, so that results repeat. A float32 bank is rounded
to x's dtype on the way to the matrix unit; h is not.
"""
# ruff: noqa: N803 - kernel arguments keep the letters of the formulas
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapt_fast.triton_kernels.blocks import common
from sapt_fast.triton_kernels.blocks.common import cdiv, round_up
from sapt_fast.triton_kernels.blocks.plans import launch

# Between these many pairs per expert, the cheaper of the two in bytes.
_SCATTERED, _CROWDED = 4, 16
# Below these, sorting and the matrix unit's smallest tile cost more than they save.
_LEAST_RANK, _LEAST_PAIRS = 4, 1024
# Read and written by a radix sort of int32 ids with their positions, eight bits at a time.
_SORT_BYTES = 4 * 2 * 12
# The products of the pairs are written and summed for as many columns at a time as fill this:
# it stays in the L2 cache.
_PRODUCT_BYTES = 1 << 25


def grouping_pays(pairs: int, experts: int, rank: int, width: int, element_size: int) -> bool:
    """Returns whether to sort the pairs by expert; `width` is I + O.

    With rho = pairs / experts: no below 4, yes above 16 (and a rank of at least 4). Between, if
    fewer bytes move. Unsorted, each pair reads its expert:

        pairs rank width element_size

    Sorted, each expert is read once, and the pairs' products are written and read in float32
    (half of width, for either direction):

        experts rank width element_size + pairs (4 width + 96)
    """
    if pairs < _LEAST_PAIRS or rank < _LEAST_RANK or pairs < _SCATTERED * experts:
        return False
    if pairs > _CROWDED * experts:
        return True
    expert_bytes = rank * width * element_size
    return experts * expert_bytes + pairs * (4 * width + _SORT_BYTES) < pairs * expert_bytes


@triton.jit
def _next_expert(experts, last, N):
    """The least of the sorted experts above `last`, N or more if there is none."""
    return tl.min(tl.where(experts > last, experts, N), axis=0)


@triton.jit(do_not_specialize=["P", "k", "N", "R"])
def _grouped_into_ranks_kernel(
    x_ptr,
    bank_ptr,
    index_ptr,
    order_ptr,
    h_ptr,
    P,
    k,
    N,
    R,
    D,
    stride_xm,
    stride_bn,
    stride_br,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """h[pair, ranks of the tile] = x[row] bank[index[pair], ranks]^T for a tile of sorted pairs;
    0 without an expert."""
    tl.assume(D > 0)
    # [BLOCK_M] places in the order by expert
    places = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs = tl.arange(0, BLOCK_K)
    # [BLOCK_M] int64: the pair (row, choice) at each place, and its expert
    pairs = tl.load(order_ptr + places, mask=places < P, other=0)
    experts = tl.load(index_ptr + pairs, mask=places < P, other=-1)
    x_ptrs = x_ptr + (pairs // k)[:, None] * stride_xm + offs[None, :]
    bank_ptrs = bank_ptr + ranks.to(tl.int64)[None, :] * stride_br + offs[:, None]
    h_ptrs = h_ptr + pairs[:, None] * R + ranks[None, :]
    # Pairs without an expert get zeros here; all others below.
    none = (places < P) & ((experts < 0) | (experts >= N))
    zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tl.store(h_ptrs, zeros, mask=none[:, None] & (ranks < R)[None, :])
    expert = _next_expert(experts, -1, N)
    while expert < N:
        mine = experts == expert
        # [BLOCK_M, BLOCK_N]; one pass for each expert of the tile
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for d in range(0, D, BLOCK_K):
            inside = offs < D - d
            # x [BLOCK_M, BLOCK_K], of the pairs of this expert; a [BLOCK_K, BLOCK_N]
            x = tl.load(x_ptrs + d, mask=mine[:, None] & inside[None, :], other=0.0)
            a = tl.load(
                bank_ptrs + expert * stride_bn + d,
                mask=inside[:, None] & (ranks < R)[None, :],
                other=0.0,
            )
            acc = tl.dot(x.to(COMPUTE), a.to(COMPUTE), acc, input_precision="ieee")
        # [BLOCK_M, BLOCK_N] float32, scattered to h [P, R]
        tl.store(h_ptrs, acc, mask=mine[:, None] & (ranks < R)[None, :])
        expert = _next_expert(experts, expert, N)


@triton.jit(do_not_specialize=["P", "N", "R", "scaling"])
def _grouped_out_of_ranks_kernel(
    h_ptr,
    weights_ptr,
    bank_ptr,
    index_ptr,
    order_ptr,
    out_ptr,
    P,
    N,
    R,
    first,
    D,
    width,
    scaling,
    stride_bn,
    stride_br,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """out[pair, width] = scaling weights[pair] h[pair] bank[index[pair]], columns `first` and on
    of D, for a tile of sorted pairs; not written without an expert."""
    tl.assume(R > 0)
    # [BLOCK_M] places in the order by expert
    places = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    local = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = first + local
    offs = tl.arange(0, BLOCK_K)
    pairs = tl.load(order_ptr + places, mask=places < P, other=0)
    experts = tl.load(index_ptr + pairs, mask=places < P, other=-1)
    # [BLOCK_M]
    weights = tl.load(weights_ptr + pairs) * scaling
    in_columns = (columns < D)[None, :]
    h_ptrs = h_ptr + pairs[:, None] * R + offs[None, :]
    bank_ptrs = bank_ptr + offs.to(tl.int64)[:, None] * stride_br + columns[None, :]
    out_ptrs = out_ptr + pairs[:, None] * width + local[None, :]
    expert = _next_expert(experts, -1, N)
    while expert < N:
        mine = (experts == expert)[:, None]
        # [BLOCK_M, BLOCK_N]; one pass for each expert of the tile
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for r in range(0, R, BLOCK_K):
            inside = offs < R - r
            # h [BLOCK_M, BLOCK_K], weighted; b [BLOCK_K, BLOCK_N]
            h = tl.load(h_ptrs + r, mask=mine & inside[None, :], other=0.0) * weights[:, None]
            b = tl.load(
                bank_ptrs + expert * stride_bn + r * stride_br,
                mask=inside[:, None] & in_columns,
                other=0.0,
            ).to(COMPUTE)
            # Two halves of h keep its float32.
            upper = h.to(COMPUTE)
            acc = tl.dot(upper, b, acc, input_precision="ieee")
            if upper.dtype != tl.float32:
                lower = (h - upper.to(tl.float32)).to(COMPUTE)
                acc = tl.dot(lower, b, acc, input_precision="ieee")
        # [BLOCK_M, BLOCK_N] float32, scattered to out [P, width]
        tl.store(out_ptrs, acc, mask=mine & in_columns)
        expert = _next_expert(experts, expert, N)


@triton.jit(do_not_specialize=["k", "N"])
def _sum_choices_kernel(
    products_ptr,
    index_ptr,
    weights_ptr,
    out_ptr,
    k,
    N,
    first,
    D,
    width,
    BLOCK_N: tl.constexpr,
):
    """out[row, columns] = sum over j of products[row, j] with weight, one after the other."""
    row = tl.program_id(0).to(tl.int64)
    local = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = first + local
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for j in range(k):
        pair = row * k + j
        expert = tl.load(index_ptr + pair)
        weight = tl.load(weights_ptr + pair)
        # A pair without an expert or weight was not written: it is not read either.
        last = tl.where((expert >= 0) & (expert < N) & (weight != 0), D, 0)
        # [BLOCK_N]
        acc += tl.load(products_ptr + pair * width + local, mask=columns < last, other=0.0)
    tl.store(out_ptr + row * D + columns, acc.to(out_ptr.dtype.element_ty), mask=columns < D)


def _tile_of_pairs(device: torch.device, dtype: torch.dtype) -> int:
    if common.device_traits(device).capability == 0:
        return 16
    return 32 if dtype == torch.float32 else 64


def grouped_into_ranks(x: Tensor, bank: Tensor, index: Tensor, order: Tensor) -> Tensor:
    """Every row times its experts' factors.

    Args:
        x: Of shape `[M, D]`, unit column stride.
        bank: Of shape `[N, r, D]`, unit column stride; D and r are not 0.
        index: Of shape `[M, k]`, int64, contiguous; values outside [0, N) mean no expert.
        order: Of shape `[M * k]`, int64: the flattened index's positions, sorted by expert.

    Returns:
        h of shape `[M, k, r]`, float32; 0 where there is no expert.
    """
    (M, k), (N, R, D) = index.shape, bank.shape
    h = x.new_empty((M, k, R), dtype=torch.float32)
    interpreted = common.device_traits(x.device).capability == 0
    block_m = _tile_of_pairs(x.device, x.dtype)
    block_n = 16 if interpreted else max(16, min(64, triton.next_power_of_2(R)))
    aligned = D % 16 == 0 and x.element_size() == 2
    with torch.cuda.device_of(x):
        launch(
            _grouped_into_ranks_kernel,
            (cdiv(M * k, block_m), cdiv(R, block_n)),
            x,
            bank,
            index,
            order,
            h,
            M * k,
            k,
            N,
            R,
            D,
            x.stride(0),
            bank.stride(0),
            bank.stride(1),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=64 if aligned and block_n <= 32 else 32,
            COMPUTE=common.compute_dtype(x.dtype),
            num_warps=4,
            num_stages=3,
        )
    return h


def grouped_out_of_ranks(
    h: Tensor,
    bank: Tensor,
    index: Tensor,
    weights: Tensor,
    order: Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """Returns the weighted sum of the experts' factors with coefficients h.

    Beside its result it holds one float32 per pair and column, for as many columns at a time as
    fit into 32 MiB, but at least for 64 (32 in the interpreter).

    Args:
        h: Of shape `[M, k, r]`, float32, contiguous.
        bank, index, order: As in `grouped_into_ranks`.
        weights: Of shape `[M, k]`, float32, contiguous.
        scaling: Of all experts.
        dtype: Of the result: float32, float16 or bfloat16, also that of the product.

    Returns:
        `[M, D]` in dtype.
    """
    (M, k), (N, R, D) = index.shape, bank.shape
    out = h.new_empty((M, D), dtype=dtype)
    block_m = _tile_of_pairs(h.device, dtype)
    block_n = min(64, 2 * block_m) if dtype != torch.float32 else 32
    fitting = _PRODUCT_BYTES // (4 * M * k) // block_n * block_n
    width = min(max(block_n, fitting), round_up(D, block_n))
    products = h.new_empty((M * k, width))
    compute = common.compute_dtype(dtype)
    with torch.cuda.device_of(h):
        for first in range(0, D, width):
            tiles = cdiv(min(width, D - first), block_n)
            launch(
                _grouped_out_of_ranks_kernel,
                (cdiv(M * k, block_m), tiles),
                h,
                weights,
                bank,
                index,
                order,
                products,
                M * k,
                N,
                R,
                first,
                D,
                width,
                scaling,
                bank.stride(0),
                bank.stride(1),
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                BLOCK_K=16,
                COMPUTE=compute,
                num_warps=8 if dtype == torch.float32 else 4,
                num_stages=3,
            )
            launch(
                _sum_choices_kernel,
                (M, tiles),
                products,
                index,
                weights,
                out,
                k,
                N,
                first,
                D,
                width,
                BLOCK_N=block_n,
                num_warps=1,
            )
    return out
