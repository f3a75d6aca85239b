"""Helpers of the Triton launchers: properties of the device, and sizes of a tile."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Kernels run in Triton's CPU interpreter; fixed when this module is imported."""

RANK_ALIGN = 16
"""Rank columns come in groups of 16: the shortest reduction of a matrix instruction, and enough
to keep rows of 16-bit elements aligned for vector loads."""

_TRITON_DTYPE = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


# Dense FLOPs of a multiprocessor in one clock: 16-bit on the matrix unit with float32 sums, and
# float32. Of a capability that is not listed, those of the highest below it.
_FLOPS_PER_CLOCK = {
    0: (512, 128),
    80: (2048, 128),
    86: (512, 256),
    90: (4096, 256),
    100: (8192, 256),
    120: (512, 256),
}


class DeviceTraits(NamedTuple):
    """What a tile configuration and a choice of route depend on.

    Clock and bandwidth are the greatest that the driver tells. The defaults are an H200's.
    """

    capability: int  # 80, 90, 100, ...; 0 is the interpreter
    num_sms: int
    name: str = ""
    clock: float = 1.98e9  # Hz
    bandwidth: float = 4.9e12  # bytes per second
    shared: int = 232448  # bytes of shared memory that a program may have

    @property
    def has_tma(self) -> bool:
        """Tensor descriptors are worth using: Hopper, Blackwell, and the interpreter."""
        return self.capability in (0, 90, 100, 103)

    def flops(self, itemsize: int, tf32: bool = False) -> float:
        """FLOPs per second of products of elements of 2 or 4 bytes, at the clock.

        With `tf32` float32 goes through the matrix unit, at half the rate of 16 bits.
        """
        known = max(capability for capability in _FLOPS_PER_CLOCK if capability <= self.capability)
        half, single = _FLOPS_PER_CLOCK[known]
        per_clock = half if itemsize == 2 else half // 2 if tf32 else single
        return per_clock * self.num_sms * self.clock


class TileConfig(NamedTuple):
    """Sides of a tile (rows and columns of the output, reduction step) and launch options."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    parts: int = 1  # of the reduction, each by programs of its own

    def launch_options(self) -> dict[str, int]:
        """Returns the keyword arguments of a kernel launch with this tile."""
        return {
            "BLOCK_M": self.m,
            "BLOCK_N": self.n,
            "BLOCK_K": self.k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def fitted(tile: TileConfig, shared: int, row_bytes: int, column_bytes: int) -> TileConfig:
    """Returns `tile`, or as much of it as `shared` bytes hold in all stages.

    First it loses stages, down to 2, then half of its larger side as often as needed.

    Args:
        tile: With sides that are powers of two.
        shared: Bytes that a program may have.
        row_bytes, column_bytes: Of an element of the row operand and of the column operand.
    """
    while tile.num_stages * tile.k * (tile.m * row_bytes + tile.n * column_bytes) > shared:
        if tile.num_stages > 2:
            tile = tile._replace(num_stages=tile.num_stages - 1)
        elif max(tile.m, tile.n) > 16:
            larger = "m" if tile.m >= tile.n else "n"
            tile = tile._replace(**{larger: getattr(tile, larger) // 2})
        else:
            break
    return tile


@functools.cache
def device_traits(device: torch.device) -> DeviceTraits:
    """Returns the traits of a CUDA device, or of the interpreter when it is active.

    Raises:
        ValueError: if `device` is no CUDA device and the interpreter is off.
    """
    if INTERPRETED:
        return DeviceTraits(capability=0, num_sms=4)
    if device.type != "cuda":
        raise ValueError(f"Triton kernels need CUDA tensors, got device {str(device)!r}")
    properties = torch.cuda.get_device_properties(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    told = triton.runtime.driver.active.utils.get_device_properties(index)
    traits = DeviceTraits(
        properties.major * 10 + properties.minor, properties.multi_processor_count, properties.name
    )
    # kHz, and bits at two transfers a clock; a driver may tell 0.
    clock = told.get("sm_clock_rate", 0) * 1e3
    bandwidth = told.get("mem_clock_rate", 0) * 1e3 * told.get("mem_bus_width", 0) / 8 * 2
    return traits._replace(
        clock=clock or traits.clock,
        bandwidth=bandwidth or traits.bandwidth,
        shared=told.get("max_shared_mem", 0) or traits.shared,
    )


def compute_dtype(dtype: torch.dtype) -> tl.dtype:
    """Returns the dtype in which `tl.dot` takes its operands for tensors of `dtype`.

    The interpreter keeps bfloat16 as raw uint16 and multiplies those, so it computes in float32.

    Raises:
        TypeError: if `dtype` is not float32, float16 or bfloat16.
    """
    if dtype not in _TRITON_DTYPE:
        raise TypeError(f"expected float32, float16 or bfloat16 tensors, got {dtype}")
    return tl.float32 if INTERPRETED else _TRITON_DTYPE[dtype]


@triton.jit
def pointer_of(member, pointers):  # type: ignore[no-untyped-def]
    """pointers[member]: tuples take no index that is known at run time only."""
    pointer = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        if member == i:
            pointer = pointers[i]
    return pointer


def float32_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies for tensors of `dtype`: "tf32" where torch is allowed to.

    That is a float32 product after `torch.set_float32_matmul_precision("high")`, or with
    `torch.backends.cuda.matmul.fp32_precision` at "tf32".
    """
    if dtype != torch.float32:
        return "ieee"
    try:
        if torch.get_float32_matmul_precision() == "highest":  # the fast way to know
            return "ieee"
    except RuntimeError:  # torch refuses it once the second setting was used
        pass
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def cdiv(a: int, b: int) -> int:
    """Returns a / b rounded up."""
    return -(-a // b)


def round_up(a: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `a`."""
    return cdiv(a, multiple) * multiple


def with_unit_column_stride(matrix: Tensor) -> Tensor:
    """Returns `matrix`, or a contiguous copy if its columns are not adjacent in memory."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
