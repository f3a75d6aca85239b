"""Checks the memory accesses of Triton kernels while the interpreter runs them.

An address on a CPU takes 47 bits. `checked` writes the number of a launch's tensor into the bits
above, where pointer arithmetic keeps it. So each access says of which tensor it is meant to be,
even where its address lies in another one. Lanes that are masked off are not looked at.

Four faults raise, with the names of the kernel and of its argument:

- an access outside of the tensor, gaps between the rows of a view included;
- a program that loads what another one has stored before it in the same launch, or stores other
  bits there, as the programs of a grid have no order (what a program loads before another one
  stores it is not seen);
- a program that loads what it has stored itself, without `tl.debug_barrier` in between: on a GPU
  another thread may have stored it;
- a program that stores where it has loaded before, likewise, unless lane for lane at the same
  addresses: another thread may not have loaded it yet.

What is loaded before anything is written there is for tests that fill new memory with NaN.
"""

from __future__ import annotations

import ctypes
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

_SHIFT = 48
ADDRESS = (1 << _SHIFT) - 1
"""Bits of a checked pointer that are its address."""

PADDED = frozenset({"h_ptr", "h_ptrs"})
"""Arguments whose rows may be accessed up to their stride: the columns that pad h hold zeros."""

DISCARDED = frozenset(
    (kernel, name)
    for kernel in ("_gemm_kernel", "_gemm_tma_kernel")
    for name in ("y_ptr", "y_ptrs")
)
"""Kernels and arguments of loads that may be what another program stores: rows past the end wrap to
row 0, and what is loaded for them is never stored."""

_EPOCHS = 1 << 32  # more than the barriers of a program


class MemoryFaultError(AssertionError):
    """A kernel accesses memory that it must not access, or not yet."""


class _Argument:
    """A tensor of a launch: its bytes, and the strides and sizes of its dimensions."""

    def __init__(self, tensor: Tensor, name: str) -> None:
        self.tensor, self.name = tensor, name
        self.start, self.itemsize = tensor.data_ptr(), tensor.element_size()
        shape = list(tensor.shape)
        if self.parameter in PADDED:
            shape[-1] = max(shape[-1], tensor.stride(-2))
        dims = sorted(zip(tensor.stride(), shape, strict=True), reverse=True)
        self.dims = [(stride, size) for stride, size in dims if size > 1 and stride]
        last = sum(stride * (size - 1) for stride, size in self.dims)
        self.bytes = (last + 1) * self.itemsize if tensor.numel() else 0
        overlaps = any(outer < size * inner for (outer, _), (inner, size) in pairwise(self.dims))
        elements = math.prod(size for _, size in self.dims)
        self.has_gaps = not overlaps and self.bytes > elements * self.itemsize

    @property
    def parameter(self) -> str:
        """The kernel's, which may be a tuple."""
        return self.name.partition("[")[0]

    def outside(self, offsets: np.ndarray, itemsize: int) -> np.ndarray:
        """Which accesses, by offset in bytes and itemsize, are not of the tensor's elements."""
        outside = (offsets < 0) | (offsets + itemsize > self.bytes)
        if self.has_gaps and itemsize == self.itemsize:
            rest = offsets // itemsize
            for stride, size in self.dims:
                outside |= rest // stride >= size
                rest = rest % stride
            outside |= rest != 0
        return outside


