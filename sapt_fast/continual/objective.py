"""Forwards under teacher forcing, and the token loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import TokenClassifierOutput

from sapt_fast.continual.data.collate import LABEL_PADDING
from sapt_fast.continual.data.encoder import LabelSpace
from sapt_fast.methods.tasks import pool_of

__all__ = ["Step", "forward", "prompt_mask", "supervised", "token_loss"]


@dataclass(frozen=True)
class Step:
    """A micro-batch in training, as the objective of a strategy sees it.

    Attributes:
        number: of the micro-batch, counted over all steps and processes; a resumed run goes on
            counting where it was.
        batch: `input_ids` and `attention_mask` [B, T], `labels` [B, T'].
        logits: [B, T', V] of the model on it.
        loss: the token loss, scaled such that its mean over the micro-batches of an optimizer
            step is the mean over the step's tokens.
    """

    number: int
    batch: Mapping[str, Tensor]
    logits: Tensor
    loss: Tensor


def forward(
    model: Any,
    batch: Mapping[str, Any],
    weights: Tensor | None = None,
    *,
    base: Any = None,
    space: LabelSpace | None = None,
) -> Any:
    """Outputs of a patched model on a batch with labels, under teacher forcing.

    The labels are kept from the model, which would compute a loss of its own.

    Args:
        model: what is called: the patched model, or something around it.
        batch: `input_ids` and `attention_mask` [B, T], `labels` [B, T'].
        weights: mixture [B, K] or [1, K]; None for those of the router.
        base: the patched model, where `model` is not.
        space: what an encoder's inputs are matched to; gives the logits [B, 1, C].
    """
    base = model if base is None else base
    inputs = dict(batch)
    labels = inputs.pop("labels")
    routing = pool_of(base).routing
    if weights is None:
        weights = routing.pinned
    if base.config.is_encoder_decoder:
        if "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
    elif weights is None and space is None:
        inputs["routing_labels"] = labels
    with routing.pin(weights):
        outputs = model(**inputs)
    if space is None:
        return outputs
    logits = space(outputs.last_hidden_state, inputs["attention_mask"])
    return TokenClassifierOutput(logits=logits)


def prompt_mask(batch: Mapping[str, Tensor], causal: bool) -> Tensor:
    """[B, T], 1 where a batch has a token of the prompt: for a decoder-only model no answer."""
    mask = batch["attention_mask"]
    return mask * (batch["labels"] == LABEL_PADDING) if causal else mask


def supervised(logits: Tensor, labels: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Logits [N, V] in float32 and labels [N] of the N positions that are trained on.

    Args:
        logits: [B, T, V]. labels: [B, T], -100 where nothing is predicted.
        causal: logits predict the label of the next position.
    """
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    chosen = labels != LABEL_PADDING
    return logits[chosen].float(), labels[chosen]


def token_loss(
    logits: Tensor, labels: Tensor, causal: bool, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Sum of the token losses and how many tokens there are; arguments as `supervised`."""
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    total = F.cross_entropy(
        logits.flatten(0, 1).float(),
        labels.flatten(),
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return total, (labels != LABEL_PADDING).sum()
