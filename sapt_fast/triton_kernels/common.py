"""What every Triton launcher asks of its device, and the sizes of a tile."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Kernels run in Triton's CPU interpreter; fixed when this module is imported."""

_TRITON_DTYPE = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


class DeviceTraits(NamedTuple):
    """What a tile configuration depends on."""

    capability: int  # 80, 90, 100, ...; 0 is the interpreter
    num_sms: int

    @property
    def has_tma(self) -> bool:
        """Tensor descriptors are worth using: Hopper, Blackwell, and the interpreter."""
        return self.capability in (0, 90, 100, 103)


class TileConfig(NamedTuple):
    """Sides of a tile (rows and columns of the output, reduction step) and launch options."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int

    def launch_options(self) -> dict[str, int]:
        """Return the keyword arguments of a kernel launch with this tile."""
        return {
            "BLOCK_M": self.m,
            "BLOCK_N": self.n,
            "BLOCK_K": self.k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@functools.cache
def device_traits(device: torch.device) -> DeviceTraits:
    """Return the traits of a CUDA device, or of the interpreter when it is active.

    Raises:
        ValueError: `device` is no CUDA device and the interpreter is off.
    """
    if INTERPRETED:
        return DeviceTraits(capability=0, num_sms=4)
    if device.type != "cuda":
        raise ValueError(f"Triton kernels need CUDA tensors, got device {str(device)!r}")
    properties = torch.cuda.get_device_properties(device)
    return DeviceTraits(properties.major * 10 + properties.minor, properties.multi_processor_count)


def compute_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype in which `tl.dot` takes its operands for tensors of `dtype`.

    The interpreter keeps bfloat16 as raw uint16 and multiplies those, so it computes in float32.

    Raises:
        TypeError: `dtype` is not float32, float16 or bfloat16.
    """
    if dtype not in _TRITON_DTYPE:
        raise TypeError(f"expected float32, float16 or bfloat16 tensors, got {dtype}")
    return tl.float32 if INTERPRETED else _TRITON_DTYPE[dtype]


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `a`."""
    return cdiv(a, multiple) * multiple


def with_unit_column_stride(matrix: Tensor) -> Tensor:
    """Return `matrix`, or a contiguous copy if its columns are not adjacent in memory."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
