"""Mixed LoRA on the CPU: stacked GEMMs by torch, everything between them by ``sapt_fast._C``.

The contract of both functions is that of the reference in ``sapt_fast.ops.mixed_lora``. Small M
(decoding) runs as one call, the base product included.
"""

from typing import Any

import torch
from torch import Tensor

from sapt_fast import _C  # torch comes first: both must use the OpenMP runtime that torch brings

_CODES = {
    torch.float32: _C.FLOAT32,
    torch.bfloat16: _C.BFLOAT16,
    torch.float16: _C.FLOAT16,
    torch.float64: _C.FLOAT64,
}
# Up to this many rows reading the weights bounds the time, and one call beats GEMMs.
_DECODE_ROWS = 8


def mixed_lora_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mixture: Tensor,
    row_adapter: Tensor,
    row_scale: Tensor,
    h_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``x W^T + bias`` plus the mixture.

    Returns:
        y [M, O] in x's dtype and h = x A^T, [M, R], in ``h_dtype`` (x's dtype when None).
    """
    x = x.contiguous()
    dtype = h_dtype or x.dtype
    table = _table(mixture, row_adapter, row_scale, dtype)
    if x.shape[0] <= _DECODE_ROWS and dtype == x.dtype:
        return _decode(x, weight, bias, lora_a, lora_b, table)
    h = _multiply_nt(x.to(dtype), lora_a.to(dtype))
    hw = _weighted(h, table)
    y = _two_products(x, _transposed(weight), bias, hw.to(x.dtype), lora_b.to(x.dtype))
    return y, h


def mixed_lora_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mixture: Tensor,
    row_adapter: Tensor,
    row_scale: Tensor,
    h: Tensor,
    train_rows: list[int],
    needs_x: bool,
    needs_mixture: bool,
    grad_through_frozen: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `mixed_lora_fwd`.

    Returns:
        dx [M, I], d_mixture [S, K], d_a [Rt, I], d_b [Rt, O]; None for what was not asked for.
    """
    x, dy = x.contiguous(), dy.contiguous()
    table = _table(mixture, row_adapter, row_scale, h.dtype)
    g = _multiply_nt(dy.to(h.dtype), lora_b.to(h.dtype))
    d_mixture, packed_g, packed_h = _weighted_backward(g, h, table, train_rows, needs_mixture)
    dx = d_a = d_b = None
    if needs_x:
        if grad_through_frozen:
            gw, rows = g, lora_a
        else:
            gw, rows = packed_g, _rows(lora_a, train_rows)
        dx = _two_products(dy, weight, None, gw.to(x.dtype), rows.to(x.dtype))
    if train_rows:
        d_a = _multiply_tn(packed_g.to(x.dtype), x).to(lora_a.dtype)
        d_b = _multiply_tn(packed_h.to(x.dtype), dy).to(lora_b.dtype)
    if d_mixture is not None:
        d_mixture = d_mixture.to(mixture.dtype)
    return dx, d_mixture, d_a, d_b


class _Table:
    """The weights of the ranks as the arguments that all functions of ``_C`` share."""

    def __init__(self, mixture: Tensor, row_adapter: Tensor, row_scale: Tensor) -> None:
        self.tensors = (mixture, row_adapter, row_scale)  # alive as long as the addresses
        self.addresses = tuple(tensor.data_ptr() for tensor in self.tensors)
        self.samples, self.adapters = mixture.shape


def _table(mixture: Tensor, row_adapter: Tensor, row_scale: Tensor, dtype: torch.dtype) -> _Table:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return _Table(
        mixture.to(compute).contiguous(), row_adapter.contiguous(), row_scale.to(compute).contiguous()
    )


