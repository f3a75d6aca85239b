"""What several ops share: the dtypes they take, and how autocast concerns them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sapt_fast import dispatch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def require_tensors(**named: object) -> None:
    """Raises TypeError for a named argument that is no tensor; None is one that was left out."""
    for name, value in named.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for tensors of that device; torch raises when asked for meta's."""
    kind = device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Leaves the dtypes inside alone."""
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def kernel(
    op: str, name: str, backend: str | None, x: Tensor, rows: int | None = None
) -> Callable[..., Any]:
    """A kernel of the backend that dispatch chooses; autocast does not reach into it."""
    chosen = dispatch.resolve(op, x.device, backend, x.dtype, rows)
    return guarded(getattr(dispatch.kernels(op, chosen), name), x)


def guarded(function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """The function, which autocast for tensors of x's device does not reach into."""
    if not autocasts(x.device):
        return function

    def call(*arguments: Any) -> Any:
        with without_autocast(x.device):
            return function(*arguments)

    return call
