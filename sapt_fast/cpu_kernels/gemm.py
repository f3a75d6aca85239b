"""Matrix products on the CPU, by the fastest library for their size: BLAS, oneDNN or our own."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapt_fast import _C
from sapt_fast.cpu_kernels.common import CODES

# Up to so many rows reading the weight bounds the time, and our kernels need no packing.
_FEW_ROWS = {torch.float32: 16, torch.bfloat16: 1, torch.float16: 32, torch.float64: 8}
# The same for products that would be converted: see `widens`.
_FEW_WIDENED_ROWS = 8
# Multiplications below which a direct call of oneDNN, dear at a new shape, gains too little.
_ONEDNN_WORK = 1 << 24
# Numbers of one operand that are converted to float32 at a time: 8 MiB.
_WIDENED = 1 << 21


def _find_onednn() -> Any:
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


# oneDNN's GEMM x . w^T; None in builds of torch without it.
_ONEDNN = _find_onednn()


def widens(dtype: torch.dtype) -> bool:
    """Returns whether matrices of a 16-bit dtype are multiplied in float32, for speed.

    Where the CPU has no instructions for the dtype, torch's own products take 5 to 100 times as
    long as float32 ones.
    """
    return dtype.itemsize == 2 and not _C.multiplies(CODES[dtype])


def is_few(x: Tensor, weight: Tensor) -> bool:
    """Returns whether our kernels multiply x [M, I] by weight [O, I] faster than a library."""
    few = _FEW_WIDENED_ROWS if widens(x.dtype) else _FEW_ROWS[x.dtype]
    return x.shape[0] <= few and weight.is_contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes x [M, I] . weight [O, I]^T + bias [O], a new tensor; x is contiguous."""
    if bias is not None:
        bias = bias.contiguous()  # oneDNN and our kernels read it without strides
    if is_few(x, weight):
        return _few_rows(x, weight, bias)
    if widens(x.dtype):
        return _widened(x, weight.t(), bias)
    if _uses_onednn(x, weight.shape[0]):
        return _ONEDNN(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def multiply_tn(packed: Tensor, x: Tensor) -> Tensor:
    """Computes packed [M, R]^T . x [M, I]; in float32 where products are widened."""
    if widens(x.dtype):
        y = x.new_zeros(packed.shape[1], x.shape[1], dtype=torch.float32)
        for part in _blocks(x.shape[0], x.shape[1]):
            y.addmm_(packed[part].float().t(), x[part].float())
        return y
    if _uses_onednn(x, packed.shape[1]):
        return _ONEDNN(packed.t(), x.t(), None, "none", [], "")
    return torch.mm(packed.t().contiguous(), x)


def two_products(
    x: Tensor,
    matrix: Tensor | None,
    bias: Tensor | None,
    ranks: Tensor,
    rows: Tensor,
    onto: Tensor | None = None,
) -> Tensor:
    """Computes x [M, I] . matrix [I, O] + bias + ranks [M, R] . rows [R, O], or the last term only.

    Args:
        onto: [M, O], to which the result is added in place.
    """
    if widens(x.dtype):
        if matrix is None:
            return _widened(ranks, rows, None, onto=onto)
        return _widened(x, matrix, bias, (ranks, rows), onto)
    # In place onto the large product: a product of its own would cost the page faults of a new
    # [M, O] tensor, which on CPUs is more than reading y once more.
    if matrix is None:
        return torch.mm(ranks, rows) if onto is None else onto.addmm_(ranks, rows)
    y = linear(x, matrix.t(), bias) if onto is None else onto.addmm_(x, matrix)
    return y.addmm_(ranks, rows)


def _widened(
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    added: tuple[Tensor, Tensor] | None = None,
    onto: Tensor | None = None,
) -> Tensor:
    """Computes x . matrix + bias + ranks . rows in float32, every output rounded once.

    The operands are converted block by block: no float32 copy of a whole one is held.

    Args:
        added: (ranks, rows) of `two_products`.
        onto: as in `two_products`.
    """
    count, inputs = x.shape
    outputs = matrix.shape[1]
    y = x.new_empty(count, outputs) if onto is None else onto
    for columns in _blocks(outputs, inputs):
        wide = matrix[:, columns].float().t()
        wide_bias = None if bias is None else bias[columns].float()
        rows = None if added is None else added[1][:, columns].float()
        for part in _blocks(count, max(inputs, len(wide))):
            product = linear(x[part].float(), wide, wide_bias)
            if added is not None and rows is not None:
                product.addmm_(added[0][part].float(), rows)
            if onto is not None:
                product += onto[part, columns]
            y[part, columns] = product
    return y


def _blocks(count: int, width: int) -> Iterator[slice]:
    """Parts of `count` rows or columns of so many numbers each, converted at a time."""
    step = max(64, _WIDENED // max(width, 1))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _uses_onednn(x: Tensor, columns: int) -> bool:
    """Returns whether oneDNN is called directly for x [M, I] times [I, columns].

    torch.mm uses a BLAS for float32, which is slower here; for 16-bit types it uses oneDNN.
    """
    return (
        _ONEDNN is not None
        and x.dtype == torch.float32
        and x.numel() * columns >= _ONEDNN_WORK
        and bool(torch.backends.mkldnn.enabled)
    )


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, inputs = x.shape
    y = x.new_empty(rows, weight.shape[0])
    _C.mixed_lora_decode(
        CODES[x.dtype], CODES[x.dtype], y, None, x, weight, bias, None, None, None, None, None,
        rows, inputs, weight.shape[0], 1, 1, 0, False, torch.get_num_threads(),
    )  # fmt: skip
    return y
