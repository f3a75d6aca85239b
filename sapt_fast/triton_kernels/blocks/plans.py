"""Launch plans: the kernel launches of a function, recorded once and repeated.

`JITFunction.run` takes longer on the host than a small kernel on the GPU: it binds the arguments,
inspects each of them and hashes the result. That result depends only on sizes, strides, dtypes and
alignment of the inputs. So the second call with the same of these is recorded. Later calls repeat
its launches through the compiled kernels, with the same grids and arguments, on new outputs and one
new block of scratch memory.

A plan can repeat launches by `launch`, products by torch into the outputs, allocations and views. A
call that does anything else is never planned. Neither is a call in the interpreter, a call with
launch hooks, or one where Triton's launchers have other parameters. Triton's settings are those of
the recorded call.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from sapt_fast.triton_kernels.blocks import common
from sapt_fast.triton_kernels.blocks.common import round_up

_MOST_PLANS = 4096
_ALIGN = 256  # bytes, as torch's allocator on a GPU
# What Triton's launchers call their parameters, from 3.4 on and later: the values are the same.
_GRID = "gridX", "gridY", "gridZ", "stream", "function"
_HOOKS = "kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"
_KNOWN_PARAMETERS = (*_GRID, "args"), (*_GRID, *_HOOKS, "args")

_aten = torch.ops.aten
_ALLOCATIONS = (_aten.new_empty.default, _aten.empty.memory_format)
_PRODUCTS = (_aten.addmm_.default, _aten.addmm.out, _aten.mm.out)

Results = list[Tensor | None]

_current = threading.local()  # .recording: the `_Recording` of this thread
_plans: dict[Hashable, _Plan | None] = {}  # None: seen once, or cannot be planned
_refused: set[Hashable] = set()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """`kernel[grid](*args, **meta)`, which a plan can repeat."""
    compiled = kernel[grid](*args, **meta)
    recording = getattr(_current, "recording", None)
    if recording is not None:
        recording.add_launch(kernel, compiled, grid, args, meta)


def planned(
    options: Hashable,
    inputs: Sequence[Tensor],
    kept: Sequence[bool],
    compute: Callable[[], Results],
) -> Results:
    """`compute()`, or what a plan of an earlier call gives: the same launches.

    Args:
        options: everything besides the inputs that `compute` depends on.
        inputs: the tensors that `compute` reads, the first of them on the GPU.
        kept: which of its results are wanted; a plan gives None for the others.
        compute: gives new tensors, or None.
    """
    if common.INTERPRETED or _is_hooked():
        return compute()
    pointers = [t.data_ptr() for t in inputs]
    low_bits = 0
    for pointer in pointers:
        low_bits |= pointer
    several = len(set(pointers)) == len(pointers)
    key = (
        options,
        None if low_bits & 15 == 0 else tuple([p & 15 == 0 for p in pointers]),
        None if several else tuple([pointers.index(p) for p in pointers]),
        *[(t.shape, t.stride(), t.dtype, t.get_device()) for t in inputs],
    )
    plan = _plans.get(key)
    if plan is not None:
        return plan.run(inputs, pointers)
    if key in _refused:
        return compute()
    if key in _plans and 0 not in pointers:
        return _recorded(key, inputs, pointers, kept, compute)
    if len(_plans) >= _MOST_PLANS:
        forget()
    _plans[key] = None
    return compute()


def forget() -> None:
    """Drops all plans."""
    _plans.clear()
    _refused.clear()


def _is_hooked() -> bool:
    """Whether a launch hook is set, as profilers do."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _recorded(
    key: Hashable,
    inputs: Sequence[Tensor],
    pointers: list[int],
    kept: Sequence[bool],
    compute: Callable[[], Results],
) -> Results:
    recording = _Recording(pointers)
    _current.recording = recording
    try:
        with recording:
            results = compute()
    finally:
        _current.recording = None
    plan = recording.plan(results, kept)
    if plan is None:
        _refused.add(key)
    else:
        _plans[key] = plan
    return results


class _Address(NamedTuple):
    """Bytes behind the start of an input, an output that is kept, or the scratch memory."""

    base: int
    offset: int


