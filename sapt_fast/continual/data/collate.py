"""Turns text rows into padded batches of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapt_fast.continual.data.rows import Example

__all__ = ["Collator", "encode_rows", "pad_rows", "prompt_ids"]

LABEL_PADDING = -100


def pad_rows(
    rows: Sequence[Sequence[int]], padding: int, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and their mask [B, T] (int64; 1 for tokens), padded to the longest row."""
    width = max(map(len, rows), default=0)
    ids = torch.full((len(rows), width), padding, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place] = torch.tensor(row, dtype=torch.int64)
        mask[index, place] = 1
    return ids, mask


def prompt_ids(
    tokenizer: Any, prompts: Sequence[str], max_length: int | None, causal: bool
) -> list[list[int]]:
    """Token ids of prompts, cut to `max_length` if that is given.

    A decoder-only model continues its prompt, so an end token that the tokenizer adds is removed.
    """
    cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
    rows = tokenizer(list(prompts), **cut)["input_ids"]
    if causal and tokenizer.eos_token_id is not None:
        rows = [row[:-1] if row and row[-1] == tokenizer.eos_token_id else row for row in rows]
    return [list(row) for row in rows]


def encode_rows(
    tokenizer: Any,
    rows: Sequence[Example],
    *,
    max_source_length: int,
    max_target_length: int,
    causal: bool,
) -> list[dict[str, list[int]]]:
    """Encodes training rows as token ids.

    Returns:
        `input_ids` and `labels` of each row. For a decoder-only model the input is the prompt
        followed by the target, and the prompt's labels are -100.
    """
    sources = prompt_ids(tokenizer, [row.prompt for row in rows], max_source_length, causal)
    targets = _target_ids(tokenizer, [row.output for row in rows], max_target_length, causal)
    if not causal:
        return [
            {"input_ids": source, "labels": target}
            for source, target in zip(sources, targets, strict=True)
        ]
    return [
        {"input_ids": source + target, "labels": [LABEL_PADDING] * len(source) + target}
        for source, target in zip(sources, targets, strict=True)
    ]


def _target_ids(
    tokenizer: Any, texts: Sequence[str], max_length: int, causal: bool
) -> list[list[int]]:
    if not causal:
        rows = tokenizer(text_target=list(texts), truncation=True, max_length=max_length)
        return [list(row) for row in rows["input_ids"]]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [list(row)[: max_length - len(end)] + end for row in rows]


@dataclass(frozen=True)
class Collator:
    """Makes a batch of rows of `encode_rows`, padded on the right so that positions do not change.

    Attributes:
        pad_token_id: pads `input_ids`; labels are padded with -100.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        ids, mask = pad_rows([row["input_ids"] for row in rows], self.pad_token_id)
        labels, _ = pad_rows([row["labels"] for row in rows], LABEL_PADDING)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
