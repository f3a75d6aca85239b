"""SAPT with prompts instead of LoRA."""

from __future__ import annotations

from typing import Any

from sapt_fast.continual.strategies.prompts import prompt_fields
from sapt_fast.continual.strategies.sapt import Sapt
from sapt_fast.methods.sapt import SaptConfig
from sapt_fast.methods.task_config import TaskConfig

__all__ = ["SaptPrompt"]


class SaptPrompt(Sapt):
    """SAPT-Prompt (Zhao et al., ACL 2024): `Sapt` on a pool of prompts.

        input = [sum_k a_k(x) P_k ; x]

    P_k [prompt_length, D] starts as random rows of the vocabulary. The paper describes this
    variant; the original SAPT code does not contain it.
    """

    data = ("text",)

    def configure(self, config: TaskConfig[Any]) -> SaptConfig:
        return SaptConfig(**{**prompt_fields(config), "own_key_loss": config.own_key_loss})
