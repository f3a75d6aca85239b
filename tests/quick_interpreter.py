"""Triton's interpreter without work that it repeats: the same results in less time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from triton.language import core
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction


@contextmanager
def quick() -> Iterator[None]:
    """Calls device functions in the block without patching `triton.language` for each again.

    A launch patches it for all that runs in it. The interpreter patches it once more for every call
    of a device function, `tl.sum` and `tl.zeros` included, which takes a third of its time.
    """
    original = InterpretedFunction.__call__

    def call(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        if core.is_builtin(core.load):  # the first call, which patches `core` for good
            return original(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    look_up = interpreter._get_np_dtype  # makes a table of all dtypes each time
    known: dict[str, np.dtype] = {}

    def np_dtype(dtype: core.dtype) -> np.dtype:
        name = dtype.scalar.name
        if name not in known:
            known[name] = look_up(dtype.scalar)
        return known[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "__call__", call)
        patch.setattr(interpreter, "_get_np_dtype", np_dtype)
        yield
