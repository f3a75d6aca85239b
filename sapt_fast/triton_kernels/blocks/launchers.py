"""Triton's launch of a compiled kernel, prepared so that only arguments and stream are missing.

Triton calls an instance of its launcher class, which looks for scratch memory and then calls a
function in C. Where a kernel needs no scratch memory, that function is called without the class.
What the class hands to it is seen by calling a copy of the instance, so it need not be known here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

# What Triton's launchers call their parameters, from 3.4 on and later: the values are the same.
_GRID = "gridX", "gridY", "gridZ", "stream", "function"
_HOOKS = "kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"
_KNOWN_PARAMETERS = (*_GRID, "args"), (*_GRID, *_HOOKS, "args")
_SCRATCH = "global_scratch_size", "profile_scratch_size"


class Launch(NamedTuple):
    """A launch on a grid.

    Attributes:
        function: takes the arguments before, the stream, those after, and the kernel's.
        before, after: what does not change.
        packed: whether the kernel's arguments are one tuple.
    """

    function: Callable[..., object]
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    packed: bool

    def on(self, stream: int) -> Callable[[tuple[Any, ...]], object]:
        """Returns what launches the kernel with a tuple of arguments."""
        bound = partial(self.function, *self.before, stream, *self.after)
        return bound if self.packed else lambda arguments: bound(*arguments)


def prepared(compiled: Any, grid: tuple[int, int, int], count: int) -> Launch | None:
    """Returns the launch of a kernel with `count` arguments; None if Triton's way is not known."""
    if not all(hasattr(compiled, n) for n in ("run", "function", "packed_metadata")):
        return None
    launcher, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    parameters = tuple(inspect.signature(type(launcher).__call__).parameters)
    if parameters[1:] not in _KNOWN_PARAMETERS:
        return None
    after = function, metadata, None, None, None
    direct = _direct(launcher, grid, after, count)
    return direct or Launch(launcher, grid, after, packed=False)


def _direct(
    launcher: Any, grid: tuple[int, int, int], after: tuple[Any, ...], count: int
) -> Launch | None:
    """Returns the call of the function in C that the launcher makes; None if it does more."""
    needs = any(getattr(launcher, name, None) != 0 for name in _SCRATCH)
    if needs or getattr(launcher, "gsan_enabled", False) or not hasattr(launcher, "launch"):
        return None
    seen: list[tuple[Any, ...]] = []
    probe = copy.copy(launcher)
    probe.launch = lambda *given: seen.append(given)
    stream, arguments = object(), tuple([object() for _ in range(count)])
    probe(*grid, stream, *after, *arguments)
    if len(seen) != 1 or seen[0].count(stream) != 1:
        return None
    (given,) = seen
    packed = given[-1:] == (arguments,)
    fixed = given[:-1] if packed else given[: len(given) - count]
    if stream not in fixed or not (packed or given[len(fixed) :] == arguments):
        return None
    at = fixed.index(stream)
    return Launch(launcher.launch, fixed[:at], fixed[at + 1 :], packed)
