"""The rank term of a GEMM once more, over the adapters that are there.

An adapter without weight has coefficients of +0. Times an infinity in its factors they are NaN.
"""
# ruff: noqa: N803 - kernel arguments keep the letters of the formulas
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from sapt_fast.triton_kernels.blocks.dropout import keeps


@triton.jit
def any_undefined(tile):
    return tl.max(tl.max((tile != tile).to(tl.int32), axis=1), axis=0) > 0


@triton.jit
def is_absent(coefficient):
    """Returns whether a float32 of `shrink_tiles.weighted` marks an adapter without weight."""
    return coefficient.to(tl.int32, bitcast=True) == 0


@triton.jit
def write_present(
    y_ptr,
    p_ptr,
    q_ptr,
    first_row,
    first_col,
    M,
    N,
    start,
    stop,
    stride_pm,
    stride_qr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    COMPUTE: tl.constexpr,
    seed_ptr=None,
    drops=None,
):
    """A tile of y = [y +] p[:, start:stop] q[start:stop] over the p that are not absent.

    With a seed, the product is 0 where dropout drops y's element.

    By 16 columns at a time and through memory, for which there are registers in any kernel.
    """
    rows = first_row + tl.arange(0, BLOCK_M)
    safe_rows = tl.where(rows < M, rows, 0).to(tl.int64)
    for col in tl.range(first_col, first_col + BLOCK_N, 16, num_stages=1):
        cols = col + tl.arange(0, 16)
        y_ptrs = y_ptr + safe_rows[:, None] * N + cols[None, :]
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        # [BLOCK_M, 16]
        acc = tl.zeros((BLOCK_M, 16), tl.float32)
        if ACCUMULATE and seed_ptr is None:
            acc += tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
        p_ptrs = p_ptr + safe_rows * stride_pm + start
        q_ptrs = q_ptr + start.to(tl.int64) * stride_qr + cols
        for _ in tl.range(start, stop, num_stages=1):
            # p [BLOCK_M, 1], q [1, 16]: one rank column at a time
            p = tl.load(p_ptrs).to(tl.float32)[:, None]
            q = tl.load(q_ptrs, mask=cols < N, other=0.0).to(COMPUTE).to(tl.float32)[None, :]
            acc += tl.where(is_absent(p), 0.0, p * q)
            p_ptrs += 1
            q_ptrs += stride_qr
        if seed_ptr is not None:
            acc = tl.where(keeps(tl.load(seed_ptr), rows, cols, drops), acc, 0.0)
            if ACCUMULATE:
                acc += tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
        # [BLOCK_M, 16]
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)
    tl.debug_barrier()  # what one thread has written another reads
