"""ProgPrompt: every task inserts a prompt before those of the earlier tasks.

Razdaibiedina et al., "Progressive Prompts: Continual Learning for Language Models", ICLR 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapt_fast.methods.concatenated import ConcatenatedConfig, ConcatenatedHandle
from sapt_fast.pools.prompts import ConcatenatedPrompts
from sapt_fast.sites.embeddings import PlacesRouting

__all__ = ["ProgPromptConfig", "ProgPromptHandle"]


@dataclass
class ProgPromptConfig(ConcatenatedConfig["ProgPromptHandle"]):
    """The length of a prompt; fields of LoRA and of the router have no effect."""

    @property
    def method(self) -> str:
        """The name of the method."""
        return "progprompt"


class ProgPromptHandle(ConcatenatedHandle):
    """`PromptHandle` that inserts all prompts before every input, the newest first.

        input = [P_t; P_{t-1}; ...; P_1; x]

    The newest prompt trains; the earlier ones are frozen. Each starts as random rows of the
    vocabulary. The authors' code knows an input's task and uses the prompts up to that task; here
    the task is unknown. The optional reparametrisation by a residual MLP is not implemented.
    """

    Config = ProgPromptConfig
    method = "progprompt"

    def __init__(self, model: Any, config: Any, report: Any) -> None:
        super().__init__(model, config, report)
        pool = ConcatenatedPrompts(self.prompts.rows, config.prompt_length, self._count)
        self.routing = PlacesRouting(model, self.signal, self._has_tasks, self._count, pool)

    def signal(self, **inputs: Tensor | None) -> Tensor:
        """Returns the indices [1, K] int64 of the prompts, for all inputs."""
        return torch.arange(len(self.tasks) - 1, -1, -1, device=self._device)[None]
