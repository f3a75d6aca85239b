"""ProgPrompt: every task inserts a prompt before those of the earlier tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sapt_fast.continual.data.rows import TaskData
from sapt_fast.continual.strategies.base import Strategy
from sapt_fast.continual.strategies.prompts import prompt_fields
from sapt_fast.methods.progprompt import ProgPromptConfig
from sapt_fast.methods.task_config import TaskConfig

__all__ = ["ProgPrompt"]


class ProgPrompt(Strategy):
    """Progressive prompts (Razdaibiedina et al., ICLR 2023): `methods.progprompt`.

        L = CE(y | [P_t; P_{t-1}; ...; P_1; x])

    The newest prompt trains; the earlier ones are frozen.
    """

    def configure(self, config: TaskConfig[Any]) -> ProgPromptConfig:
        return ProgPromptConfig(**prompt_fields(config))

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        self.handle.add_task(task.name)
