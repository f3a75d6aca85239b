"""A pass: what one launch reads, writes and computes, and the least time of it on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

INT64 = 8  # bytes


class Device(NamedTuple):
    """What a kernel can reach on a GPU."""

    name: str
    bandwidth: float  # bytes per second of a large copy
    flops: float  # per second of a large bf16 product of random data


@dataclass(frozen=True)
class Pass:
    """One launch: bytes read and written of each tensor, and its FLOPs.

    Attributes:
        library: cuBLAS or torch does it, not a kernel of ours.
        rereads: bytes of each tensor that tiles read again, from the L2 cache.
    """

    name: str
    reads: dict[str, int]
    writes: dict[str, int]
    flops: int = 0
    library: bool = False
    rereads: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """All bytes read and written."""
        return sum(self.reads.values()) + sum(self.writes.values())

    def seconds(self, device: Device) -> float:
        """The longer of the times of bytes and FLOPs."""
        return max(self.bytes / device.bandwidth, self.flops / device.flops)

    def is_memory_bound(self, device: Device) -> bool:
        """Bytes take longer than FLOPs."""
        return self.bytes / device.bandwidth >= self.flops / device.flops


Passes = list[Pass]


def total_bytes(passes: Iterable[Pass]) -> int:
    """Bytes of all passes."""
    return sum(p.bytes for p in passes)


def l2_bytes(passes: Iterable[Pass]) -> int:
    """Bytes of all passes between multiprocessors and L2 cache, what tiles read again included."""
    return sum(p.bytes + sum(p.rereads.values()) for p in passes)


def total_flops(passes: Iterable[Pass]) -> int:
    """FLOPs of all passes."""
    return sum(p.flops for p in passes)


def total_seconds(passes: Iterable[Pass], device: Device) -> float:
    """Time of all passes, one after the other."""
    return sum(p.seconds(device) for p in passes)


def bound(passes: Sequence[Pass], device: Device) -> str:
    """What most of the time goes to: "memory" or "arithmetic"."""
    memory = sum(p.seconds(device) for p in passes if p.is_memory_bound(device))
    return "memory" if 2 * memory >= total_seconds(passes, device) else "arithmetic"


@dataclass(frozen=True)
class Row:
    """A line of the roofline's table; `base` is what its time is compared with."""

    op: str
    sizes: str
    passes: Passes
    base: Passes = field(default_factory=list)
