"""Trains parameters of a model on edits, for the methods that change its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.checks import require_count, require_number
from sapt_fast.editing.editors.base import Pair
from sapt_fast.methods.base import handles
from sapt_fast.methods.edits.fitting import gives, losses_of
from sapt_fast.methods.edits.texts import EditTexts, held_below

__all__ = ["TrainingOptions", "only_training", "texts_of", "train"]


@dataclass
class TrainingOptions:
    """How weights are trained."""

    target_modules: tuple[str, ...] | list[str] | str | None = field(
        default=None, metadata={"help": "The layer to train; None: the one that GRACE edits."}
    )
    steps: int = field(default=100, metadata={"help": "The largest number of training steps."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Adam's learning rate."})
    margin: float = field(
        default=0.1,
        metadata={
            "help": "Training ends once each token of the target leads by this much (logits)."
        },
    )

    def __post_init__(self) -> None:
        require_count("steps", self.steps)
        require_number("learning_rate", self.learning_rate, positive=True)
        require_number("margin", self.margin)


def texts_of(model: Any, pairs: Sequence[Pair]) -> EditTexts:
    """Returns prompts and targets as a batch for the model."""
    labelled = bool(handles(model))
    return EditTexts(model, [p for p, _ in pairs], [t for _, t in pairs], labelled)


def train(
    model: Any,
    parameters: Sequence[nn.Parameter],
    batches: Sequence[EditTexts],
    options: TrainingOptions,
    penalty: Callable[[], Tensor] | None = None,
    lowest: str | None = None,
) -> Tensor:
    """Trains parameters until the model gives all targets, or `options.steps` are taken.

    Batches take turns. A batch whose targets are all the likeliest by the margin is passed over.

    Args:
        model: in evaluation mode.
        parameters: what Adam changes; all others are left out of the graph.
        batches: prompts and targets.
        options: how to train.
        penalty: a term to add to the loss.
        lowest: the lowest layer that changes; blocks below it run once for each batch.

    Returns:
        [N] bool, which targets the model gives now, in the order of the batches.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    optimizer = torch.optim.Adam(parameters, lr=options.learning_rate)
    taken, passed = 0, 0
    held: dict[int, dict[int, Any]] = {}

    def logits_of(place: int) -> Tensor:
        texts, is_first = batches[place], place not in held
        if lowest is None:
            return texts.whole()
        with held_below(model, lowest, held.setdefault(place, {})):
            if is_first:
                with torch.no_grad():
                    texts.whole()  # from here on, lower blocks are held
            return texts.whole()

    with only_training(model, parameters):
        while taken < options.steps and passed < len(batches):
            place = (taken + passed) % len(batches)
            labels = batches[place].labels
            with torch.enable_grad():
                logits = logits_of(place)
                losses = losses_of(logits, labels)
                loss = losses.mean() if penalty is None else losses.mean() + penalty()
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss.item()} after {taken} steps: expected a finite one; use a "
                    "smaller learning_rate"
                )
            if bool(gives(logits, labels, options.margin).all()):
                passed += 1
                continue
            gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            taken, passed = taken + 1, 0
        for parameter in parameters:
            parameter.grad = None
        with torch.no_grad():
            found = [gives(logits_of(i), b.labels, 0.0) for i, b in enumerate(batches)]
            return torch.cat(found).cpu()


@contextmanager
def only_training(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Lets only these parameters, and no others of the model, require a gradient."""
    chosen = {id(parameter) for parameter in parameters}
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
