"""EPI: each task has a private adapter; each input uses the adapter of the nearest Gaussian."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sapt_fast.continual.data.rows import TaskData
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.strategies.base import Strategy, options_from, require
from sapt_fast.methods.epi import EpiConfig
from sapt_fast.methods.task_config import TaskConfig

__all__ = ["Epi"]


class Epi(Strategy):
    """Efficient parameter isolation (Wang et al., EPI, ACL 2023): L = CE of a private adapter.

    `sapt_fast.methods.epi.EpiHandle` selects the adapter by the nearest Gaussian.
    """

    Options = options_from("EpiOptions", EpiConfig, "shrinkage")
    routes = True

    @classmethod
    def check(cls, settings: ContinualSettings) -> None:
        kind = settings.sapt.adapter
        # A prompt of weight zero would still change the features of the backbone.
        require(kind == "lora", "adapter", kind, "'lora': features are computed without adapters")

    def configure(self, config: TaskConfig[Any]) -> EpiConfig:
        return EpiConfig(**config.to_dict(), shrinkage=self.options.shrinkage)

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        self.handle.add_task(task.name)

    def mixture(self, inputs: Tensor, attention_mask: Tensor | None) -> Tensor:
        # Under autocast as in training, because generation runs without it.
        with self.bench.settings.autocast(inputs.device):
            weights: Tensor = self.handle.route(inputs, attention_mask)
        return weights

    def end_task(self, task: TaskData) -> None:
        self.model.eval()
        with self.bench.settings.autocast(self.bench.device):
            self.handle.fit(self.bench.batches(task.train))
