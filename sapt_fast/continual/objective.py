"""Forward under teacher forcing, and the token loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import TokenClassifierOutput

from sapt_fast.continual.data.collate import LABEL_PADDING
from sapt_fast.methods.tasks import learner_of

__all__ = ["Space", "Step", "forward", "prompt_mask", "routed_inputs", "supervised", "token_loss"]


class Space(Protocol):
    """What a model chooses among that does not generate: label strings, or classes of images."""

    def logits(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns logits [B, 1, C] of a forward on a batch, for the loss."""


@dataclass(frozen=True)
class Step:
    """A micro-batch in training, the argument of a strategy's objective.

    Attributes:
        number: the micro-batch's number, counted over all steps and processes, and continued by a
            resumed run.
        batch: `input_ids` and `attention_mask` [B, T], or `pixel_values` [B, C, H, W]; and `labels`
            [B, T'].
        logits: [B, T', V], the model's output.
        loss: the token loss, a scalar. It is scaled such that its mean over the micro-batches of
            an optimizer step is the mean over the step's tokens.
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
    space: Space | None = None,
) -> Any:
    """Runs a patched model on a batch with labels, under teacher forcing.

    The labels are not passed to the model, because it would compute its own loss.

    Args:
        model: the patched model, or a wrapper of it.
        batch: `input_ids` and `attention_mask` [B, T], or `pixel_values` [B, C, H, W]; and `labels`
            [B, T'].
        weights: mixture [B, K] or [1, K]; None for the router's weights.
        base: the patched model, if `model` is a wrapper.
        space: the labels of an encoder's tasks, or the classes of images; the logits are then
            [B, 1, C].

    Returns:
        The model's outputs, with `logits`.
    """
    base = model if base is None else base
    inputs = dict(batch)
    labels = inputs.pop("labels")
    routing = learner_of(base).routing
    if weights is None:
        weights = routing.pinned
    if getattr(base.config, "is_encoder_decoder", False):
        if "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
    elif weights is None and space is None:
        inputs["routing_labels"] = labels
    with routing.pin(weights):
        outputs = model(**inputs)
    if space is None:
        return outputs
    return TokenClassifierOutput(logits=space.logits(outputs, inputs))


def routed_inputs(batch: Mapping[str, Tensor], causal: bool) -> tuple[Tensor, Tensor | None]:
    """Returns what a router reads of a batch: ids and mask [B, T] of the prompt; or images
    [B, C, H, W], without a mask."""
    if "pixel_values" in batch:
        return batch["pixel_values"], None
    return batch["input_ids"], prompt_mask(batch, causal)


def prompt_mask(batch: Mapping[str, Tensor], causal: bool) -> Tensor:
    """Returns a mask [B, T] of the prompt's tokens, without answers.

    Args:
        batch: `attention_mask` [B, T] and `labels` [B, T'].
        causal: whether the inputs contain the answers (decoder-only models).
    """
    mask = batch["attention_mask"]
    return mask * (batch["labels"] == LABEL_PADDING) if causal else mask


def supervised(logits: Tensor, labels: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Returns logits [N, V] in float32 and labels [N] of the N positions that have a label.

    Args:
        logits: [B, T, V].
        labels: [B, T], -100 at positions without a label.
        causal: whether logits predict the label of the next position.
    """
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    chosen = labels != LABEL_PADDING
    return logits[chosen].float(), labels[chosen]


def token_loss(
    logits: Tensor, labels: Tensor, causal: bool, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Returns the sum of the token losses, and the number of tokens.

    Args:
        logits, labels, causal: as in `supervised`.
        label_smoothing: in [0, 1).
    """
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    total = F.cross_entropy(
        logits.flatten(0, 1).float(),
        labels.flatten(),
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return total, (labels != LABEL_PADDING).sum()
