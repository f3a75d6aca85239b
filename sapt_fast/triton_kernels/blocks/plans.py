"""Launch plans: the kernel launches of a function, recorded once and repeated.

`JITFunction.run` takes longer on the host than a small kernel on the GPU: it binds the arguments,
inspects each of them and hashes the result. That result depends only on sizes, strides, dtypes and
alignment of the inputs. So the second call with the same of these is recorded. Later calls repeat
its launches through the compiled kernels, with the same grids and arguments, on new outputs and one
new block of scratch memory.

A plan can repeat launches by `launch`, products by torch into the outputs, allocations, views and
what `derived` makes. A call that does anything else is never planned. Neither is a call in the
interpreter, a call with launch hooks, or one where Triton's launchers have other parameters.
Triton's settings are those of the recorded call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import triton
from torch import Tensor

from sapt_fast.triton_kernels.blocks import common
from sapt_fast.triton_kernels.blocks.recording import Recording
from sapt_fast.triton_kernels.blocks.replay import Plan, Results
from sapt_fast.triton_kernels.blocks.signatures import same_as

__all__ = ["Results", "derived", "forget", "launch", "planned"]

_MOST_PLANS = 4096

_current = threading.local()  # .recording: the `Recording` of this thread
_known: dict[Hashable, list[_Known]] = {}


class _Known:
    """Calls whose inputs differ in addresses alone, and their plan.

    Attributes:
        same: whether inputs have those sizes, strides and dtypes.
        aligned: which of them start at a multiple of 16 bytes; None for all.
        aliases: the first input that starts where each does; None if all differ at the first call.
        plan: None until it is recorded.
        refused: whether the call cannot be planned.
    """

    __slots__ = "aliases", "aligned", "plan", "refused", "same"

    def __init__(self, inputs: Sequence[Tensor], pointers: list[int], aligned: Hashable) -> None:
        self.same = same_as(inputs)
        self.aligned = aligned
        first = [pointers.index(p) for p in pointers]
        self.aliases = None if first == [*range(len(first))] else first
        self.plan: Plan | None = None
        self.refused = False

    def identifies(self, pointers: list[int]) -> bool:
        """Whether an address tells which input it is, up to aliases that this call always has."""
        first = [pointers.index(p) for p in pointers]
        return 0 not in pointers and first == (self.aliases or [*range(len(first))])


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """`kernel[grid](*args, **meta)`, which a plan can repeat."""
    compiled = kernel[grid](*args, **meta)
    recording = getattr(_current, "recording", None)
    if recording is not None:
        recording.add_launch(kernel, compiled, grid, args, meta)


def derived(function: Callable[..., Tensor], source: Tensor, *options: Any) -> Tensor:
    """`function(source, *options)`, which a plan calls again: whatever it does, it makes a tensor.

    Args:
        source: one of the inputs of `planned`, from its start on.
    """
    recording = getattr(_current, "recording", None)
    if recording is None:
        return function(source, *options)
    made: Tensor = recording.derive(function, source, options)
    return made


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
    aligned = tuple([p & 15 == 0 for p in pointers]) if low_bits & 15 else None
    key = options, inputs[0].shape
    for known in _known.get(key, ()):
        if known.same(*inputs) and known.aligned == aligned:
            # A plan of inputs that start at different addresses is right for aliases too.
            if known.aliases is not None and not known.identifies(pointers):
                continue
            if known.plan is not None:
                return known.plan.run(inputs, pointers)
            if known.refused or not known.identifies(pointers):
                return compute()
            return _recorded(known, inputs, pointers, kept, compute)
    if sum(map(len, _known.values())) >= _MOST_PLANS:
        forget()
    _known.setdefault(key, []).append(_Known(inputs, pointers, aligned))
    return compute()


def forget() -> None:
    """Drops all plans."""
    _known.clear()


def _is_hooked() -> bool:
    """Whether a launch hook is set, as profilers do."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _recorded(
    known: _Known,
    inputs: Sequence[Tensor],
    pointers: list[int],
    kept: Sequence[bool],
    compute: Callable[[], Results],
) -> Results:
    recording = Recording(pointers)
    _current.recording = recording
    try:
        with recording:
            results = compute()
    finally:
        _current.recording = None
    known.plan = recording.plan(results, kept, inputs[0].device)
    known.refused = known.plan is None
    return results
