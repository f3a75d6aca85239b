"""Random start values that depend only on a seed and an id, so that they need not be stored."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["start_rows"]

# SplitMix64 (Steele, Lea, Flood, 2014), whose n-th number can be computed alone; as signed numbers.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
_CHUNK = 1 << 20  # numbers at a time


def start_rows(seed: int, ids: Tensor, rank: int, width: int) -> Tensor:
    """Returns the start of A for some experts: uniform in [-1, 1) / sqrt(width), as LoRA's A.

    The values are the same bits on every device, in every order and for every number of experts.

    Args:
        seed: 0 to 2**63 - 1.
        ids: [U] int64, the experts.
        rank: r.
        width: number of inputs, I.

    Returns:
        [U, r, I] float32.
    """
    out = torch.empty(len(ids), rank * width, device=ids.device)
    first = _mixed(torch.tensor([seed], dtype=torch.int64, device=ids.device))
    element = torch.arange(rank * width, dtype=torch.int64, device=ids.device)
    step = max(1, _CHUNK // max(1, rank * width))
    for start in range(0, len(ids), step):
        part = ids[start : start + step, None] * (rank * width) + element
        bits = _mixed(first + part * _STEP)
        # The upper 24 bits are a float32 exactly: [0, 2**24) becomes [-1, 1).
        unit = _shifted(bits, 40).float() * 2.0**-23 - 1.0
        out[start : start + step] = unit * width**-0.5
    return out.view(len(ids), rank, width)


def _mixed(bits: Tensor) -> Tensor:
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shifts right and fills with zeros; torch repeats the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
