"""Prompts that are concatenated, where the pool of SAPT-Prompt mixes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.methods.sapt import SaptConfig
from sapt_fast.ops.mix_prompts import mix_prompts

__all__ = ["Concatenated", "prompt_config"]


class Concatenated:
    """What stands before the inputs of a model with a prompt pool, in the pool's place.

    The rows of the pool are read as prompts of `rows` rows each, and those named by `index` are
    put one after the other.

    Args:
        model: patched with `adapter="prompt"`.
        rows: of one prompt.

    Attributes:
        index: [B, N], or [1, N] for all inputs, of int64.
    """

    index: Tensor

    def __init__(self, model: Any, rows: int) -> None:
        self.stack = model.sapt.prompts.rows
        self.rows = rows
        self.index = torch.zeros(1, 0, dtype=torch.int64)
        model.sapt.routing.pool = self

    @property
    def length(self) -> int:
        """How many rows are put before an input."""
        return self.index.shape[1] * self.rows

    def __call__(
        self,
        mixture: Tensor,
        embedding: nn.Module,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """[B, N rows + T, D]; arguments as those of the pool, whose mixture is not looked at."""
        embeds = embedding(input_ids) if inputs_embeds is None else inputs_embeds
        stacked = torch.cat([self.stack.frozen, self.stack.trainable])
        prompts = stacked.view(-1, self.rows, stacked.shape[1])[self.index].flatten(1, 2)
        if len(prompts) == 1:  # the same for all: a mixture of one
            return mix_prompts(prompts, mixture.new_ones(len(embeds), 1), embeds)
        return torch.cat([prompts.to(embeds.dtype), embeds], 1)


def prompt_config(config: SaptConfig, **values: Any) -> SaptConfig:
    """The config with prompts in place of LoRA; what concerns layers falls away."""
    return replace(config, adapter="prompt", target_modules=None, lora_dropout=0.0, **values)