_Places = dict[int, _Address]  # by the address at which something was allocated
_Choice = Callable[[list[Any]], tuple[Any, ...]]  # some of a list's values


def _choice(numbers: Sequence[int]) -> _Choice:
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


class _Descriptor(NamedTuple):
    """A `TensorDescriptor` of a tensor at an address."""

    base: _Address
    fields: dict[str, Any]

    def at(self, bases: list[Any]) -> TensorDescriptor:
        made = object.__new__(TensorDescriptor)
        pointer = _Pointer(bases[self.base.base] + self.base.offset)
        made.__dict__.update(self.fields, base=pointer)
        return made


class _View(NamedTuple):
    """A view of an input or output, from its start on."""

    base: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, tensors: list[Tensor]) -> Tensor:
        return tensors[self.base].as_strided(self.size, self.stride)


class _Product(NamedTuple):
    """A product by torch."""

    function: Callable[..., Any]
    operands: list[_View]
    out: dict[str, _View]

    def run(self, tensors: list[Tensor], stream: int) -> None:
        with torch.no_grad():
            out = {name: view.of(tensors) for name, view in self.out.items()}
            self.function(*[view.of(tensors) for view in self.operands], **out)


class _Output(NamedTuple):
    """How a result is allocated, and the view of it that is returned, if it is one."""

    size: tuple[int, ...]
    dtype: torch.dtype
    view: tuple[tuple[int, ...], tuple[int, ...]] | None


class _Plan(NamedTuple):
    """Steps, each of which takes its arguments from one list of values.

    The list has the addresses of the inputs, of the outputs that are kept and of the scratch
    memory (these are the bases), the tensors, the stream, and then what the other fields give.
    """

    outputs: list[_Output | None]
    scratch: int  # bytes
    addresses: list[_Address]
    tuples: list[_Choice]
    descriptors: list[_Descriptor]
    constants: list[Any]
    steps: list[tuple[Callable[..., Any], _Choice]]

    def run(self, inputs: Sequence[Tensor], values: list[Any]) -> Results:
        """Repeats the steps on inputs that are at the addresses `values`, a list that grows."""
        x = inputs[0]
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        if x.get_device() not in (-1, device):
            with torch.cuda.device_of(x):
                return self.run(inputs, values)
        outputs, size, addresses, tuples, descriptors, constants, steps = self
        tensors = [*inputs]
        results: Results = []
        for output in outputs:
            if output is None:
                results.append(None)
                continue
            made = x.new_empty(output[0], dtype=output[1])
            tensors.append(made)
            values.append(made.data_ptr())
            view = output[2]
            results.append(made if view is None else made.as_strided(*view))
        scratch = x.new_empty(size, dtype=torch.uint8)
        values += (scratch.data_ptr(), tensors, driver.get_current_stream(device))
        values += [values[base] + offset for base, offset in addresses]
        values += [each(values) for each in tuples]
        if descriptors:
            values += [each.at(values) for each in descriptors]
        values += constants
        for step, chosen in steps:
            step(*chosen(values))
        return results


class _UnplannableError(Exception):
    """A call did something that a plan cannot repeat."""


