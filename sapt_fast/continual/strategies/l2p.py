"""L2P: every input selects prompts from one pool by their keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from sapt_fast.continual.data.rows import TaskData
from sapt_fast.continual.objective import Step
from sapt_fast.continual.strategies.base import Strategy, options_from
from sapt_fast.continual.strategies.prompts import prompt_fields
from sapt_fast.methods.l2p import L2PConfig
from sapt_fast.methods.task_config import TaskConfig

__all__ = ["L2p"]


class L2p(Strategy):
    """Learning to prompt (Wang et al., CVPR 2022), for images and text: `model.l2p`.

        L = CE(y | [P_s1; ...; P_sN; x]) - lambda (1 / B) sum_b sum_i cos(q(x_b), k_si)

    All prompts and keys train in every task. `diversified` is the paper's penalty on prompts that
    past tasks chose. With `prompts=1` and `top=1`, all inputs share one prompt.
    """

    Options = options_from(
        "L2pOptions",
        L2PConfig,
        *("prompts", "top", "length", "strength", "diversified", "choice", "task_prompts"),
        *("shared_pool_copy", "centre_queries", "keys_start", "prompt_start", "layer"),
    )
    data = ("text", "images")

    def configure(self, config: TaskConfig[Any]) -> L2PConfig:
        return L2PConfig(**{**prompt_fields(config), **asdict(self.options)})

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        first = not self.handle.tasks
        self.handle.grow(task.name if self.bench.has_images else "prompts")
        if first and self.handle.config.needs_start:
            self.handle.start_from(self.bench.batches(task.train))

    def objective(self, step: Step) -> Tensor:
        batch = step.batch
        if self.bench.has_images:
            pull: Tensor = self.handle.key_loss()  # of the forward that has just run
        else:
            labels = batch["labels"] if self.bench.causal else None
            pull = self.handle.key_loss(batch["input_ids"], batch["attention_mask"], labels)
        return step.loss + pull

    def end_task(self, task: TaskData) -> None:
        self.handle.count_picks(self.bench.batches(task.train))
