"""Counts what Triton kernels do in the interpreter: bytes, multiplications, launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest


@dataclass
class Work:
    """Sums over all programs: a value that two programs load counts twice."""

    loaded: int = 0  # bytes
    stored: int = 0  # bytes
    flops: int = 0  # of matrix products


@contextmanager
def counted_work() -> Iterator[Work]:
    """Yield counts that grow with every kernel which runs in the block."""
    from triton.runtime.interpreter import InterpreterBuilder

    work = Work()

    def masked(mask: Any, pointers: Any) -> int:
        itemsize = pointers.get_element_ty().primitive_bitwidth // 8
        return int(np.count_nonzero(mask.data)) * itemsize

    def load(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, ptrs: Any, mask: Any, *others: Any, **named: Any) -> Any:
            work.loaded += masked(mask, ptrs)
            return original(self, ptrs, mask, *others, **named)

        return wrapper

    def store(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, ptrs: Any, value: Any, mask: Any, *others: Any, **named: Any) -> Any:
            work.stored += masked(mask, ptrs)
            return original(self, ptrs, value, mask, *others, **named)

        return wrapper

    def dot(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, a: Any, b: Any, *others: Any, **named: Any) -> Any:
            work.flops += 2 * a.data.size * b.data.shape[-1]
            return original(self, a, b, *others, **named)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name, wrap in (
            ("create_masked_load", load), ("create_masked_store", store), ("create_dot", dot),
        ):  # fmt: skip
            patch.setattr(InterpreterBuilder, name, wrap(getattr(InterpreterBuilder, name)))
        yield work