class _Launch:
    """The memory of one launch, and who has stored in it."""

    def __init__(self, executor: GridExecutor, named: dict[str, Any]) -> None:
        self.kernel, self.named = executor.fn.__name__, named
        self.arguments: list[_Argument] = []
        self.program, self.epoch = 0, 0
        # By storage: of each byte 1 + the program that stored it, times _EPOCHS, + its barriers
        # until then.
        self.stored: dict[int, np.ndarray] = {}
        # By storage: places of each load of this program since its last barrier.
        self.loaded: dict[int, list[np.ndarray]] = defaultdict(list)

    def next_program(self, number: int) -> None:
        """The next accesses are of this program."""
        self.program, self.epoch = number, 0
        self.loaded.clear()

    def barrier(self) -> None:
        """All threads of the program have got here."""
        self.epoch += 1
        self.loaded.clear()

    def tag(self, tensor: Tensor) -> int:
        """Bits that name the tensor."""
        name = next((name for name, each in _tensors(self.named) if each is tensor), "?")
        self.arguments.append(_Argument(tensor, name))
        return len(self.arguments) << _SHIFT

    def check(self, verb: str, pointers: Any, mask: Any, value: Any = None) -> None:
        """Look at one access before it happens, a store with its value.

        Raises:
            MemoryFaultError: it is at fault.
        """
        tagged = np.asarray(pointers.data)
        kept = np.broadcast_to(np.asarray(mask.data, bool), tagged.shape)
        tagged = tagged[kept]
        if not tagged.size:
            return
        lowest = int(tagged.min())
        number = lowest >> _SHIFT
        if not 0 < number <= len(self.arguments) or int(tagged.max()) >> _SHIFT != number:
            raise MemoryFaultError(f"{self.kernel}: {verb} at an address of no argument")
        argument = self.arguments[number - 1]
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        offsets = tagged.astype(np.int64) - ((number << _SHIFT) + argument.start)
        if (outside := argument.outside(offsets, itemsize)).any():
            self._fail(verb, argument, offsets[outside], "outside of it")
        bits = None if value is None else np.broadcast_to(value.data, kept.shape)[kept]
        self._order(verb, argument, offsets, itemsize, bits)

    def _order(
        self,
        verb: str,
        argument: _Argument,
        offsets: np.ndarray,
        itemsize: int,
        bits: np.ndarray | None,
    ) -> None:
        storage = argument.tensor.untyped_storage()
        key = storage.data_ptr()
        places = offsets + (argument.start - key)
        discarded = bits is None and (self.kernel, argument.parameter) in DISCARDED
        if bits is None and not discarded:
            self.loaded[key].append(places)
        stored = self.stored.get(key)
        if stored is None:
            if bits is None:
                return
            stored = self.stored[key] = np.zeros(storage.nbytes(), np.int64)
        before, program = stored[places], self.program + 1
        others = (before != 0) & (before // _EPOCHS != program)
        if bits is not None and others.any():
            for place in np.flatnonzero(others):
                held = ctypes.string_at(int(argument.start + offsets[place]), itemsize)
                others[place] = held != bits[place].tobytes()
        if others.any() and not discarded:
            self._fail(verb, argument, offsets[others], "that another program has stored")
        now = program * _EPOCHS + self.epoch
        if bits is None:
            if (fresh := before == now).any():
                self._fail(verb, argument, offsets[fresh], "stored before without tl.debug_barrier")
            return
        for read in self.loaded.get(key, ()):
            if not np.array_equal(read, places) and (early := np.isin(places, read)).any():
                self._fail(verb, argument, offsets[early], "loaded before without tl.debug_barrier")
        for byte in range(itemsize):
            stored[places + byte] = now

    def _fail(self, verb: str, argument: _Argument, offsets: np.ndarray, why: str) -> None:
        shape, strides = list(argument.tensor.shape), list(argument.tensor.stride())
        element = int(offsets[0]) // argument.itemsize
        raise MemoryFaultError(
            f"{self.kernel}: {verb} of {argument.name} (shape {shape}, strides {strides}) at "
            f"element {element} and {offsets.size - 1} more, {why}"
        )


def _tensors(named: dict[str, Any]) -> Iterable[tuple[str, Tensor]]:
    for name, value in named.items():
        value = getattr(value, "base", value) if not isinstance(value, Tensor) else value
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple):
            yield from _tensors({f"{name}[{i}]": each for i, each in enumerate(value)})


@contextmanager
def checked() -> Iterator[None]:
    """Check the accesses of every kernel that the interpreter runs in the block."""
    launch: _Launch | None = None

    def arguments(self: GridExecutor, args: Any, kwargs: Any) -> Any:
        nonlocal launch
        args, kwargs = original["_init_args_hst"](self, args, kwargs)
        launch = _Launch(self, {**dict(zip(self.arg_names, args, strict=False)), **kwargs})
        return args, kwargs

    def convert(arg: Any) -> Any:
        converted = original["_implicit_cvt"](arg)
        if launch is not None and hasattr(arg, "data_ptr"):
            converted.handle.data = converted.handle.data + np.uint64(launch.tag(arg))
        return converted

    def program(self: InterpreterBuilder, x: int, y: int, z: int) -> None:
        if launch is not None:
            launch.next_program((x * self.grid_dim[1] + y) * self.grid_dim[2] + z)
        original["set_grid_idx"](self, x, y, z)

    def barrier(self: InterpreterBuilder) -> Any:
        if launch is not None:
            launch.barrier()
        return original["create_barrier"](self)

    def plain(verb: str, pointers: TensorHandle, mask: Any, value: Any = None) -> TensorHandle:
        if launch is not None:
            launch.check(verb, pointers, mask, value)
        return TensorHandle(pointers.data & np.uint64(ADDRESS), pointers.dtype)

    def load(self: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        return original["create_masked_load"](self, plain("load", ptrs, mask), mask, *rest, **named)

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        ptrs = plain("store", ptrs, mask, value)
        return original["create_masked_store"](self, ptrs, value, mask, *rest, **named)

    replaced = (
        (GridExecutor, "_init_args_hst", arguments),
        (interpreter, "_implicit_cvt", convert),
        (InterpreterBuilder, "set_grid_idx", program),
        (InterpreterBuilder, "create_barrier", barrier),
        (InterpreterBuilder, "create_masked_load", load),
        (InterpreterBuilder, "create_masked_store", store),
    )
    original = {name: getattr(owner, name) for owner, name, _ in replaced}
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, replacement in replaced:
            patch.setattr(owner, name, replacement)
        yield
