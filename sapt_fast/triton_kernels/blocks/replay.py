"""Recorded launches, repeated on other inputs: see `plans`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sapt_fast.triton_kernels.blocks.launchers import Launch

_MOST_STREAMS = 16  # that a plan keeps its steps for

Results = list[Tensor | None]


class Address(NamedTuple):
    """Bytes behind the start of an input, an output that is kept, or the scratch memory."""

    base: int
    offset: int


Places = dict[int, Address]  # by the address at which something was allocated
Choice = Callable[[list[Any]], tuple[Any, ...]]  # some of a list's values


def choice_of(numbers: Sequence[int]) -> Choice:
    """Gives the values of those numbers."""
    if len(numbers) > 1:
        return itemgetter(*numbers)
    (only,) = numbers
    return lambda values: (values[only],)


class _Pointer:
    """What stands for the tensor in a descriptor."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class Descriptor(NamedTuple):
    """A `TensorDescriptor` of a tensor at an address."""

    base: Address
    fields: dict[str, Any]

    def at(self, bases: list[Any]) -> TensorDescriptor:
        made = object.__new__(TensorDescriptor)
        pointer = _Pointer(bases[self.base.base] + self.base.offset)
        made.__dict__.update(self.fields, base=pointer)
        return made


class View(NamedTuple):
    """A view of an input or output, from its start on."""

    base: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, tensors: list[Tensor]) -> Tensor:
        return tensors[self.base].as_strided(self.size, self.stride)


class Product(NamedTuple):
    """A product by torch."""

    function: Callable[..., Any]
    operands: list[View]
    out: dict[str, View]

    def on(self, stream: int) -> Callable[[tuple[Any, ...]], object]:
        """Returns what computes the product, on torch's stream, with the tensors alone."""
        return lambda values: self.run(*values)

    def run(self, tensors: list[Tensor]) -> None:
        with torch.no_grad():
            out = {name: view.of(tensors) for name, view in self.out.items()}
            self.function(*[view.of(tensors) for view in self.operands], **out)


class Output(NamedTuple):
    """How a result is allocated, and the view of it that is returned, if it is one."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    view: tuple[tuple[int, ...], tuple[int, ...]] | None


class Derived(NamedTuple):
    """A tensor that a function makes of an input, by its number."""

    function: Callable[..., Tensor]
    source: int
    options: tuple[Any, ...]


_Step = tuple[Callable[[tuple[Any, ...]], object], Choice]


class Plan(NamedTuple):
    """Steps, each of which takes its arguments from one list of values.

    The list has the addresses of the inputs, of the outputs that are kept, of what is derived and
    of the scratch memory (these are the bases), the tensors, and then what the other fields give.
    """

    allocate: Callable[..., Tensor]
    outputs: list[Output | None]
    derived: list[Derived]
    scratch: int  # bytes
    addresses: list[Address]
    tuples: list[Choice]
    descriptors: list[Descriptor]
    constants: list[Any]
    steps: list[tuple[Launch | Product, Choice]]
    on: dict[int, list[_Step]]  # the steps by stream, made when it first runs there

    def run(self, inputs: Sequence[Tensor], values: list[Any]) -> Results:
        """Repeats the steps on inputs that are at the addresses `values`, a list that grows."""
        x = inputs[0]
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        if x.get_device() not in (-1, device):
            with torch.cuda.device_of(x):
                return self.run(inputs, values)
        allocate, outputs, derived, scratch, addresses, tuples, descriptors, constants, _, on = self
        tensors = [*inputs]
        results: Results = []
        for output in outputs:
            if output is None:
                results.append(None)
                continue
            size, stride, dtype, view = output
            made = allocate(size, stride, dtype)
            tensors.append(made)
            values.append(made.data_ptr())
            results.append(made if view is None else made.as_strided(*view))
        for function, source, options in derived:
            made = function(tensors[source], *options)
            tensors.append(made)
            values.append(made.data_ptr())
        memory = allocate((scratch,), (1,), torch.uint8)
        values += (memory.data_ptr(), tensors)
        values += [values[base] + offset for base, offset in addresses]
        values += [each(values) for each in tuples]
        if descriptors:
            values += [each.at(values) for each in descriptors]
        values += constants
        stream = driver.get_current_stream(device)
        for step, chosen in on.get(stream) or self._on(stream):
            step(chosen(values))
        return results

    def _on(self, stream: int) -> list[_Step]:
        """The steps on a stream, which are kept for later calls."""
        steps = [(what.on(stream), chosen) for what, chosen in self.steps]
        if len(self.on) >= _MOST_STREAMS:
            self.on.clear()
        self.on[stream] = steps
        return steps
