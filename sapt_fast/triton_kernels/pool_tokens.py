"""Embedding gather and pooling over the sequence in one pass; see `ops.pool_tokens`.

A program pools a range of one sample's tokens over a block of columns, so that long sequences
fill the chip; where there are several ranges, a second launch merges them in their order. Nothing
of size B x T x D is stored, and the sums of the backward have a fixed order: no atomics.
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
from sapt_fast.triton_kernels.blocks.common import DeviceTraits, cdiv, round_up
from sapt_fast.triton_kernels.blocks.plans import Results, launch, planned

_NO_TOKEN = tl.constexpr(2147483647)


@triton.jit
def _finished(value, count, MEAN: tl.constexpr):
    """The pooled value of `count` tokens from their sum or maximum; zeros for no token."""
    if MEAN:
        return value / tl.maximum(count, 1).to(tl.float32)
    return tl.where(count > 0, value, 0.0)


@triton.jit(do_not_specialize=["T", "V", "splits", "tokens_per_split"])
def _pool_kernel(
    ids_ptr, mask_ptr, table_ptr, pooled_ptr, winner_ptr, count_ptr,
    T, V, D, splits, tokens_per_split, stride_v,
    MEAN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pools one range of tokens; with `count_ptr` the result is a part for `_merge_kernel`.

    pooled, winner: [B, splits, D]; count: [B, splits], the tokens that took part. The winner, None
    if unwanted, is the id whose embedding is the maximum, that of the first token if several are,
    -1 for none. An id out of range gives NaN.
    """
    tiles_d = tl.cdiv(D, BLOCK_D)
    cols = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    row = (tl.program_id(0) // tiles_d).to(tl.int64)  # of [B, splits]
    b, split = row // splits, (row % splits).to(tl.int32)
    start = split * tokens_per_split
    stop = min(start + tokens_per_split, T)
    in_cols = (cols < D)[None, :]
    ids_ptr += b * T
    if mask_ptr is not None:
        mask_ptr += b * T

    empty = 0.0 if MEAN else float("-inf")
    # acc, first [BLOCK_T, BLOCK_D]; counts [BLOCK_T]
    acc = tl.full((BLOCK_T, BLOCK_D), empty, tl.float32)
    first = tl.full((BLOCK_T, BLOCK_D), _NO_TOKEN, tl.int32)
    counts = tl.zeros((BLOCK_T,), tl.int32)
    for t in range(start, stop, BLOCK_T):
        tokens = t + tl.arange(0, BLOCK_T)
        keep = tokens < stop
        if mask_ptr is not None:
            keep = keep & (tl.load(mask_ptr + tokens, mask=keep, other=0) != 0)
        counts += keep.to(tl.int32)
        # [BLOCK_T]
        ids = tl.load(ids_ptr + tokens, mask=keep, other=0).to(tl.int64)
        known = (ids >= 0) & (ids < V)
        rows = table_ptr + tl.where(known, ids, 0)[:, None] * stride_v + cols[None, :]
        # [BLOCK_T, BLOCK_D]: rows of the table; B T D is never stored
        values = tl.load(rows, mask=keep[:, None] & in_cols, other=0.0).to(tl.float32)
        values = tl.where(known[:, None], values, float("nan"))
        values = tl.where(keep[:, None], values, empty)
        if MEAN:
            acc += values
        else:
            if winner_ptr is not None:
                # The first of several NaN, and the first token at all, if only of -inf.
                better = (values > acc) | ((values != values) & (acc == acc))
                better = (better | (first == _NO_TOKEN)) & keep[:, None]
                first = tl.where(better, tokens[:, None], first)
            acc = tl.maximum(acc, values, propagate_nan=tl.PropagateNan.ALL)

    count = tl.sum(counts, axis=0)
    if MEAN:
        # [BLOCK_D]
        value = tl.sum(acc, axis=0)
    else:
        # [BLOCK_D]
        value = tl.max(acc, axis=0)
        undefined = acc != acc
        value = tl.where(tl.max(undefined.to(tl.int32), axis=0) > 0, float("nan"), value)
        if winner_ptr is not None:
            reached = (acc == value[None, :]) | undefined
            token = tl.min(tl.where(reached, first, _NO_TOKEN), axis=0)
            found = token != _NO_TOKEN
            winner = tl.load(ids_ptr + tl.where(found, token, 0), mask=found, other=-1)
            # [BLOCK_D] int32
            tl.store(winner_ptr + row * D + cols, winner.to(tl.int32), mask=cols < D)
    if count_ptr is None:
        value = _finished(value, count, MEAN)
    else:
        tl.store(count_ptr + row, count)  # the same from every block of columns
    # [BLOCK_D]
    tl.store(pooled_ptr + row * D + cols, value.to(pooled_ptr.dtype.element_ty), mask=cols < D)


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    part_ptr,
    part_winner_ptr,
    count_ptr,
    pooled_ptr,
    winner_ptr,
    D,
    splits,
    MEAN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """pooled, winner [B, D] from the parts [B, splits, D] of `_pool_kernel`, first part first."""
    tiles_d = tl.cdiv(D, BLOCK_D)
    cols = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    in_cols = cols < D
    b = (tl.program_id(0) // tiles_d).to(tl.int64)
    count_ptr += b * splits
    offsets = b * splits * D + cols
    value = tl.full((BLOCK_D,), 0.0 if MEAN else float("-inf"), tl.float32)
    winner = tl.full((BLOCK_D,), -1, tl.int32)
    count = 0
    for s in tl.range(0, splits, loop_unroll_factor=4):
        # [BLOCK_D]
        part = tl.load(part_ptr + offsets, mask=in_cols, other=0.0)
        count += tl.load(count_ptr + s)
        if MEAN:
            value += part
        else:
            if winner_ptr is not None:
                ids = tl.load(part_winner_ptr + offsets, mask=in_cols, other=-1)
                better = (part > value) | ((part != part) & (value == value)) | (winner < 0)
                winner = tl.where(better, ids, winner)
            value = tl.maximum(value, part, propagate_nan=tl.PropagateNan.ALL)
        offsets += D
    pooled = _finished(value, count, MEAN)
    # [BLOCK_D]
    tl.store(pooled_ptr + b * D + cols, pooled.to(pooled_ptr.dtype.element_ty), mask=in_cols)
    if winner_ptr is not None:
        tl.store(winner_ptr + b * D + cols, winner, mask=in_cols)


@triton.jit(do_not_specialize=["B", "V"])
def _max_grad_kernel(
    dy_ptr,
    sorted_ptr,
    order_ptr,
    d_table_ptr,
    B,
    V,
    D,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """d_table[v, d] = sum of dy[b, d] over the samples, sorted by winner in column d, that have v.

    The program at place i of the order sums, in each column, the run of equal winners that begins
    there.
    """
    tiles_d = tl.cdiv(D, BLOCK_D)
    cols = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    i = tl.program_id(0) // tiles_d
    own_ptrs = sorted_ptr + i.to(tl.int64) * D + cols
    # [BLOCK_D]: the winner of each column at this place and at the one before
    own = tl.load(own_ptrs, mask=cols < D, other=-1)
    before = tl.load(own_ptrs - D, mask=cols < tl.where(i > 0, D, 0), other=-1)
    begins = (own >= 0) & (own < V) & (own != before)
    # [BLOCK_B, BLOCK_D]
    acc = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    start = i
    longest = tl.max(begins.to(tl.int32), axis=0) * BLOCK_B
    while longest == BLOCK_B:  # some run reaches the end of the tile before
        places = start + tl.arange(0, BLOCK_B)
        offsets = places.to(tl.int64)[:, None] * D + cols[None, :]
        # winner, b, dy [BLOCK_B, BLOCK_D]; the last two of the runs alone
        mask = (places < B)[:, None] & begins[None, :]
        winner = tl.load(sorted_ptr + offsets, mask=mask, other=-1)
        in_run = mask & (winner == own[None, :])
        b = tl.load(order_ptr + offsets, mask=in_run, other=0)
        dy = tl.load(dy_ptr + b * D + cols[None, :], mask=in_run, other=0.0)
        acc += dy.to(tl.float32)
        longest = tl.max(tl.sum(in_run.to(tl.int32), axis=0), axis=0)
        start += BLOCK_B
    d_table_ptrs = d_table_ptr + own.to(tl.int64) * D + cols
    # [BLOCK_D], each column into the row of its winner
    tl.store(d_table_ptrs, tl.sum(acc, axis=0).to(d_table_ptr.dtype.element_ty), mask=begins)


@triton.jit(do_not_specialize=["T", "V"])
def _mean_grad_kernel(
    dy_ptr,
    share_ptr,
    sorted_ptr,
    order_ptr,
    end_ptr,
    d_table_ptr,
    T,
    V,
    D,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """d_table[v] = sum of share[b] * dy[b] over the tokens, sorted by id, that are v.

    The program at the first of a run of equal ids sums the run up to `end`; the others end early.
    """
    tiles_d = tl.cdiv(D, BLOCK_D)
    cols = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    in_cols = cols < D
    i = tl.program_id(0) // tiles_d
    own = tl.load(sorted_ptr + i)
    before = tl.load(sorted_ptr + i - 1, mask=i > 0, other=-1)
    sums = (own >= 0) & (own < V) & (own != before)
    stop = tl.where(sums, tl.load(end_ptr + i).to(tl.int32), i)
    # [BLOCK_T, BLOCK_D]
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(i, stop, BLOCK_T):
        places = start + tl.arange(0, BLOCK_T)
        in_run = places < stop
        # [BLOCK_T]: the sample of each token of the run, and 1 / its count
        b = tl.load(order_ptr + places, mask=in_run, other=0) // T
        share = tl.load(share_ptr + b, mask=in_run, other=0.0)
        offsets = b[:, None] * D + cols[None, :]
        # [BLOCK_T, BLOCK_D]
        dy = tl.load(dy_ptr + offsets, mask=in_run[:, None] & in_cols[None, :], other=0.0)
        acc += share[:, None] * dy.to(tl.float32)
    d_table_ptrs = d_table_ptr + own.to(tl.int64) * D + cols
    total = tl.sum(acc, axis=0).to(d_table_ptr.dtype.element_ty)
    # A vector mask & a scalar is no mask to the interpreter.
    tl.store(d_table_ptrs, total, mask=cols < tl.where(sums, D, 0))


def pool_tokens_fwd(
    input_ids: Tensor, table: Tensor, mask: Tensor | None, pooling: str, keep_winner: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Pools the embeddings of token ids.

    Args:
        input_ids: Of shape `[B, T]`, int32 or int64. Ids outside of the table give NaN.
        table: Of shape `[V, D]`, float32, float16 or bfloat16, V below 2^31.
        mask: Of shape `[B, T]`, any dtype, zero where a token takes no part; or None. Embeddings
            of such tokens are not read, and a row without any other gives zeros.
        pooling: "max" or "mean".
        keep_winner: Whether the backward of "max" is wanted.

    Returns:
        The pooled embeddings `[B, D]` in table's dtype, and with `keep_winner` the id `[B, D]`
        (int32) that gave each maximum, the first in the sequence if several did, -1 for none.

    Raises:
        ValueError: if the tensors are not on a CUDA device (unless the interpreter runs).
    """
    inputs = [table, input_ids] + ([] if mask is None else [mask])
    pooled, winner = planned(
        ("pool_tokens", mask is None, pooling, keep_winner),
        inputs,
        [True, keep_winner],
        lambda: _pooled(input_ids, table, mask, pooling, keep_winner),
    )
    return cast(Tensor, pooled), winner


def _pooled(
    input_ids: Tensor, table: Tensor, mask: Tensor | None, pooling: str, keep_winner: bool
) -> Results:
    (B, T), (V, D) = input_ids.shape, table.shape
    traits = common.device_traits(table.device)
    pooled = table.new_empty((B, D))
    winner = pooled.new_empty((B, D), dtype=torch.int32) if keep_winner else None
    if T == 0 or pooled.numel() == 0:
        return [pooled.zero_(), None if winner is None else winner.fill_(-1)]
    if table.stride(1) != 1:
        table = table.contiguous()
    mean = pooling == "mean"
    block_t, block_d = _block(traits, D, table.element_size())
    columns = cdiv(D, block_d)
    # Four programs per multiprocessor, each at least two steps long.
    splits = min(cdiv(4 * traits.num_sms, B * columns), cdiv(T, 2 * block_t))
    tokens_per_split = round_up(cdiv(T, splits), block_t)
    splits = cdiv(T, tokens_per_split)
    part, part_winner, count = pooled, winner, None
    if splits > 1:
        part = pooled.new_empty((B, splits, D), dtype=torch.float32)
        count = part.new_empty((B, splits), dtype=torch.int32)
        if winner is not None:
            part_winner = winner.new_empty((B, splits, D))
    with torch.cuda.device_of(table):
        launch(
            _pool_kernel,
            (B * splits * columns,),
            input_ids.contiguous(),
            _bytes(mask),
            table,
            part,
            part_winner,
            count,
            T,
            V,
            D,
            splits,
            tokens_per_split,
            table.stride(0),
            MEAN=mean,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            num_warps=4,
        )
        if count is not None:
            merge_d = min(block_d, 256)
            launch(
                _merge_kernel,
                (B * cdiv(D, merge_d),),
                part,
                part_winner,
                count,
                pooled,
                winner,
                D,
                splits,
                MEAN=mean,
                BLOCK_D=merge_d,
                num_warps=4,
            )
    return [pooled, winner]


def pool_tokens_bwd(
    dy: Tensor,
    input_ids: Tensor,
    mask: Tensor | None,
    winner: Tensor | None,
    vocabulary: int,
    pooling: str,
) -> Tensor:
    """Returns the gradient of `pool_tokens_fwd` with respect to the table; deterministic.

    Args:
        dy: Of shape `[B, D]`, any strides.
        input_ids, mask, pooling: As in the forward; the ids and the mask are read for "mean" only.
        winner: Of shape `[B, D]`, as the forward returned it; read for "max" only.
        vocabulary: V, the rows of the table.

    Returns:
        Of shape `[V, D]` in dy's dtype, zero in the rows of ids that took no part.

    Raises:
        ValueError: as in the forward.
    """
    (B, T), D = input_ids.shape, dy.shape[1]
    traits = common.device_traits(dy.device)
    d_table = dy.new_zeros((vocabulary, D))
    if B == 0 or T == 0 or d_table.numel() == 0:
        return d_table
    dy = dy.contiguous()
    block_b, block_d = (16 if D % 16 == 0 else 8), 128
    if traits.capability == 0:
        block_b, block_d = 4, 16
    columns = cdiv(D, block_d)
    with torch.cuda.device_of(dy):
        if pooling == "max":
            assert winner is not None
            ordered, order = winner.contiguous().sort(dim=0, stable=True)
            _max_grad_kernel[(B * columns,)](
                dy,
                ordered.contiguous(),
                order.contiguous(),
                d_table,
                B,
                vocabulary,
                D,
                BLOCK_B=block_b,
                BLOCK_D=block_d,
                num_warps=4,
            )
            return d_table
        share, ids = dy.new_full((B,), 1 / T, dtype=torch.float32), input_ids
        if mask is not None:
            keep = mask != 0
            share = keep.sum(1).clamp(min=1).to(torch.float32).reciprocal()
            ids = torch.where(keep, input_ids, vocabulary)
        ordered, order = ids.flatten().sort(stable=True)
        _mean_grad_kernel[(B * T * columns,)](
            dy,
            share,
            ordered,
            order,
            torch.searchsorted(ordered, ordered, right=True),
            d_table,
            T,
            vocabulary,
            D,
            BLOCK_T=block_b,
            BLOCK_D=block_d,
            num_warps=4,
        )
    return d_table


def _block(traits: DeviceTraits, columns: int, itemsize: int) -> tuple[int, int]:
    """Rows and columns of a tile: 8 KB of the table, less where loads are not vectors."""
    if traits.capability == 0:
        return 4, 16
    block_d = min(1024 // itemsize, triton.next_power_of_2(columns))
    elements = 8192 // itemsize if columns % 16 == 0 else 2048
    return min(64, elements // block_d), block_d


def _bytes(mask: Tensor | None) -> Tensor | None:
    """Returns the mask without strides; booleans as bytes, which kernels can read."""
    if mask is None:
        return None
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask).contiguous()
