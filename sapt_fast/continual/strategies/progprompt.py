"""ProgPrompt: every task adds a prompt before those of the earlier tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sapt_fast.continual.data.rows import TaskData
from sapt_fast.continual.strategies.base import Strategy
from sapt_fast.continual.strategies.prompts import Concatenated, prompt_config
from sapt_fast.methods.sapt import SaptConfig

__all__ = ["ProgPrompt"]


class ProgPrompt(Strategy):
    """Progressive prompts (Razdaibiedina et al., ICLR 2023).

        L = CE(y | [P_t; P_{t-1}; ...; P_1; x])

    The newest prompt trains, the earlier ones are frozen; each starts as random rows of the
    vocabulary and has `prompt_length` rows. The release knows which task an input is of and puts
    the prompts up to that one before it; here the task is not known, so all prompts learned so far
    stand before every input. The optional reparametrisation by a residual MLP is left out.
    """

    _layout: Concatenated

    def configure(self, config: SaptConfig) -> SaptConfig:
        return prompt_config(config)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._layout = Concatenated(self.model, self.model.sapt.config.prompt_length)

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        self.model.sapt.add_task(task.name)
        self.freeze_router()

    def mixture(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        count = len(self.model.sapt.tasks)
        newest_first = torch.arange(count - 1, -1, -1, device=input_ids.device)
        self._layout.index = newest_first[None]
        return torch.ones(1, count, device=input_ids.device)
