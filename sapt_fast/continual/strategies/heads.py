"""Methods that only learn a head, of frozen features: by training, or in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sapt_fast.continual.data.rows import TaskData
from sapt_fast.continual.strategies.shared import SeqLora

__all__ = ["FineTunedHead", "FrozenLda", "FrozenNcm", "FrozenRidge"]


class FineTunedHead(SeqLora):
    """The head alone is trained on every task in turn: L = CE. The bar for adapters and prompts.

    The model has one adapter of weight 0, which does not train and does not act, so that runs are
    saved as those of other methods.
    """

    adapter = "unused"
    data = ("images",)

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        super().begin_task(task, learned)
        for pool in self.handle.pools.values():
            pool.requires_grad_(False)

    def mixture(self, inputs: Tensor, attention_mask: Tensor | None) -> Tensor:
        return torch.zeros(1, 1, device=inputs.device)


class _Closed(FineTunedHead):
    """A head in closed form on the features of the frozen model. Nothing is trained.

    Every image is seen once, and the result does not depend on the order of the tasks.
    """

    trains = False

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        super().begin_task(task, learned)
        self.model.requires_grad_(False)


class FrozenNcm(_Closed):
    """The nearest class mean of frozen features (Janson et al., arXiv 2210.04428)."""

    head: ClassVar[str | None] = "ncm"


class FrozenLda(_Closed):
    """Incremental linear discriminant analysis of frozen features."""

    head: ClassVar[str | None] = "lda"


class FrozenRidge(_Closed):
    """Incremental ridge regression of frozen features on the classes."""

    head: ClassVar[str | None] = "ridge"
