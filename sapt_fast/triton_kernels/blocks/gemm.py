"""GEMM whose reduction runs over two sources: y = [y +] a @ b + p @ q + bias.

The rank term `p @ q` of a low-rank update is accumulated in the registers that already hold the
base product, so the update costs neither a second pass over y nor a concatenated copy of the
operands. The sources are two loops, one after the other: one loop that switches pointers is not
pipelined.
"""
# ruff: noqa: N803 - kernel arguments keep the letters of the formulas
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sapt_fast.triton_kernels.blocks import common, gemm_tiles
from sapt_fast.triton_kernels.blocks.common import (
    RANK_ALIGN,
    DeviceTraits,
    TileConfig,
    cdiv,
    pointer_of,
    round_up,
)
from sapt_fast.triton_kernels.blocks.dropout import keeps
from sapt_fast.triton_kernels.blocks.plans import launch
from sapt_fast.triton_kernels.blocks.present import any_undefined, write_present
from sapt_fast.triton_kernels.blocks.shrink_tiles import products_in_parts, sum_of_parts

_GROUP_M = 8


@triton.jit
def _tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column tile of a program; GROUP_M row tiles share their column tiles in L2."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit(do_not_specialize=["parts", "drops", "M", "R", "rank_lo", "rank_hi"])
def _gemm_kernel(
    a_ptr, b_ptrs, parts_ptr, parts, p_ptrs, q_ptrs, bias_ptrs, seed_ptrs, drops, y_ptrs,
    M, N, K, R, rank_lo, rank_hi, stride_am, stride_bk, stride_bn, stride_pm, stride_qr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, ACCUMULATE: tl.constexpr,
    BIAS_HAS_ROWS: tl.constexpr, FEW_ROWS: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of y[M, N] = [y +] a[M, K] b[K, N] + p[M, lo:hi] q[lo:hi, N] + bias, by pointers.

    There may be several y of one a. a b is summed here, or was by `products_in_parts` in
    parts[s, M, each N rounded up to 16]. bias is [N], or [M, N] with BIAS_HAS_ROWS. Absent sources
    are None. `rank_lo` and `rank_hi` count groups of 16 rank columns; p is zero in the columns that
    pad R. A p of +0 means that the adapter is not there, so that an infinity in its q is not seen:
    a tile that got a NaN from the rank term computes this term once more. That term comes first, so
    that nothing else has to be. With seeds, it is 0 where dropout drops y's element.
    """
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    member, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    y_ptr = pointer_of(member, y_ptrs)
    tile_m, tile_n = _tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_cols = (rows < M)[:, None], (cols < N)[None, :]
    # Rows past the end wrap to 0, which spares a mask and its registers; of few rows that would
    # read a as often as the tile has rows. Columns that wrap are no longer known to be contiguous.
    safe_rows = tl.where(rows < M, rows, 0).to(tl.int64)
    if FEW_ROWS:  # noqa: SIM108 - Triton has no conditional expression on tensors
        read_rows = in_rows
    else:
        read_rows = tl.full((BLOCK_M, 1), True, tl.int1)
    # [BLOCK_M, BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    if p_ptrs is not None:
        p_ptr, q_ptr = pointer_of(member, p_ptrs), pointer_of(member, q_ptrs)
        lo, hi = rank_lo * 16, rank_hi * 16
        tl.assume(hi > lo)
        offs_r = tl.arange(0, BLOCK_R)
        p_ptrs = p_ptr + safe_rows[:, None] * stride_pm + (lo + offs_r)[None, :]
        q_ptrs = q_ptr + (lo + offs_r).to(tl.int64)[:, None] * stride_qr + cols[None, :]
        for r in range(lo, hi, BLOCK_R):
            # p [BLOCK_M, BLOCK_R], q [BLOCK_R, BLOCK_N]
            p = tl.load(p_ptrs, mask=read_rows & (offs_r[None, :] < hi - r), other=0.0)
            in_rank = offs_r[:, None] < min(hi, R) - r
            q = tl.load(q_ptrs, mask=in_rank & in_cols, other=0.0)
            # rank term; p has the weights applied
            acc = tl.dot(p.to(COMPUTE), q.to(COMPUTE), acc, input_precision=PRECISION)
            p_ptrs += BLOCK_R
            q_ptrs += BLOCK_R * stride_qr
        seed_ptr = None if seed_ptrs is None else pointer_of(member, seed_ptrs)
        if seed_ptrs is not None:
            acc = tl.where(keeps(tl.load(seed_ptr), rows, cols, drops), acc, 0.0)
        # 0 times an infinity: once more, over the adapters that are there
        if any_undefined(acc):
            write_present(
                y_ptr, p_ptr, q_ptr, tile_m * BLOCK_M, tile_n * BLOCK_N, M, N, lo, min(hi, R),
                stride_pm, stride_qr, BLOCK_M, BLOCK_N, ACCUMULATE, COMPUTE, seed_ptr, drops,
            )  # fmt: skip
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if not ACCUMULATE:
                acc += tl.load(y_ptr + safe_rows[:, None] * N + cols[None, :], mask=in_cols).to(
                    tl.float32
                )

    if a_ptr is not None:
        tl.assume(K > 0)
        offs_k = tl.arange(0, BLOCK_K)
        a_ptrs = a_ptr + safe_rows[:, None] * stride_am + offs_k[None, :]
        b_offsets = cols.to(tl.int64)[None, :] * stride_bn + offs_k[:, None] * stride_bk
        b_tile_ptrs = pointer_of(member, b_ptrs) + b_offsets
        for k in range(0, K, BLOCK_K):
            if EVEN_K:
                # a [BLOCK_M, BLOCK_K], b [BLOCK_K, BLOCK_N]
                a = tl.load(a_ptrs, mask=read_rows, other=0.0)
                b = tl.load(b_tile_ptrs, mask=in_cols, other=0.0)
            else:
                a = tl.load(a_ptrs, mask=read_rows & (offs_k[None, :] < K - k), other=0.0)
                b = tl.load(b_tile_ptrs, mask=(offs_k[:, None] < K - k) & in_cols, other=0.0)
            # base product
            acc = tl.dot(a.to(COMPUTE), b.to(COMPUTE), acc, input_precision=PRECISION)
            a_ptrs += BLOCK_K
            b_tile_ptrs += BLOCK_K * stride_bk
    if parts_ptr is not None:
        width = tl.cdiv(N, 16) * 16
        stride = width * len(y_ptrs)
        part_offsets = rows.to(tl.int64)[:, None] * stride + (member * width + cols)[None, :]
        part_size = M.to(tl.int64) * stride
        # [BLOCK_M, BLOCK_N]
        acc += sum_of_parts(
            parts_ptr, parts, part_offsets, part_size, in_rows & in_cols, BLOCK_M, BLOCK_N
        )

    offsets = rows.to(tl.int64)[:, None] * N + cols[None, :]
    mask = in_rows & in_cols
    if bias_ptrs is not None:
        bias_ptr = pointer_of(member, bias_ptrs)
        if BIAS_HAS_ROWS:
            # [BLOCK_M, BLOCK_N]
            acc += tl.load(bias_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        else:
            # [BLOCK_N]
            acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offsets
    if ACCUMULATE:
        acc += tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    # [BLOCK_M, BLOCK_N] in y's dtype: rounded once
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["drops", "M", "R", "rank_lo", "rank_hi"])
def _gemm_tma_kernel(
    a_0, a_1, a_2, b_0, b_1, b_2, p_0, p_1, p_2, q_0, q_1, q_2, y_0, y_1, y_2,
    p_ptrs, q_ptrs, bias_ptrs, seed_ptrs, drops, y_ptrs,
    M, N, K, R, rank_lo, rank_hi, stride_pm, stride_qr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, B_IS_NK: tl.constexpr, ACCUMULATE: tl.constexpr,
    COMPUTE: tl.constexpr, SOURCES: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    """`_gemm_kernel` by tensor descriptors; each program walks over the tiles of every y.

    Either there is a y for each source, or one y is the sum over all. Without a_1 all have a_0.
    Descriptors read zeros out of range, so nothing is masked. With B_IS_NK the descriptor of b
    holds its transpose [N, K]. Sources and outs are unrolled: a descriptor cannot be selected.
    """
    a_descs, b_descs, p_descs = (a_0, a_1, a_2), (b_0, b_1, b_2), (p_0, p_1, p_2)
    q_descs, y_descs = (q_0, q_1, q_2), (y_0, y_1, y_2)
    each: tl.constexpr = SOURCES // OUTS
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    lo, hi = rank_lo * 16, rank_hi * 16
    # Without these facts the compiler must guard empty loops, and then serialises the wgmma.
    if a_0 is not None:
        tl.assume(K > 0)
    if p_0 is not None:
        tl.assume(hi > lo)
    first_tile = tl.program_id(0)
    for out in tl.static_range(OUTS):
        y_desc, y_ptr = y_descs[out], y_ptrs[out]
        for tile in range(first_tile, tiles, tl.num_programs(0)):
            tile_m, tile_n = _tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
            row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
            # What y holds comes in first: behind the loops it would need registers beside the sum.
            if ACCUMULATE:
                acc = y_desc.load([row, col]).to(tl.float32)
            else:
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if p_0 is not None:
                for source in tl.static_range(out * each, out * each + each):
                    before = acc
                    if seed_ptrs is not None:
                        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                    for r in range(lo, hi, BLOCK_R):
                        # p [BLOCK_M, BLOCK_R], q [BLOCK_R, BLOCK_N]
                        p = p_descs[source].load([row, r])
                        q = q_descs[source].load([r, col])
                        acc = tl.dot(p.to(COMPUTE), q.to(COMPUTE), acc, input_precision="ieee")
                    if seed_ptrs is not None:
                        y_rows, y_cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
                        stays = keeps(tl.load(seed_ptrs[source]), y_rows, y_cols, drops)
                        acc = before + tl.where(stays, acc, 0.0)
                if any_undefined(acc):
                    for source in tl.static_range(out * each, out * each + each):
                        write_present(
                            y_ptr, p_ptrs[source], q_ptrs[source], row, col, M, N, lo, min(hi, R),
                            stride_pm, stride_qr, BLOCK_M, BLOCK_N,
                            ACCUMULATE or source > out * each, COMPUTE,
                            None if seed_ptrs is None else seed_ptrs[source], drops,
                        )  # fmt: skip
                    rows = row + tl.arange(0, BLOCK_M)
                    y_tile_ptrs = y_ptr + tl.where(rows < M, rows, 0).to(tl.int64)[:, None] * N
                    cols = col + tl.arange(0, BLOCK_N)
                    acc = tl.load(y_tile_ptrs + cols[None, :], mask=(cols < N)[None, :])
                    acc = acc.to(tl.float32)
            if a_0 is not None:
                for source in tl.static_range(out * each, out * each + each):
                    for k in range(0, K, BLOCK_K):
                        # a [BLOCK_M, BLOCK_K], b [BLOCK_K, BLOCK_N]
                        if a_1 is None:  # noqa: SIM108 - Triton has none on tensors
                            a = a_0.load([row, k])
                        else:
                            a = a_descs[source].load([row, k])
                        if B_IS_NK:
                            b = b_descs[source].load([col, k]).T
                        else:
                            b = b_descs[source].load([k, col])
                        acc = tl.dot(a.to(COMPUTE), b.to(COMPUTE), acc, input_precision="ieee")
            if bias_ptrs is not None:
                cols = col + tl.arange(0, BLOCK_N)
                # [BLOCK_N]
                bias = tl.load(bias_ptrs[out] + cols, mask=cols < N, other=0.0)
                acc += bias.to(tl.float32)[None, :]
            # [BLOCK_M, BLOCK_N]
            y_desc.store([row, col], acc.to(y_desc.dtype))
        # A program goes on as if the tiles of all outs were one sequence.
        programs = tl.num_programs(0)
        first_tile = (first_tile + programs - tiles % programs) % programs


def _descriptor(matrix: Tensor, shape: tuple[int, int], rows: int, cols: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(shape), [matrix.stride(0), 1], [rows, cols])


def is_aligned(matrix: Tensor | None) -> bool:
    """Every row starts at a multiple of 16 bytes, as descriptors and vector loads want it."""
    if matrix is None:
        return True
    row_bytes = max(matrix.stride()) * matrix.element_size()
    return matrix.data_ptr() % 16 == 0 and row_bytes % 16 == 0


class Operands(NamedTuple):
    """What a y is computed from: a @ b + p[:, lo:hi] @ q[lo:hi] + bias."""

    a: Tensor | None  # [M, K], unit column stride; None leaves out the first product
    b: Tensor | None  # [K, N], either stride 1, in a's dtype; None with `a`
    p: Tensor | None  # [M, Rp] in y's dtype, Rp a multiple of 16, zero in the columns from R on
    q: Tensor | None  # [R, N], unit column stride, in y's dtype or float32; None with `p`
    bias: Tensor | None  # [N] or [M, N], contiguous
    seed: Tensor | None = None  # [1] of the dropout that the product p @ q meets

    def kind(self) -> Hashable:
        """Equal for those that one launch may serve."""
        layouts = [None if t is None else (t.shape, t.stride(), t.dtype) for t in self]
        return (*layouts, all(is_aligned(t) for t in self[:4]))


MAX_SOURCES = 3
"""Members of a group of products by descriptors: queries, keys and values."""


def gemm_group(
    members: Sequence[Operands],
    rank_window: tuple[int, int],
    ys: Sequence[Tensor],
    *,
    accumulate: bool = False,
    descriptors: bool = True,
    tile: TileConfig | None = None,
    precision: str | None = None,
    drops: int = 0,
) -> None:
    """Writes into each y its member's products and bias, or into the only y those of all members.

    What p is exactly 0 for takes no part, whatever q holds there. One launch serves the group, or
    without tensor descriptors each member of a sum.

    Args:
        members: Up to `MAX_SOURCES` of one `kind`; for several ys with one a.
        rank_window: The columns lo:hi of p that take part, both multiples of 16.
        ys: Of shape `[M, N]`, contiguous, not empty.
        accumulate: Add to what the ys hold.
        descriptors: Read and write by tensor descriptors where the device and the operands allow.
        tile: Taken if it is one of `gemm_tiles.candidates`; otherwise the one that should be best.
        precision: Of float32 products, as `tl.dot` takes it; by default torch's setting decides.
        drops: Of `Dropout`, where the members have a seed.
    """
    a, b, p, q, bias, _ = members[0]
    y = ys[0]
    M, N = y.shape
    K = 0 if a is None else a.shape[1]
    itemsize, factor_itemsize = y.element_size(), (y if q is None else q).element_size()
    traits = common.device_traits(y.device)
    lo, hi = rank_window[0] // RANK_ALIGN, rank_window[1] // RANK_ALIGN
    rank = 0 if p is None else rank_window[1] - rank_window[0]
    precision = precision or common.float32_precision(y.dtype)
    meta = {
        "BLOCK_R": gemm_tiles.rank_block(rank, itemsize, factor_itemsize),
        "GROUP_M": _GROUP_M,
        "ACCUMULATE": accumulate,
        "COMPUTE": common.compute_dtype(y.dtype),
    }
    aligned = all(is_aligned(t) for t in (a, b, p, q, *ys))
    bias_has_rows = bias is not None and bias.dim() == 2
    summed = len(members) // len(ys)
    product = gemm_tiles.Product(
        M, N * len(ys), K * summed, rank * summed, itemsize, aligned,
        descriptors and not bias_has_rows, tf32=precision == "tf32", drops=drops > 0,
    )  # fmt: skip
    chosen = tile
    if tile not in gemm_tiles.candidates(traits, product):
        tile = gemm_tiles.chosen(traits, product)
    by_descriptors = tile.parts == 1 and gemm_tiles.takes_descriptors(traits, product)
    if summed > 1 and not by_descriptors:
        for i, member in enumerate(members):
            gemm_group(
                [member], rank_window, ys, accumulate=accumulate or i > 0, descriptors=descriptors,
                tile=chosen, precision=precision, drops=drops,
            )  # fmt: skip
        return
    with torch.cuda.device_of(y):
        if by_descriptors:
            _launch_by_descriptors(members, ys, lo, hi, tile, traits, meta, drops)
            return
        _, bs, *others = _fields(members)
        parts = None
        if a is not None and b is not None and bs is not None and tile.parts > 1:
            width, strides = round_up(N, RANK_ALIGN), (b.stride(1), b.stride(0))
            window = 0, [N] * len(ys)
            parts = products_in_parts([a], bs, strides, window, width * len(ys), tile, precision)
            a, b, bs, K, tile = None, None, None, 0, gemm_tiles.sum_tile(traits)
        launch(
            _gemm_kernel, (len(ys) * cdiv(M, tile.m) * cdiv(N, tile.n),),
            a, bs, parts, 0 if parts is None else parts.shape[0], *others, drops, tuple(ys),
            M, N, K, 0 if q is None else q.shape[0], lo, hi,
            0 if a is None else a.stride(0),
            0 if b is None else b.stride(0), 0 if b is None else b.stride(1),
            0 if p is None else p.stride(0), 0 if q is None else q.stride(0),
            **tile.launch_options(), **meta, EVEN_K=K % tile.k == 0,
            BIAS_HAS_ROWS=bias_has_rows, FEW_ROWS=gemm_tiles.FEW_ROWS >= M, PRECISION=precision,
        )  # fmt: skip


def two_source_gemm(
    a: Tensor | None,
    b: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    bias: Tensor | None,
    rank_window: tuple[int, int],
    y: Tensor,
    **options: Any,
) -> Tensor:
    """`gemm_group` of one member, with its options."""
    gemm_group([Operands(a, b, p, q, bias)], rank_window, [y], **options)
    return y


def _fields(members: Sequence[Operands]) -> list[tuple[Tensor, ...] | None]:
    """Each operand of all members; None if they have none."""
    return [None if each[0] is None else each for each in zip(*members, strict=True)]


def _launch_by_descriptors(
    members: Sequence[Operands],
    ys: Sequence[Tensor],
    lo: int,
    hi: int,
    tile: TileConfig,
    traits: DeviceTraits,
    meta: dict[str, Any],
    drops: int,
) -> None:
    """Fills the ys by `_gemm_tma_kernel`; lo and hi count groups of rank columns."""
    M, N = ys[0].shape
    a, b, p, q, *_ = members[0]
    K = 0 if a is None else a.shape[1]
    block_r = meta["BLOCK_R"]
    b_is_nk = b is not None and b.stride(0) == 1
    operands: list[list[TensorDescriptor]] = [[], [], [], [], []]
    for i, member in enumerate(members):
        if member.a is not None and member.b is not None:
            if i == 0 or len(ys) == 1:
                operands[0].append(_descriptor(member.a, (M, K), tile.m, tile.k))
            if b_is_nk:
                operands[1].append(_descriptor(member.b.t(), (N, K), tile.n, tile.k))
            else:
                operands[1].append(_descriptor(member.b, (K, N), tile.k, tile.n))
        if member.p is not None and member.q is not None:
            operands[2].append(_descriptor(member.p, (M, hi * RANK_ALIGN), tile.m, block_r))
            # Rows behind the window are out of range too: 0 times an infinity there would be a NaN.
            rank_end = min(member.q.shape[0], hi * RANK_ALIGN)
            operands[3].append(_descriptor(member.q, (rank_end, N), block_r, tile.n))
    operands[4] = [_descriptor(y, (M, N), tile.m, tile.n) for y in ys]
    filled = [d for each in operands for d in [*each, None, None, None][:MAX_SOURCES]]
    tiles = cdiv(M, tile.m) * cdiv(N, tile.n) * len(ys)
    launch(
        _gemm_tma_kernel, (min(tiles, traits.num_sms),),
        *filled, *_fields(members)[2:], drops, tuple(ys), M, N, K,
        0 if q is None else q.shape[0], lo, hi,
        0 if p is None else p.stride(0), 0 if q is None else q.stride(0),
        **tile.launch_options(), **meta, B_IS_NK=b_is_nk, SOURCES=len(members), OUTS=len(ys),
    )  # fmt: skip


@torch.no_grad()
def expand_first_group(
    members: Sequence[Operands],
    rank_window: tuple[int, int],
    ys: Sequence[Tensor],
    *,
    accumulate: bool = False,
    drops: int = 0,
) -> None:
    """`gemm_group` in two steps: the rank terms into the ys, then cuBLAS adds each a @ b onto it.

    The product reads `y` while it computes; expanding after it would read and write `y` in the
    open. Arguments as of `gemm_group`, except that `a` and `b` are given, and no bias is with
    `accumulate`.
    """
    if members[0].p is not None:
        terms = [member._replace(a=None, b=None) for member in members]
        gemm_group(terms, rank_window, ys, accumulate=accumulate, drops=drops)
        accumulate = True
    for i, (a, b, _, _, bias, _) in enumerate(members):
        y = ys[i % len(ys)]
        if a is None or b is None:
            raise ValueError("members: got one without a and b, expected both")
        if accumulate or i >= len(ys):
            y.addmm_(a, b)
        elif bias is None:
            torch.mm(a, b, out=y)
        else:
            torch.addmm(bias, a, b, out=y)
