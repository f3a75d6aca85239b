"""Triton backend of op `mix_prompts`: see `ops.mix_prompts` for what is computed.

Forward, one launch: programs over tiles of rows of the result, some of which mix prompts and some
of which copy (or gather) embeddings. Backward: both gradients are sums over tiles of the first P
rows of dy, split into parts where programs are few and added in a fixed order.
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
from sapt_fast.triton_kernels.blocks.plans import launch, planned
from sapt_fast.triton_kernels.blocks.row_reduction import sum_parts


@triton.jit(do_not_specialize=["P", "T", "K", "V", "prompt_tiles", "tiles"])
def _mix_prompts_kernel(
    prompts_ptr,
    mixture_ptr,
    source_ptr,
    ids_ptr,
    out_ptr,
    P,
    T,
    D,
    K,
    V,
    prompt_tiles,
    tiles,
    stride_sb,
    stride_sr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of out[b] = [mixture[b] prompts ; rows of source], `tiles` of rows per sample.

    The rows are source[b, t] without ids (then stride_sb is that of b), else source[ids[b, t]];
    an id out of range gives NaN.
    """
    tiles_d = tl.cdiv(D, BLOCK_N)
    cols = tl.program_id(0) % tiles_d * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(0) // tiles_d % tiles
    b = (tl.program_id(0) // tiles_d // tiles).to(tl.int64)
    in_cols = (cols < D)[None, :]
    out_ptr += b * (P + T) * D
    if tile < prompt_tiles:
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < P)[:, None] & in_cols
        offsets = rows.to(tl.int64)[:, None] * D + cols[None, :]
        prompt_ptrs = prompts_ptr + offsets
        mixture_ptr += b * K
        # [BLOCK_M, BLOCK_N]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, loop_unroll_factor=4):
            # [BLOCK_M, BLOCK_N] of prompt k; its weight is a scalar
            prompt = tl.load(prompt_ptrs, mask=mask, other=0.0)
            weight = tl.load(mixture_ptr + k)
            # a weight of 0: the prompt is not there, whatever it holds
            acc += tl.where(weight == 0, 0.0, weight * prompt.to(tl.float32))
            prompt_ptrs += P.to(tl.int64) * D
        # [BLOCK_M, BLOCK_N]
        tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        rows = (tile - prompt_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = rows < T
        mask = in_rows[:, None] & in_cols
        offsets = (P + rows).to(tl.int64)[:, None] * D + cols[None, :]
        if ids_ptr is not None:
            # [BLOCK_M]
            ids = tl.load(ids_ptr + b * T + rows, mask=in_rows, other=0).to(tl.int64)
            known = (ids >= 0) & (ids < V)
            source_ptrs = source_ptr + tl.where(known, ids, 0)[:, None] * stride_sr + cols[None, :]
            # [BLOCK_M, BLOCK_N]
            values = tl.load(source_ptrs, mask=mask, other=0.0).to(tl.float32)
            values = tl.where(known[:, None], values, float("nan"))
            tl.store(out_ptr + offsets, values.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            source_ptr += b * stride_sb
            source_ptrs = source_ptr + rows.to(tl.int64)[:, None] * stride_sr + cols[None, :]
            tl.store(out_ptr + offsets, tl.load(source_ptrs, mask=mask, other=0.0), mask=mask)


@triton.jit(do_not_specialize=["B", "K", "samples_per_part"])
def _prompt_grad_kernel(
    dy_ptr,
    mixture_ptr,
    out_ptr,
    B,
    K,
    N,
    samples_per_part,
    stride_b,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Part s = program axis 1 of out[s, K, N] = mixture[B, K]^T dy[B, N]."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.program_id(0) // tiles_n * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(1)
    start = part * samples_per_part
    stop = min(start + samples_per_part, B)
    dy_ptrs = dy_ptr + start.to(tl.int64) * stride_b + cols
    mixture_ptrs = mixture_ptr + start.to(tl.int64) * K + ks
    # [BLOCK_K prompts, BLOCK_N columns of P D]
    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for _ in tl.range(start, stop, loop_unroll_factor=2):
        # dy [BLOCK_N], weights [BLOCK_K], of one sample at a time
        dy = tl.load(dy_ptrs, mask=cols < N, other=0.0).to(tl.float32)
        weights = tl.load(mixture_ptrs, mask=ks < K, other=0.0)
        acc += tl.where((weights == 0)[:, None], 0.0, weights[:, None] * dy[None, :])
        dy_ptrs += stride_b
        mixture_ptrs += K
    out_ptrs = out_ptr + (part.to(tl.int64) * K + ks)[:, None] * N + cols[None, :]
    mask = (ks < K)[:, None] & (cols < N)[None, :]
    # [BLOCK_K, BLOCK_N]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B", "K", "columns_per_part"])
def _prompt_mixture_grad_kernel(
    dy_ptr,
    prompts_ptr,
    out_ptr,
    B,
    K,
    N,
    columns_per_part,
    stride_b,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Part s = program axis 1 of out[s, B, K] = dy[B, N] prompts[K, N]^T over its columns."""
    b = (tl.program_id(0) % B).to(tl.int64)
    ks = tl.program_id(0) // B * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(1)
    start = part * columns_per_part
    stop = min(start + columns_per_part, N)
    safe_ks = tl.where(ks < K, ks, 0).to(tl.int64)
    # [BLOCK_K, BLOCK_N], summed over its columns at the end
    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for n in range(start, stop, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        # dy [BLOCK_N], prompt [BLOCK_K, BLOCK_N]
        dy = tl.load(dy_ptr + b * stride_b + cols, mask=cols < stop, other=0.0).to(tl.float32)
        prompt_ptrs = prompts_ptr + safe_ks[:, None] * N + cols[None, :]
        prompt = tl.load(prompt_ptrs, mask=(cols < stop)[None, :], other=0.0).to(tl.float32)
        acc += prompt * dy[None, :]
    out_ptrs = out_ptr + (part.to(tl.int64) * B + b) * K + ks
    # [BLOCK_K] of out [part, B, K]
    tl.store(out_ptrs, tl.sum(acc, axis=1), mask=ks < K)


def mix_prompts_fwd(
    prompts: Tensor, mixture: Tensor, source: Tensor, input_ids: Tensor | None
) -> Tensor:
    """Mixture of prompts in front of embeddings.

    Args:
        prompts: Of shape `[K, P, D]`, in source's dtype or float32.
        mixture: Of shape `[B, K]`, float32.
        source: Embeddings of shape `[B, T, D]`, or with `input_ids` their table `[V, D]`; float32,
            float16 or bfloat16. Read in place if the last axis is contiguous.
        input_ids: Of shape `[B, T]`, int32 or int64, or None. Ids outside of the table give NaN.

    Returns:
        Of shape `[B, P + T, D]`, contiguous, in source's dtype.

    Raises:
        ValueError: if the tensors are not on a CUDA device (unless the interpreter runs).
    """
    inputs = [source, prompts, mixture] + ([] if input_ids is None else [input_ids])
    (out,) = planned(
        ("mix_prompts", input_ids is None),
        inputs,
        [True],
        lambda: [_mixed(prompts, mixture, source, input_ids)],
    )
    return cast(Tensor, out)


def _mixed(prompts: Tensor, mixture: Tensor, source: Tensor, input_ids: Tensor | None) -> Tensor:
    K, P, D = prompts.shape
    B, T = (source if input_ids is None else input_ids).shape[:2]
    out = source.new_empty((B, P + T, D))
    traits = common.device_traits(source.device)
    if out.numel() == 0:
        return out
    if source.stride(-1) != 1:
        source = source.contiguous()
    block_n = min(64 if traits.capability == 0 else 1024, triton.next_power_of_2(D))
    # Rows that no vector load can be aligned to cost a register per element.
    elements = 2048 if D % 16 == 0 else 1024
    block_m = 4 if traits.capability == 0 else min(64, elements // block_n)
    prompt_tiles = cdiv(P, block_m)
    tiles = prompt_tiles + cdiv(T, block_m)
    with torch.cuda.device_of(source):
        launch(
            _mix_prompts_kernel,
            (B * tiles * cdiv(D, block_n),),
            prompts.contiguous(),
            mixture.contiguous(),
            source,
            None if input_ids is None else input_ids.contiguous(),
            out,
            P,
            T,
            D,
            K,
            0 if input_ids is None else source.shape[0],
            prompt_tiles,
            tiles,
            source.stride(0) if input_ids is None else 0,
            source.stride(-2),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=4,
        )
    return out


def mix_prompts_bwd(
    dy: Tensor, prompts: Tensor, mixture: Tensor, needs_prompts: bool, needs_mixture: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of `mix_prompts_fwd` for prompts and mixture; deterministic.

    Args:
        dy: Of shape `[B, P + T, D]`, any strides, also expanded; only its first P rows are read.
        prompts, mixture: As in the forward.
        needs_prompts: Whether d_prompts is wanted.
        needs_mixture: Whether d_mixture is wanted.

    Returns:
        d_prompts of shape `[K, P, D]` in prompts' dtype and d_mixture `[B, K]` in float32, None
        for what is not wanted.

    Raises:
        ValueError: as in the forward.
    """
    prompts, mixture = prompts.contiguous(), mixture.contiguous()
    make = torch.empty_like if prompts.numel() and mixture.numel() else torch.zeros_like
    d_prompts = make(prompts) if needs_prompts else None
    d_mixture = make(mixture) if needs_mixture else None
    if make is torch.empty_like:
        d_mixed = with_unit_column_stride(dy[:, : prompts.shape[1]].flatten(1))
        with torch.cuda.device_of(dy):
            if d_prompts is not None:
                _fill_prompt_grad(d_mixed, mixture, d_prompts)
            if d_mixture is not None:
                _fill_mixture_grad(d_mixed, prompts, d_mixture)
                d_mixture.masked_fill_((mixture == 0) & ~d_mixture.isfinite(), 0.0)
    return d_prompts, d_mixture


def _fill_prompt_grad(d_mixed: Tensor, mixture: Tensor, d_prompts: Tensor) -> None:
    B, N = d_mixed.shape
    K = mixture.shape[1]
    traits = common.device_traits(d_mixed.device)
    block_k, block_n = (4, 32) if traits.capability == 0 else (16, 256)
    tiles = cdiv(K, block_k) * cdiv(N, block_n)
    # Two programs per multiprocessor, each at least eight samples long.
    samples_per_part = cdiv(B, max(1, min(2 * traits.num_sms // tiles, B // 8)))
    parts = cdiv(B, samples_per_part)
    sums = d_prompts
    if parts > 1:
        sums = d_mixed.new_empty((parts, *d_prompts.shape), dtype=torch.float32)
    _prompt_grad_kernel[(tiles, parts)](
        d_mixed,
        mixture,
        sums,
        B,
        K,
        N,
        samples_per_part,
        d_mixed.stride(0),
        BLOCK_K=block_k,
        BLOCK_N=block_n,
        num_warps=4,
    )
    if parts > 1:
        sum_parts(sums, [d_prompts])


def _fill_mixture_grad(d_mixed: Tensor, prompts: Tensor, d_mixture: Tensor) -> None:
    B, N = d_mixed.shape
    K = prompts.shape[0]
    traits = common.device_traits(d_mixed.device)
    block_k, block_n = (4, 16) if traits.capability == 0 else (16, 256)
    tiles = B * cdiv(K, block_k)
    # Four programs per multiprocessor, each at least two steps long.
    parts = max(1, min(cdiv(4 * traits.num_sms, tiles), N // (2 * block_n)))
    columns_per_part = round_up(cdiv(N, parts), block_n)
    parts = cdiv(N, columns_per_part)
    sums = d_mixture if parts == 1 else d_mixed.new_empty((parts, B, K), dtype=torch.float32)
    _prompt_mixture_grad_kernel[(tiles, parts)](
        d_mixed,
        prompts,
        sums,
        B,
        K,
        N,
        columns_per_part,
        d_mixed.stride(0),
        BLOCK_K=block_k,
        BLOCK_N=block_n,
        num_warps=4,
    )
    if parts > 1:
        sum_parts(sums, [d_mixture])
