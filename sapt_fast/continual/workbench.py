"""A model, its tokenizer and the settings of a run: what rows become, and what is kept of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sapt_fast.continual.collate import Collator, encode_rows, pad_rows, prompt_ids
from sapt_fast.continual.data import Example, TaskData, read_split
from sapt_fast.continual.settings import ContinualSettings

__all__ = ["Workbench"]


class Workbench:
    """What the loop and the strategies work with.

    Attributes:
        model: the transformers model, patched while tasks are learned.
        tokenizer: its tokenizer.
        settings: of the run.
        causal: whether the model is decoder-only.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: ContinualSettings) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.causal = not model.config.is_encoder_decoder

    @property
    def device(self) -> torch.device:
        """Where the input embeddings are."""
        return self.model.get_input_embeddings().weight.device

    def inputs(self, rows: Sequence[Example]) -> list[list[int]]:
        """Token ids of the prompts of `rows`."""
        prompts = [row.prompt for row in rows]
        return prompt_ids(self.tokenizer, prompts, self.settings.max_source_length, self.causal)

    def encode(self, rows: Sequence[Example]) -> list[dict[str, list[int]]]:
        """`collate.encode_rows` of `rows`."""
        return encode_rows(
            self.tokenizer,
            rows,
            max_source_length=self.settings.max_source_length,
            max_target_length=self.settings.max_target_length,
            causal=self.causal,
        )

    def pad(self, inputs: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids [B, T] and mask [B, T] of inputs, padded on the right, on the device."""
        ids, mask = pad_rows(inputs, self.tokenizer.pad_token_id)
        return ids.to(self.device), mask.to(self.device)

    def collate(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """The batch of encoded rows, on the device."""
        batch = Collator(self.tokenizer.pad_token_id)(rows)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def kept(self, task: TaskData) -> Sequence[Example]:
        """What `settings.replay` keeps of an earlier task: real rows or pseudo-samples.

        Raises:
            OSError, ValueError: pseudo-samples cannot be read.
        """
        if self.settings.replay == "none":
            return []
        if self.settings.replay != "real":
            return read_split(self.settings.replay, task.benchmark, task.name)
        count = max(1, int(self.settings.replay_share * len(task.train)))
        draw = random.Random(f"{self.settings.seed}/{task.name}/replay")
        return [task.train[i] for i in sorted(draw.sample(range(len(task.train)), count))]
