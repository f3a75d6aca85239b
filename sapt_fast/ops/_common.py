"""Helpers of several ops: supported dtypes, and autocast."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sapt_fast import dispatch

_ON_A_MAC = torch.backends.mps.is_built()

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def require_tensors(**named: object) -> None:
    """Raises TypeError if a named argument is neither a tensor nor None."""
    for name, value in named.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")


def require_ids_of_table(input_ids: Tensor, table: Tensor) -> None:
    """Raises unless input_ids [B, T] are whole numbers and table is [V, D]; their values may be
    any."""
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids: got shape {tuple(input_ids.shape)}, expected [B, T]")
    if input_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"input_ids: got dtype {input_ids.dtype}, expected int32 or int64")
    if table.dim() != 2:
        raise ValueError(f"table: got shape {tuple(table.shape)}, expected [V, D]")


def autocasts(device: torch.device) -> bool:
    """Returns whether autocast is on for tensors of a device; torch raises for meta."""
    # A fifth of the time of what follows. On a Mac it leaves out that machine's GPU.
    if not (torch._C._is_any_autocast_enabled() or _ON_A_MAC):
        return False
    kind = device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of the products: x's, or autocast's unless x is float64."""
    if x.dtype != torch.float64 and autocasts(x.device):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Returns a context without autocast."""
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def kernel(
    op: str,
    name: str,
    backend: str | None,
    x: Tensor,
    rows: int | None = None,
    ranks: int = 0,
    feature: str | None = None,
) -> Callable[..., Any]:
    """Returns a kernel of the backend that dispatch selects; it runs without autocast."""
    chosen = dispatch.resolve(op, x.device, backend, x.dtype, rows, ranks, feature)
    return guarded(getattr(dispatch.kernels(op, chosen), name), x)


def guarded(function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """Returns the function, which then runs without autocast on x's device."""
    if not autocasts(x.device):
        return function

    def call(*arguments: Any) -> Any:
        with without_autocast(x.device):
            return function(*arguments)

    return call
