"""Launch plans: the launches of a function, repeated without asking Triton and torch again.

`JITFunction.run` takes longer on the host than a small kernel on the GPU: it binds the arguments,
looks at each of them and hashes what it saw. All of that depends on the sizes, strides, dtypes and
alignment of the inputs alone. So the second call of a kind runs as ever and is recorded, and from
the third on a plan repeats its launches through the compiled kernels, with the same grids and
arguments, on new outputs and one new block of memory for everything in between.

A plan is made only of what it can repeat: launches by `launch`, products by torch into the outputs,
allocations and views. A call that does anything else is never planned, nor is one in the
interpreter, with launch hooks, or where Triton's launchers have other parameters. Triton's settings
are those of the recorded call.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Hashable, Sequence
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
_PARAMETERS = (
    "gridX", "gridY", "gridZ", "stream", "function", "kernel_metadata", "launch_metadata",
    "launch_enter_hook", "launch_exit_hook", "args",
)  # fmt: skip

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
    """Whether a profiler wants to hear of launches."""
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


class _Pointer(NamedTuple):
    """What stands for the tensor in a descriptor."""

    address: int

    def data_ptr(self) -> int:
        return self.address


class _Descriptor(NamedTuple):
    """A `TensorDescriptor` of a tensor at an address."""

    base: _Address
    fields: dict[str, Any]

    def at(self, bases: list[int]) -> TensorDescriptor:
        made = object.__new__(TensorDescriptor)
        pointer = _Pointer(bases[self.base.base] + self.base.offset)
        made.__dict__.update(self.fields, base=pointer)
        return made


class _Launch(NamedTuple):
    """A launch; the arguments at the places that are listed depend on the addresses."""

    compiled: Any
    grid: tuple[int, int, int]
    args: list[Any]
    addresses: list[tuple[int, int, int]]  # place, base, offset
    tuples: list[tuple[int, list[_Address]]]
    descriptors: list[tuple[int, _Descriptor]]

    def run(self, bases: list[int], tensors: list[Tensor], stream: int) -> None:
        compiled, grid, args, addresses, tuples, descriptors = self
        args = args.copy()
        for place, base, offset in addresses:
            args[place] = bases[base] + offset
        for place, members in tuples:
            args[place] = tuple([bases[base] + offset for base, offset in members])
        for place, descriptor in descriptors:
            args[place] = descriptor.at(bases)
        compiled.run(
            *grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args
        )


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

    def run(self, bases: list[int], tensors: list[Tensor], stream: int) -> None:
        with torch.no_grad():
            out = {name: view.of(tensors) for name, view in self.out.items()}
            self.function(*[view.of(tensors) for view in self.operands], **out)


class _Output(NamedTuple):
    """How a result is allocated, and the view of it that is returned, if it is one."""

    size: tuple[int, ...]
    dtype: torch.dtype
    view: tuple[tuple[int, ...], tuple[int, ...]] | None


class _Plan(NamedTuple):
    """Bases of addresses are the inputs, the outputs that are kept, and the scratch memory."""

    steps: list[_Launch | _Product]
    outputs: list[_Output | None]
    scratch: int  # bytes

    def run(self, inputs: Sequence[Tensor], bases: list[int]) -> Results:
        """Repeats the steps on inputs that are at `bases`, which grow by what is allocated."""
        x = inputs[0]
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        if x.get_device() not in (-1, device):
            with torch.cuda.device_of(x):
                return self.run(inputs, bases)
        tensors = list(inputs)
        results: Results = []
        for output in self.outputs:
            if output is None:
                results.append(None)
                continue
            size, dtype, view = output
            made = x.new_empty(size, dtype=dtype)
            tensors.append(made)
            bases.append(made.data_ptr())
            results.append(made if view is None else made.as_strided(*view))
        if self.scratch:
            scratch = x.new_empty(self.scratch, dtype=torch.uint8)
            bases.append(scratch.data_ptr())
        stream = driver.get_current_stream(device)
        for step in self.steps:
            step.run(bases, tensors, stream)
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
            parameters = tuple(inspect.signature(compiled.run).parameters)
            self.plannable &= parameters == _PARAMETERS
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
        scratch = 0
        for start, made in self.made.items():
            if start not in places:
                places[start] = _Address(base, scratch)
                scratch += round_up(made.nbytes, _ALIGN)
        steps: list[_Launch | _Product] = []
        for what, first, second in self.steps:
            if what in _PRODUCTS:
                steps.append(self._product(what, first, second, places, base))
            else:
                steps.append(self._launch(what, first, second, places))
        return _Plan(steps, outputs, scratch)

    def _launch(
        self, compiled: Any, grid: tuple[int, int, int], args: list[Any], places: _Places
    ) -> _Launch:
        step = _Launch(compiled, grid, args, [], [], [])
        for place, value in enumerate(args):
            if isinstance(value, Tensor):
                step.addresses.append((place, *self._address(value, places)))
            elif isinstance(value, TensorDescriptor):
                fields = {name: each for name, each in vars(value).items() if name != "base"}
                descriptor = _Descriptor(self._address(value.base, places), fields)
                step.descriptors.append((place, descriptor))
            elif isinstance(value, tuple):
                step.tuples.append((place, [self._address(t, places) for t in value]))
            else:
                continue
            args[place] = None  # keeps no tensor alive
        return step

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
