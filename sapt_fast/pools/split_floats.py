"""float32 as bfloat16 and the 16 bits that rounding took from it.

The bfloat16 alone serves a forward; both together are the exact float32 that training continues
from, in no more memory than float32 takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["joined", "split"]


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """Splits finite float32 numbers.

    Args:
        values: float32, of magnitude below bfloat16's largest number (3.39e38).

    Returns:
        The numbers rounded to bfloat16 (half away from zero), and the rest as int16.
    """
    bits = values.contiguous().view(torch.int32)
    upper = (bits + 0x8000) >> 16
    rest = (bits - (upper << 16)).to(torch.int16)
    return upper.to(torch.int16).view(torch.bfloat16), rest


def joined(rounded: Tensor, rest: Tensor) -> Tensor:
    """Returns the float32 numbers that `split` got, bit for bit."""
    upper = rounded.view(torch.int16).to(torch.int32) << 16
    return (upper + rest.to(torch.int32)).view(torch.float32)
