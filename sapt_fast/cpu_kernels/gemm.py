"""Matrix products on the CPU, by the fastest library for their size: BLAS, oneDNN or our own."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapt_fast import _C
from sapt_fast.cpu_kernels.common import CODES

# Up to so many rows reading the weight bounds the time, and our kernels need no packing.
_FEW_ROWS = {torch.float32: 16, torch.bfloat16: 1, torch.float16: 32, torch.float64: 8}
# Multiplications below which a direct call of oneDNN, dear at a new shape, gains too little.
_ONEDNN_WORK = 1 << 24


def _find_onednn() -> Any:
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


# oneDNN's GEMM x . w^T; None in builds of torch without it.
_ONEDNN = _find_onednn()


def is_few(x: Tensor, weight: Tensor) -> bool:
    """Returns whether our kernels multiply x [M, I] by weight [O, I] faster than a library."""
    return x.shape[0] <= _FEW_ROWS[x.dtype] and weight.is_contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes x [M, I] . weight [O, I]^T + bias [O], a new tensor; x is contiguous."""
    if bias is not None:
        bias = bias.contiguous()  # oneDNN and our kernels read it without strides
    if is_few(x, weight):
        return _few_rows(x, weight, bias)
    if _uses_onednn(x, weight.shape[0]):
        return _ONEDNN(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def multiply_tn(packed: Tensor, x: Tensor) -> Tensor:
    """Computes packed [M, R]^T . x [M, I]."""
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
    # In place onto the large product: a product of its own would cost the page faults of a new
    # [M, O] tensor, which on CPUs is more than reading y once more.
    if matrix is None:
        return torch.mm(ranks, rows) if onto is None else onto.addmm_(ranks, rows)
    y = linear(x, matrix.t(), bias) if onto is None else onto.addmm_(x, matrix)
    return y.addmm_(ranks, rows)


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
