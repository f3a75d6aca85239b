"""Exchanges rows between processes; sums are made in the order of the processes.

Every process has to call these together, in the same order and with the same shapes, and to run the
backward if any other does. Without torch.distributed there is one process, and nothing is sent.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Group", "exchanged", "gathered_rows", "summed_rows"]


class Group:
    """The processes that share something.

    Args:
        group: a process group; None for all processes.

    Attributes:
        group: as above; None if there is one process without torch.distributed.
        size: number of processes, W.
        rank: number of this one.
    """

    def __init__(self, group: Any = None) -> None:
        there = dist.is_available() and dist.is_initialized()
        self.group: Any = (group or dist.group.WORLD) if there else None
        self.size = dist.get_world_size(self.group) if there else 1
        self.rank = dist.get_rank(self.group) if there else 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self

    def gather(self, rows: Tensor) -> Tensor:
        """Returns the rows [M, ...] of all processes, [W * M, ...]."""
        if self.size == 1:
            return rows.clone()
        from torch.distributed import _functional_collectives as collectives

        gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
        return _like(collectives.wait_tensor(gather(_bytes(rows), 0, self.group)), rows)

    def exchange(
        self, rows: Tensor, sent: list[int] | None = None, received: list[int] | None = None
    ) -> Tensor:
        """Sends a part of the rows to each process, and returns what each has sent to this one.

        Args:
            rows: [R, ...], in the order of the processes that get them.
            sent: number of rows for each process; None for equal parts.
            received: number of rows from each process.

        Returns:
            [sum of received, ...], in the order of the processes.
        """
        if self.size == 1:
            return rows.clone()
        from torch.distributed import _functional_collectives as collectives

        found = collectives.all_to_all_single(_bytes(rows), received, sent, self.group)
        return _like(collectives.wait_tensor(found), rows)

    def counts(self, count: int, device: torch.device) -> list[int]:
        """Returns the number that each process has given; waits for the device."""
        return [int(n) for n in self.gather(torch.tensor([count], device=device))]

    def gather_ragged(self, rows: Tensor) -> Tensor:
        """As `gather`, of different numbers of rows."""
        counts = self.counts(len(rows), rows.device)
        everyone = self.gather(_padded(rows, max(counts)))
        parts = everyone.view(self.size, max(counts), *rows.shape[1:])
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gathered_rows(rows: Tensor, group: Group) -> Tensor:
    """As `Group.gather`, differentiable: the gradients of all processes are summed."""
    gathered: Tensor = _Gather.apply(rows, group)
    return gathered


def summed_rows(rows: Tensor, group: Group) -> Tensor:
    """Returns the sum over the processes of the part of this one's rows.

    Args:
        rows: [W * M, ...], terms for the rows of each process.
        group: the processes.

    Returns:
        [M, ...], summed in float32 or wider, in the order of the processes; differentiable.
    """
    summed: Tensor = _Sum.apply(rows, group)
    return summed


def exchanged(rows: Tensor, group: Group) -> Tensor:
    """As `Group.exchange` of equal parts, differentiable."""
    found: Tensor = _Exchange.apply(rows, group)
    return found


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.gather(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _summed(rows, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.group.gather(gradient), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.exchange(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.group.exchange(gradient), None


def _summed(rows: Tensor, group: Group) -> Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    parts = group.exchange(rows).unflatten(0, (group.size, -1)).to(wide)
    return reduce(torch.add, parts.unbind(0)).to(rows.dtype)


def _padded(rows: Tensor, count: int) -> Tensor:
    """Returns `count` rows, the last of which are zeros."""
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])


def _bytes(rows: Tensor) -> Tensor:
    """Returns rows [R, ...] as [R, bytes]: gloo does not know every dtype."""
    flat = rows.detach().contiguous().view(len(rows), rows.shape[1:].numel())
    return flat.view(torch.uint8)


def _like(received: Tensor, rows: Tensor) -> Tensor:
    return received.view(rows.dtype).view(len(received), *rows.shape[1:])
