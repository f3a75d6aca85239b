"""Helpers of the CPU kernels: how tensors are passed to `sapt_fast._C`."""

import torch
from torch import Tensor

from sapt_fast import _C  # torch comes first: both must use the OpenMP runtime that torch brings

CODES = {
    torch.float32: _C.FLOAT32,
    torch.bfloat16: _C.BFLOAT16,
    torch.float16: _C.FLOAT16,
    torch.float64: _C.FLOAT64,
}


def with_unit_column_stride(matrix: Tensor) -> Tensor:
    """Returns the matrix, copied unless the elements of a row are adjacent in memory."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
