"""Methods with a single adapter: on all tasks in turn, on all at once, or on each alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sapt_fast.continual.data.rows import TaskData
from sapt_fast.continual.strategies.base import Strategy

__all__ = ["Joint", "SeqLora", "Single"]


class SeqLora(Strategy):
    """One adapter fine-tuned on every task in turn: L = CE, the lower bound.

    With a single key, the router's weight is always 1, so the router does not train.
    """

    adapter = "shared"
    data: ClassVar[tuple[str, ...]] = ("text", "images")

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        if not self.handle.tasks:
            self.handle.add_task(self.adapter)
        self.freeze_router()


class Joint(SeqLora):
    """The upper bound: one adapter on the examples of all tasks at once, for all their steps.

    There is no sequence, so the score matrix has one row, and F.Ra and BWT are undefined.
    """

    together = True


class Single(Strategy):
    """One adapter per task, each on the base model: the reference for forward transfer."""

    alone = True
    data: ClassVar[tuple[str, ...]] = ("text", "images")

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        self.handle.add_task(task.name)
        self.freeze_router()
