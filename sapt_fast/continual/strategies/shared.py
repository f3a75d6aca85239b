"""Methods with one adapter for all tasks: in sequence, each alone, all at once."""

from __future__ import annotations

from collections.abc import Sequence

from sapt_fast.continual.data.rows import TaskData
from sapt_fast.continual.strategies.base import Strategy

__all__ = ["Joint", "SeqLora", "Single"]


class SeqLora(Strategy):
    """One adapter fine-tuned on every task in turn: L = CE, the lower bound.

    With a single key the router's weight is always one, so it does not train.
    """

    adapter = "shared"

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        if not self.handle.tasks:
            self.handle.add_task(self.adapter)
        self.freeze_router()


class Joint(SeqLora):
    """One adapter on the rows of all tasks at once, as many steps as all tasks have together.

    The upper bound: there is no sequence, so its score matrix has one row, and neither F.Ra nor
    BWT is defined.
    """

    together = True


class Single(Strategy):
    """Every task alone on the base model: the reference for forward transfer."""

    alone = True

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        self.handle.add_task(task.name)
        self.freeze_router()
