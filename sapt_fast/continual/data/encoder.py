"""Classification with an encoder: inputs are matched to frozen encodings of all label strings.

No classification head is trained, and the task of an input need not be known: an input's pooled
encoding is compared with those of the labels of all tasks of the run. The base model encodes the
labels before any adapter is trained. They include the labels of later tasks from the start: an
adapter that was trained without them would not learn that they are wrong answers (sentiment "Good"
loses to a later "positive").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapt_fast.continual.data.collate import LABEL_PADDING, pad_rows, prompt_ids
from sapt_fast.continual.data.rows import Example, TaskData
from sapt_fast.devices import execution_device
from sapt_fast.ops.route import pool_embeds

__all__ = ["LabelSpace", "encode_label_rows", "encode_labels", "label_strings", "plain_prompts"]


@dataclass(frozen=True)
class LabelSpace:
    """Label strings with their encodings, to which inputs are matched.

    Attributes:
        labels: C distinct strings.
        encodings: [C, D] float32, each of norm one.
        temperature: divisor of the cosines.
    """

    labels: tuple[str, ...]
    encodings: Tensor
    temperature: float

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Logits [B, 1, C] float32: cosine of the mean over the tokens with each label's encoding.

        Args:
            hidden: [B, T, D], an encoder's last hidden states.
            mask: [B, T], 1 where there is a token.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            cosines = self.pooled(hidden, mask) @ self.encodings.to(hidden.device).T
        return (cosines / self.temperature)[:, None]

    def logits(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns logits [B, 1, C] of a forward.

        Args:
            outputs: of the encoder, with `last_hidden_state` [B, T, D].
            batch: the inputs of the forward, with `attention_mask` [B, T].
        """
        return self(outputs.last_hidden_state, batch["attention_mask"])

    @staticmethod
    def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
        """[B, D] float32 of norm one: the normalised mean of the tokens' hidden states."""
        return F.normalize(pool_embeds(hidden.float(), mask=mask, pooling="mean"), dim=-1)

    def index(self, label: str) -> int:
        """The index of a label; -100, which the loss ignores, for a string that is not a label."""
        return self.labels.index(label) if label in self.labels else LABEL_PADDING


def label_strings(task: TaskData) -> tuple[str, ...]:
    """A task's labels: those of labels.json, or the distinct outputs of its training rows."""
    if task.labels is not None:
        return task.labels
    return tuple(sorted({output for row in task.train for output in row.outputs}))


@torch.no_grad()
def encode_labels(
    model: Any, tokenizer: Any, labels: Sequence[str], temperature: float, batch_size: int = 64
) -> LabelSpace:
    """Encodes labels with a base encoder.

    Args:
        model: an encoder without adapters; left in evaluation mode.
        tokenizer: its tokenizer.
        labels: in any order; duplicates are removed.
        temperature: divisor of the cosines.
        batch_size: labels encoded at a time.
    """
    model.eval()
    labels = tuple(dict.fromkeys(labels))
    device, parts = execution_device(model.get_input_embeddings()), []
    for start in range(0, len(labels), batch_size):
        rows = prompt_ids(tokenizer, labels[start : start + batch_size], None, causal=False)
        ids, mask = (t.to(device) for t in pad_rows(rows, tokenizer.pad_token_id))
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        parts.append(LabelSpace.pooled(hidden, mask))
    return LabelSpace(labels, torch.cat(parts), temperature)


def encode_label_rows(
    tokenizer: Any, rows: Sequence[Example], space: LabelSpace, max_source_length: int
) -> list[dict[str, list[int]]]:
    """Encodes training rows: `input_ids`, and as `labels` the index of the row's output."""
    sources = prompt_ids(tokenizer, [row.prompt for row in rows], max_source_length, causal=False)
    return [
        {"input_ids": source, "labels": [space.index(row.output)]}
        for source, row in zip(sources, rows, strict=True)
    ]


def plain_prompts(
    rows: Sequence[Example], definition: str, tokenizer: Any, instruction_tokens: int | None
) -> tuple[Example, ...]:
    """Rows whose prompt is the instruction's first tokens followed by the input.

    Args:
        definition: the instruction of these rows.
        tokenizer: a fast tokenizer, which reports where each token ends in the text.
        instruction_tokens: how many to keep; None keeps the whole instruction, 0 removes it.

    Raises:
        ValueError: if the tokenizer is not a fast one.
    """
    head = definition
    if instruction_tokens is not None and definition:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"tokenizer: got {type(tokenizer).__name__}, expected a fast one, which knows "
                "where tokens end in the text, for instruction_tokens"
            )
        spans = tokenizer(definition, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in spans["offset_mapping"]][:instruction_tokens]
        head = definition[: max(ends, default=0)]
    return tuple(replace(row, prompt=f"{head} {row.input}".strip()) for row in rows)
