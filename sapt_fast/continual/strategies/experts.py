"""One adapter per task, chosen by the classes that a frozen model sees in the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapt_fast.continual.data.rows import TaskData
from sapt_fast.continual.strategies.shared import Single

__all__ = ["LdaExperts"]


class LdaExperts(Single):
    """A private adapter per task, routed by LDA on frozen features: L = CE of the task's adapter.

    An image takes the adapter of the task whose classes together are likeliest by LDA, and is
    predicted among the classes of this task. All tasks share the head, each its own rows: with
    masked logits, a later task does not change the rows of an earlier one.
    """

    alone = False
    routes = True
    own_classes_only = True
    data = ("images",)
    _learning = False

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        super().begin_task(task, learned)
        self._learning = True

    def mixture(self, inputs: Tensor, attention_mask: Tensor | None) -> Tensor:
        count = len(self.handle.tasks)
        if self._learning:
            chosen = torch.tensor([count - 1], device=inputs.device)
        else:
            bench: Any = self.bench
            chosen = bench.task_of(inputs, count)
        return F.one_hot(chosen, count).float()

    def end_task(self, task: TaskData) -> None:
        self._learning = False

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._learning = False
