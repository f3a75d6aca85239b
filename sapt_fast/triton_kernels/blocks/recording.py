"""What a function launches, multiplies and allocates, made into a plan: see `plans`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from sapt_fast.triton_kernels.blocks.common import round_up
from sapt_fast.triton_kernels.blocks.launchers import Launch, prepared
from sapt_fast.triton_kernels.blocks.replay import (
    Address,
    Choice,
    Derived,
    Descriptor,
    Output,
    Places,
    Plan,
    Product,
    Results,
    View,
    choice_of,
)
from sapt_fast.triton_kernels.blocks.signatures import allocation

_ALIGN = 256  # bytes, as torch's allocator on a GPU

_aten = torch.ops.aten
_ALLOCATIONS = (
    _aten.new_empty.default,
    _aten.empty.memory_format,
    _aten.empty_like.default,
)
_PRODUCTS = (_aten.addmm_.default, _aten.addmm.out, _aten.mm.out)


class _UnplannableError(Exception):
    """A call did something that a plan cannot repeat."""


class Recording(TorchDispatchMode):
    """Sees every launch and every operation of torch in a call."""

    def __init__(self, inputs: list[int]) -> None:
        super().__init__()
        self.inputs = inputs  # addresses
        self.made: dict[int, Tensor] = {}  # what was allocated, by address; all of it stays alive
        self.steps: list[tuple[Any, Any, Any]] = []
        self.derived: list[tuple[Derived, Tensor]] = []
        self.paused = False
        self.plannable = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        if self.paused:
            return result
        if func in _ALLOCATIONS:
            self.made[result.data_ptr()] = result
        elif func in _PRODUCTS:
            self.steps.append((func, args, kwargs or {}))
        elif schema.is_mutable or any(each.alias_info is None for each in schema.returns):
            self.plannable = False
        return result

    def derive(
        self, function: Callable[..., Tensor], source: Tensor, options: tuple[Any, ...]
    ) -> Tensor:
        """Calls the function and remembers that; a plan does not look into it."""
        self.paused = True
        made = function(source, *options)
        self.paused = False
        if source.data_ptr() in self.inputs:
            number = self.inputs.index(source.data_ptr())
            self.derived.append((Derived(function, number, options), made))
        else:
            self.plannable = False
        return made

    def add_launch(
        self, kernel: Any, compiled: Any, grid: tuple[int, ...], args: Any, meta: dict[str, Any]
    ) -> None:
        """Remembers a launch, of the parameters that Triton hands to the compiled kernel."""
        names = kernel.arg_names
        values = [*args, *(meta[name] for name in names[len(args) :] if name in meta)]
        x, y, z = (*grid, 1, 1)[:3]
        ready = prepared(compiled, (x, y, z), len(values))
        if ready is None or kernel.pre_run_hooks or len(values) != len(names):
            self.plannable = False
        self.steps.append((ready, values, {}))

    def plan(self, results: Results, kept: Sequence[bool], device: torch.device) -> Plan | None:
        """What repeats the call, or None if it did anything that a plan cannot do."""
        try:
            if not self.plannable:
                raise _UnplannableError
            return self._plan(results, kept, device)
        except _UnplannableError:
            return None

    def _plan(self, results: Results, kept: Sequence[bool], device: torch.device) -> Plan:
        outputs: list[Output | None] = []
        base = len(self.inputs)
        places: dict[int, Address] = {}
        for result, wanted in zip(results, kept, strict=True):
            if result is None or not wanted:
                outputs.append(None)
                continue
            start = result.data_ptr()
            if start not in self.made or start in places:
                raise _UnplannableError
            made = self.made[start]
            same = made.shape == result.shape and made.stride() == result.stride()
            view = None if same else (tuple(result.shape), result.stride())
            outputs.append(Output(tuple(made.shape), made.stride(), made.dtype, view))
            places[start] = Address(base, 0)
            base += 1
        if any(made.device != device for made in self.made.values()):
            raise _UnplannableError
        for _, made in self.derived:
            self.made[made.data_ptr()] = made
            places[made.data_ptr()] = Address(base, 0)
            base += 1
        scratch = 0
        for start, made in self.made.items():
            if start not in places:
                places[start] = Address(base, scratch)
                scratch += round_up(made.nbytes, _ALIGN)
        return self._numbered(allocation(device), outputs, scratch, base, places)

    def _numbered(
        self,
        allocate: Callable[..., Tensor],
        outputs: list[Output | None],
        scratch: int,
        base: int,
        places: Places,
    ) -> Plan:
        """The plan, each step with the numbers of its values; `base` is that of the scratch."""
        # A number is a pair of a section of the values and a place in it, until all is known.
        moved: dict[Address, int] = {}  # those behind the start of a base
        tuples: dict[tuple[tuple[int, int], ...], int] = {}
        descriptors: list[Descriptor] = []
        constants: list[Any] = []

        def address(tensor: Any) -> tuple[int, int]:
            found = self._address(tensor, places)
            return (1, moved.setdefault(found, len(moved))) if found.offset else (0, found.base)

        def argument(value: Any) -> tuple[int, int]:
            if isinstance(value, Tensor):
                return address(value)
            if isinstance(value, tuple) and not all(type(each) is int for each in value):
                return 2, tuples.setdefault(tuple(map(address, value)), len(tuples))
            if isinstance(value, TensorDescriptor):
                fields = {name: each for name, each in vars(value).items() if name != "base"}
                descriptors.append(Descriptor(self._address(value.base, places), fields))
                return 3, len(descriptors) - 1
            constants.append(value)
            return 4, len(constants) - 1

        numbered: list[tuple[Launch | Product, list[tuple[int, int]]]] = []
        for what, given, out in self.steps:
            if isinstance(what, Launch):
                numbered.append((what, [argument(each) for each in given]))
            else:
                product = self._product(what, given, out, places, base)
                numbered.append((product, [(0, base + 1)]))
        starts = [0, *accumulate([base + 2, len(moved), len(tuples), len(descriptors)])]

        def choice(numbers: Sequence[tuple[int, int]]) -> Choice:
            return choice_of([starts[section] + at for section, at in numbers])

        return Plan(
            allocate, outputs, [each for each, _ in self.derived], scratch, [*moved],
            [choice(each) for each in tuples], descriptors, constants,
            [(what, choice(numbers)) for what, numbers in numbered], {},
        )  # fmt: skip

    def _product(
        self, function: Any, args: Any, kwargs: dict[str, Any], places: Places, scratch: int
    ) -> Product:
        def view(tensor: Any) -> View:
            address = self._address(tensor, places)
            if address.offset or address.base == scratch:
                raise _UnplannableError
            return View(address.base, tuple(tensor.shape), tensor.stride())

        return Product(
            function, [view(each) for each in args], {n: view(each) for n, each in kwargs.items()}
        )

    def _address(self, tensor: Any, places: Places) -> Address:
        if not isinstance(tensor, Tensor):
            raise _UnplannableError
        address = tensor.data_ptr()
        if address in self.inputs:
            return Address(self.inputs.index(address), 0)
        for start, made in self.made.items():
            if start <= address < start + made.nbytes:
                base, offset = places[start]
                return Address(base, offset + address - start)
        raise _UnplannableError
