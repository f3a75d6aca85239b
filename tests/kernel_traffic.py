"""Counts what kernels load and store while Triton's interpreter runs them.

Every access of a kernel ends in two methods of the interpreter, which get the address of each lane
and which lanes are masked off. `counted` wraps these two for as long as a block lasts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from kernel_memory import ADDRESS
from passes import Pass
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

SCRATCH = "scratch"
"""Everything that is none of the named tensors."""


@dataclass
class Bytes:
    """Of one tensor: bytes moved, and moved if each launch moved each of them once."""

    unique: int = 0
    total: int = 0


@dataclass
class Traffic:
    """Bytes by tensor, summed over the launches."""

    reads: dict[str, Bytes]
    writes: dict[str, Bytes]

    def unique(self) -> tuple[dict[str, int], dict[str, int]]:
        """(reads, writes), of each tensor the unique bytes; without those that are 0."""
        both = (self.reads, self.writes)
        return tuple({n: b.unique for n, b in side.items() if b.unique} for side in both)


@dataclass
class _Launch:
    """Addresses of the lanes that were not masked, by itemsize."""

    name: str
    reads: dict[int, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    writes: dict[int, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))


class Recorder:
    """The launches of a block. Their arguments stay alive, so that no address is used twice."""

    def __init__(self) -> None:
        self.launches: list[_Launch] = []
        self._alive: list[Any] = []

    @property
    def kernels(self) -> list[str]:
        """Names of the kernels in the order of their launches."""
        return [launch.name for launch in self.launches]

    def traffic(self, named: Mapping[str, Tensor | None]) -> Traffic:
        """Bytes of each named tensor; two of them may not share a storage."""
        ranges = {}
        for name, tensor in named.items():
            if tensor is not None and tensor.numel():
                storage = tensor.untyped_storage()
                ranges[name] = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        starts = sorted(ranges.values())
        if any(stop > start for (_, stop), (start, _) in pairwise(starts)):
            raise ValueError(f"named: the memory of {sorted(ranges)} overlaps")
        sides: tuple[dict[str, Bytes], dict[str, Bytes]] = ({}, {})
        for launch in self.launches:
            for side, accesses in zip(sides, (launch.reads, launch.writes), strict=True):
                for itemsize, chunks in accesses.items():
                    lanes = np.concatenate(chunks)
                    self._add(side, ranges, lanes, itemsize)
        return Traffic(*sides)

    def _add(
        self,
        side: dict[str, Bytes],
        ranges: dict[str, tuple[int, int]],
        lanes: np.ndarray,
        itemsize: int,
    ) -> None:
        rest = np.ones(lanes.shape, bool)
        for name, (start, stop) in ranges.items():
            inside = (lanes >= start) & (lanes < stop)
            rest &= ~inside
            self._count(side, name, lanes[inside], itemsize)
        self._count(side, SCRATCH, lanes[rest], itemsize)

    @staticmethod
    def _count(side: dict[str, Bytes], name: str, lanes: np.ndarray, itemsize: int) -> None:
        if lanes.size:
            entry = side.setdefault(name, Bytes())
            entry.unique += np.unique(lanes).size * itemsize
            entry.total += lanes.size * itemsize


@contextmanager
def counted() -> Iterator[Recorder]:
    """Record the launches of the block."""
    recorder = Recorder()
    launch_of: list[_Launch] = []

    def note(side: str, ptrs: Any, mask: Any) -> None:
        address = (np.asarray(ptrs.data) & np.uint64(ADDRESS)).astype(np.int64)
        kept = np.broadcast_to(np.asarray(mask.data, bool), address.shape)
        itemsize = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        getattr(launch_of[-1], side)[itemsize].append(address[kept].ravel())

    def load(self: Any, ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        note("reads", ptrs, mask)
        return original_load(self, ptrs, mask, *rest, **options)

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        note("writes", ptrs, mask)
        return original_store(self, ptrs, value, mask, *rest, **options)

    def launch(self: Any, *arguments: Any, **options: Any) -> Any:
        launch_of.append(_Launch(self.fn.__name__))
        recorder.launches.append(launch_of[-1])
        recorder._alive.append((arguments, options))
        try:
            return original_launch(self, *arguments, **options)
        finally:
            launch_of.pop()

    original_load = InterpreterBuilder.create_masked_load
    original_store = InterpreterBuilder.create_masked_store
    original_launch = GridExecutor.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", load)
        patch.setattr(InterpreterBuilder, "create_masked_store", store)
        patch.setattr(GridExecutor, "__call__", launch)
        yield recorder


def _expected(passes: Iterable[Pass], named: dict[str, Tensor]) -> tuple[Counter, Counter]:
    """(reads, writes) of the kernels' passes by tensor, what is not named as scratch."""
    sides = Counter(), Counter()
    for p in passes:
        if not p.library:
            for side, sizes in zip(sides, (p.reads, p.writes), strict=True):
                for name, size in sizes.items():
                    side[name if name in named else SCRATCH] += size
    return tuple(Counter({n: b for n, b in side.items() if b}) for side in sides)


def check(
    call: Callable[[], dict[str, Tensor | None]],
    inputs: dict[str, Tensor],
    passes: Iterable[Pass],
    rereads: dict[str, float],
) -> Traffic:
    """Runs `call`, which returns its results by name, and compares its traffic with `passes`.

    `rereads` says of some tensors how often a pass may read them on average, as its tiles explain.

    Raises:
        AssertionError: they differ.
    """
    with counted() as recorder:
        results = call()
    named = {n: t for n, t in {**inputs, **results}.items() if t is not None}
    traffic = recorder.traffic(named)
    passes = list(passes)
    launches = sum(not p.library for p in passes)
    assert len(recorder.kernels) == launches, f"launches: got {recorder.kernels}"
    reads, writes = traffic.unique()
    expected_reads, expected_writes = _expected(passes, named)
    assert reads == dict(expected_reads), f"reads: got {reads}, expected {expected_reads}"
    assert writes == dict(expected_writes), f"writes: got {writes}, expected {expected_writes}"
    for name, most in rereads.items():
        assert traffic.reads[name].total <= most * traffic.reads[name].unique, name
    return traffic


def check_rereads(traffic: Traffic, passes: Iterable[Pass]) -> set[str]:
    """Compares all bytes read, of each named tensor that the passes state rereads of.

    Returns:
        The names of these tensors.

    Raises:
        AssertionError: they differ.
    """
    own = [p for p in passes if not p.library]
    stated = [*dict.fromkeys(n for p in own for n in p.rereads if n in traffic.reads)]
    assert stated, "no pass states what is read again"
    for name in stated:
        expected = sum(p.reads.get(name, 0) + p.rereads.get(name, 0) for p in own)
        got = traffic.reads[name].total
        assert got == expected, f"all reads of {name}: got {got}, expected {expected}"
    return set(stated)


def tiles(size: int, block: int) -> int:
    """How many blocks cover a size."""
    return -(-size // block)