class _Recording(TorchDispatchMode):
    """Sees every launch and every operation of torch in a call."""

    def __init__(self, inputs: list[int]) -> None:
        super().__init__()
        self.inputs = inputs  # addresses
        self.made: dict[int, Tensor] = {}  # what was allocated, by address; all of it stays alive
        self.steps: list[tuple[Any, Any, Any]] = []
        self.plannable = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        if func in _ALLOCATIONS:
            self.made[result.data_ptr()] = result
        elif func in _PRODUCTS:
            self.steps.append((func, args, kwargs or {}))
        elif schema.is_mutable or any(each.alias_info is None for each in schema.returns):
            self.plannable = False
        return result

    def add_launch(
        self, kernel: Any, compiled: Any, grid: tuple[int, ...], args: Any, meta: dict[str, Any]
    ) -> None:
        """Remembers a launch, of the parameters that Triton hands to the compiled kernel."""
        names = kernel.arg_names
        values = [*args, *(meta[name] for name in names[len(args) :] if name in meta)]
        known = all(hasattr(compiled, n) for n in ("run", "function", "packed_metadata"))
        if known and not kernel.pre_run_hooks and len(values) == len(names):
            parameters = tuple(inspect.signature(type(compiled.run).__call__).parameters)
            self.plannable &= parameters[1:] in _KNOWN_PARAMETERS
            self.steps.append((compiled, (*grid, 1, 1)[:3], values))
        else:
            self.plannable = False

    def plan(self, results: Results, kept: Sequence[bool]) -> _Plan | None:
        """What repeats the call, or None if it did anything that a plan cannot do."""
        try:
            if not self.plannable:
                raise _UnplannableError
            return self._plan(results, kept)
        except _UnplannableError:
            return None

    def _plan(self, results: Results, kept: Sequence[bool]) -> _Plan:
        outputs: list[_Output | None] = []
        base = len(self.inputs)
        places: dict[int, _Address] = {}
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
            outputs.append(_Output(tuple(made.shape), made.dtype, view))
            places[start] = _Address(base, 0)
            base += 1
        if len({made.device for made in self.made.values()}) > 1:
            raise _UnplannableError
        scratch = 0
        for start, made in self.made.items():
            if start not in places:
                places[start] = _Address(base, scratch)
                scratch += round_up(made.nbytes, _ALIGN)
        return self._numbered(outputs, scratch, base, places)

    def _numbered(
        self, outputs: list[_Output | None], scratch: int, base: int, places: _Places
    ) -> _Plan:
        """The plan, each step with the numbers of its values; `base` is that of the scratch."""
        # A number is a pair of a section of the values and a place in it, until all is known.
        moved: dict[_Address, int] = {}  # those behind the start of a base
        tuples: dict[tuple[tuple[int, int], ...], int] = {}
        descriptors: list[_Descriptor] = []
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
                descriptors.append(_Descriptor(self._address(value.base, places), fields))
                return 3, len(descriptors) - 1
            constants.append(value)
            return 4, len(constants) - 1

        tensors, stream = (0, base + 1), (0, base + 2)
        numbered: list[tuple[Callable[..., Any], list[tuple[int, int]]]] = []
        for what, first, second in self.steps:
            if what in _PRODUCTS:
                product = self._product(what, first, second, places, base)
                numbered.append((product.run, [tensors, stream]))
                continue
            grid = [argument(side) for side in first]
            constants.append(what.packed_metadata)
            metadata = 4, len(constants) - 1
            function, none = argument(what.function), argument(None)
            rest = [argument(each) for each in second]
            numbered.append(
                (what.run, [*grid, stream, function, metadata, none, none, none, *rest])
            )
        starts = [0, *accumulate([base + 3, len(moved), len(tuples), len(descriptors)])]

        def choice(numbers: Sequence[tuple[int, int]]) -> _Choice:
            return _choice([starts[section] + at for section, at in numbers])

        return _Plan(
            outputs, scratch, [*moved], [choice(each) for each in tuples], descriptors, constants,
            [(run, choice(numbers)) for run, numbers in numbered],
        )  # fmt: skip

    def _product(
        self, function: Any, args: Any, kwargs: dict[str, Any], places: _Places, scratch: int
    ) -> _Product:
        def view(tensor: Any) -> _View:
            address = self._address(tensor, places)
            if address.offset or address.base == scratch:
                raise _UnplannableError
            return _View(address.base, tuple(tensor.shape), tensor.stride())

        return _Product(
            function, [view(each) for each in args], {n: view(each) for n, each in kwargs.items()}
        )

    def _address(self, tensor: Any, places: _Places) -> _Address:
        if not isinstance(tensor, Tensor):
            raise _UnplannableError
        address = tensor.data_ptr()
        if address in self.inputs:
            return _Address(self.inputs.index(address), 0)
        for start, made in self.made.items():
            if start <= address < start + made.nbytes:
                base, offset = places[start]
                return _Address(base, offset + address - start)
        raise _UnplannableError
