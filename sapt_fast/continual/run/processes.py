"""A continual run in several processes, which torchrun or accelerate launch starts.

They train each task together and divide the evaluation; only the first one writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

__all__ = ["count", "first_goes_first", "gathered", "is_first", "share", "start", "wait"]

_Item = TypeVar("_Item")


def require_device(device: str | None) -> None:
    """Raises ValueError for 'cuda' if torch sees no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', but torch sees no GPU; use 'cpu'")


def start(device: str | None) -> torch.device:
    """Joins the other processes, if there are any.

    Args:
        device: "cpu", "cuda", or None for a GPU if there is one.

    Returns:
        This process's device.

    Raises:
        ValueError: if `device` is "cuda" and torch sees no GPU.
    """
    require_device(device)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return torch.device(device)
    from accelerate import PartialState

    return PartialState(cpu=device == "cpu").device


def count() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if _several() else 1


def is_first() -> bool:
    """Returns whether this is the process that writes."""
    return _rank() == 0


def wait() -> None:
    """Waits until all processes have called it."""
    if _several():
        dist.barrier()


@contextmanager
def first_goes_first() -> Iterator[None]:
    """A context that the first process enters alone, and the others after it has left."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def share(items: Sequence[_Item]) -> Sequence[_Item]:
    """This process's part of the items: every `count()`-th, from its rank on."""
    return items[_rank() :: count()]


def gathered(own: Sequence[_Item]) -> list[_Item]:
    """The results of all processes' shares, in the order of the items; every process calls it."""
    if not _several():
        return list(own)
    parts: list[Any] = [None] * count()
    dist.all_gather_object(parts, list(own))
    total = sum(map(len, parts))
    return [parts[place % count()][place // count()] for place in range(total)]


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _rank() -> int:
    return dist.get_rank() if _several() else 0
