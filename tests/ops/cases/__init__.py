"""What every op is tested with: one file per op, over which the shared tests of this folder run.

A file has the name of its op and defines:

- `FORMULAS`: calls in float64 with the same in plain torch, for values, derivatives and transforms.
- `SAMPLES`: calls whose results and gradients every backend is held to, in any layout and dtype.
- `EMPTY`: calls without elements, whose gradients are zeros.
- `PAIRS`: a call in any two dtypes and which of them are allowed.
- `BAD`: calls that must raise, with what the message says.
- `registered(backend)`: the ops that torch knows, with arguments for `torch.library.opcheck`.

It may define `WAYS`, further ways of a backend by name, with `choose(way, monkeypatch)`; and
`COMPILES`, False where torch.compile cannot see the whole op.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

D64 = torch.float64
SAME, SAME_OR_FLOAT32, ANY = "same", "same or float32", "any"
GPU = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets on the CPU


class Case(NamedTuple):
    """One way to call an op: `run(*inputs, backend=...)` and the same in plain torch."""

    run: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


class Sample(NamedTuple):
    """A call in float32: `run(**inputs, backend=...)` gives a tensor or several.

    Attributes:
        wide: the inputs that stay in float32 where the others have 16 bits.
        frozen: the floating-point inputs that get no gradient.
    """

    run: Callable[..., Any]
    inputs: dict[str, Tensor]
    wide: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    def outputs(self, inputs: dict[str, Tensor], backend: str | None) -> tuple[Tensor, ...]:
        """All results, the differentiable ones first."""
        results = self.run(**inputs, backend=backend)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(sorted(results, key=lambda t: not t.is_floating_point()))


class Pair(NamedTuple):
    """`run(dtype, other, backend)`, which dtypes `other` may be, and who is named if it is not."""

    run: Callable[[torch.dtype, torch.dtype, str | None], Tensor]
    allowed: str
    name: str
    keeps_dtype: bool = False


class Bad(NamedTuple):
    """A call that raises, and a pattern of its message."""

    run: Callable[[], object]
    error: type[Exception]
    message: str


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=D64)


def floats(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Normal numbers in float32 by name."""
    return {n: draw(*shape, seed=i).float() for i, (n, shape) in enumerate(shapes.items())}


def device(backend: str | None) -> str:
    """Where a backend runs here."""
    return GPU if backend == "triton" else "cpu"


def modules() -> dict[str, ModuleType]:
    """The case file of every op, by the op's name."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def named(what: str) -> dict[str, tuple[str, Any]]:
    """The entries of one table in all files as "op name", each with its op."""
    return {
        f"{op} {name}": (op, entry)
        for op, module in modules().items()
        for name, entry in getattr(module, what).items()
    }
