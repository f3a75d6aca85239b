"""Exchanges rows between processes; sums are made in the order of the processes.

Every process has to call these together, in the same order and with the same shapes, and to run the
backward if any other does. Without torch.distributed there is one process, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Group", "Sent", "Share", "exchanged", "gathered_rows"]

_Result = TypeVar("_Result")


class Group:
    """The processes that share something.

    Args:
        group: a process group; None for all processes.
        alone: whether it is this process only, also where there are others.

    Attributes:
        group: as above; None if there is one process without torch.distributed.
        size: number of processes, W.
        rank: number of this one.
    """

    def __init__(self, group: Any = None, *, alone: bool = False) -> None:
        there = not alone and dist.is_available() and dist.is_initialized()
        self.group: Any = (group or dist.group.WORLD) if there else None
        self.size = dist.get_world_size(self.group) if there else 1
        self.rank = dist.get_rank(self.group) if there else 0

    @property
    def name(self) -> str:
        """A folder for what this process alone writes; of one process, the one it is in."""
        return f"process-{self.rank}-of-{self.size}" if self.size > 1 else "."

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
        if self.size == 1:
            return rows.clone()
        counts = self.counts(len(rows), rows.device)
        everyone = self.gather(_padded(rows, max(counts)))
        parts = everyone.view(self.size, max(counts), *rows.shape[1:])
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def first(self, rows: Tensor) -> Tensor:
        """Returns the rows [M, ...] of the first process; all give as many."""
        return rows if self.size == 1 else self.gather(rows)[: len(rows)]

    def values(self, value: Any) -> list[Any]:
        """Returns the small Python values of all processes."""
        found = [value] * self.size
        if self.group is not None:
            dist.all_gather_object(found, value, self.group)
        return found

    def require_same(self, name: str, value: Any) -> None:
        """Raises ValueError, on every process, unless all have the same value."""
        for rank, other in enumerate(self.values(value)):
            if other != value:
                raise ValueError(
                    f"{name}: process {rank} got others than process {self.rank}, expected the "
                    "same on all processes"
                )

    def together(self, function: Callable[[], _Result]) -> _Result:
        """Calls a function; if it raises an error on a process, all raise one."""
        error: Exception | None = None
        try:
            result = function()
        except Exception as raised:
            error = raised
        messages = self.values(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise RuntimeError(f"process {rank}: {message}")
        return result

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.group is not None:
            dist.barrier(self.group)


class Share:
    """The rows of a batch that one process computes: every W-th, and at least one.

    A process that would have none computes the first row too, which is not counted.

    Args:
        count: number of rows of the batch, B.
        group: the processes.

    Attributes:
        rows: the numbers of the rows that this process computes.
    """

    def __init__(self, count: int, group: Group) -> None:
        own = [*range(group.rank, count, group.size)]
        self.group, self.count = group, count
        self.rows = own or [0]
        self._counted = len(own)

    def gather(self, values: Tensor) -> Tensor:
        """Returns values of all rows, [B, ...], given those of this process's rows."""
        size = self.group.size
        if size == 1:
            return values
        found = self.group.gather_ragged(values[: self._counted])
        order = [row for rank in range(size) for row in range(rank, self.count, size)]
        return found[torch.tensor(order, device=found.device).argsort()]

    def mine(self, chosen: Tensor) -> Tensor:
        """Returns which of this process's rows are chosen, given that of all rows [B] bool."""
        mine = chosen[self.rows]
        return mine if self._counted else torch.zeros_like(mine)


def gathered_rows(rows: Tensor, group: Group) -> Tensor:
    """As `Group.gather`, differentiable: the gradients of all processes are summed."""
    gathered: Tensor = _Linear.apply(rows, group.gather, partial(_summed, group=group))
    return gathered


def exchanged(rows: Tensor, group: Group) -> Tensor:
    """As `Group.exchange` of equal parts, differentiable."""
    found: Tensor = _Linear.apply(rows, group.exchange, group.exchange)
    return found


class Sent:
    """Rows that go to some of the processes, and what these return for them.

    This waits for the device.

    Args:
        targets: [M, k] int64, the processes to which each row goes (also twice); -1 for none.
        group: the processes.
    """

    def __init__(self, targets: Tensor, group: Group) -> None:
        goes = torch.zeros(len(targets), group.size + 1, dtype=torch.bool, device=targets.device)
        goes = goes.scatter_(1, torch.where(targets < 0, group.size, targets), True)[:, :-1]
        self.group, self.count = group, len(targets)
        self.rows = goes.t().nonzero()[:, 1]  # in the order of the processes
        counts = goes.sum(0)
        self.sent: list[int] = counts.tolist()
        self.received: list[int] = group.exchange(counts).tolist()

    def send(self, rows: Tensor) -> Tensor:
        """Returns what all processes send to this one of their rows [M, ...]; differentiable."""
        sent: Tensor = _Linear.apply(rows, self._there, self._back)
        return sent

    def returned(self, terms: Tensor) -> Tensor:
        """Returns terms, one for each received row, to where the rows are from.

        Returns:
            [M, ...], for each of this process's rows the sum of its terms, in float32 or wider and
            in the order of the processes; differentiable.
        """
        returned: Tensor = _Linear.apply(terms, self._back, self._there)
        return returned

    def _there(self, rows: Tensor) -> Tensor:
        return self.group.exchange(rows[self.rows], self.sent, self.received)

    def _back(self, terms: Tensor) -> Tensor:
        parts = self.group.exchange(terms, self.received, self.sent)
        wide = torch.promote_types(terms.dtype, torch.float32)
        out = terms.new_zeros(self.count, *terms.shape[1:], dtype=wide)
        for rows, part in zip(self.rows.split(self.sent), parts.split(self.sent), strict=True):
            out[rows] += part.to(wide)
        return out.to(terms.dtype)


class _Linear(torch.autograd.Function):
    """A linear map of rows between processes, and its transpose for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.back = back
        return there(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradient), None, None


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