def _weighted(h: Tensor, table: _Table) -> Tensor:
    """h times the weight of every rank, a new tensor."""
    rows, ranks = h.shape
    out = torch.empty_like(h)
    _C.weight_ranks(
        _CODES[h.dtype], out.data_ptr(), h.data_ptr(), *table.addresses,
        rows, table.samples, table.adapters, ranks, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _weighted_backward(
    g: Tensor, h: Tensor, table: _Table, train_rows: list[int], needs_mixture: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Multiplies g by the weights, in place, in the pass that makes everything else.

    Returns:
        d_mixture [S, K] or None, and the columns `train_rows` of the weighted g and h, [M, Rt].
    """
    rows, ranks = g.shape
    count = sum(train_rows[1::2]) - sum(train_rows[::2])
    packed_h = g.new_empty(rows, count)
    packed_g = g if count == ranks else g.new_empty(rows, count)
    d_mixture = None
    if needs_mixture:
        make = torch.empty if rows else torch.zeros
        d_mixture = make(table.samples, table.adapters, dtype=table.tensors[0].dtype)
    _C.weight_ranks_backward(
        _CODES[g.dtype], g.data_ptr(), h.contiguous().data_ptr(),
        0 if d_mixture is None else d_mixture.data_ptr(),
        0 if packed_g is g or not count else packed_g.data_ptr(),
        packed_h.data_ptr(), train_rows, *table.addresses,
        rows, table.samples, table.adapters, ranks, torch.get_num_threads(),
    )  # fmt: skip
    return d_mixture, packed_g, packed_h


def _decode(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, table: _Table
) -> tuple[Tensor, Tensor]:
    rows, inputs = x.shape
    ranks, outputs = lora_b.shape
    if x.dtype == torch.float64:
        lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    lora_a, lora_b = lora_a.contiguous(), lora_b.contiguous()
    h = x.new_empty(rows, ranks)
    accumulate = weight is not None and not weight.is_contiguous()
    if accumulate:
        y = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
        weight = bias = None
    else:
        y = x.new_empty(rows, outputs)
    if bias is not None:
        bias = bias.contiguous()
    _C.mixed_lora_decode(
        _CODES[x.dtype], _CODES[lora_a.dtype], y.data_ptr(), h.data_ptr(), x.data_ptr(),
        0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr(),
        lora_a.data_ptr(), lora_b.data_ptr(), *table.addresses,
        rows, inputs, outputs, table.samples, table.adapters, ranks, accumulate,
        torch.get_num_threads(),
    )  # fmt: skip
    return y, h


def _onednn() -> Any:
    """torch's binding of oneDNN's GEMM with a fused addition, or None."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_ONEDNN = _onednn()


def _uses_onednn(x: Tensor) -> bool:
    return (
        _ONEDNN is not None
        and x.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.enabled
    )


def _multiply_nt(x: Tensor, rows: Tensor) -> Tensor:
    """x [M, I] . rows [R, I]^T"""
    if _uses_onednn(x) and rows.numel() and x.numel():
        return _ONEDNN(x, rows, None, "none", [], "")
    return torch.mm(x, rows.t())


def _multiply_tn(packed: Tensor, x: Tensor) -> Tensor:
    """packed [M, R]^T . x [M, I]"""
    if _uses_onednn(x) and packed.numel() and x.numel():
        return _ONEDNN(packed.t(), x.t(), None, "none", [], "")
    return torch.mm(packed.t(), x)


def _two_products(
    x: Tensor, matrix: Tensor | None, bias: Tensor | None, ranks: Tensor, rows: Tensor
) -> Tensor:
    """x [M, I] . matrix [I, O] + bias + ranks [M, R] . rows [R, O]; without matrix the last alone.

    The small product goes first: adding it hides inside the large one.
    """
    if matrix is None:
        return torch.mm(ranks, rows)
    if not rows.numel() or not x.numel():
        return x @ matrix if bias is None else torch.addmm(bias, x, matrix)
    if _uses_onednn(x):
        delta = _ONEDNN(ranks, rows.t(), None, "none", [], "")
        return _ONEDNN.binary(x, delta, matrix.t(), bias, "add")
    y = torch.mm(x, matrix) if bias is None else torch.addmm(bias, x, matrix)
    return y.addmm_(ranks, rows)


def _transposed(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.t()


def _rows(stack: Tensor, train_rows: list[int]) -> Tensor:
    """The rows of the ranges; a view where there is one range."""
    if len(train_rows) == 2:
        return stack[train_rows[0] : train_rows[1]]
    return torch.cat([stack[i:j] for i, j in zip(train_rows[::2], train_rows[1::2])] or [stack[:0]])
