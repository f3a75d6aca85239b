"""Trains the values of edits: vectors that make the model give each target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sapt_fast.methods.edits.texts import IGNORED, EditTexts, held_below
from sapt_fast.routing.prompts import Prompts
from sapt_fast.sites.edited import EditedOutput, Trial

__all__ = [
    "Fitted",
    "FittingOptions",
    "fit",
    "gives",
    "losses_of",
    "present_answers",
    "queries",
    "require_finite",
]


class FittingOptions(NamedTuple):
    """How values are trained.

    Attributes:
        steps: the largest number of Adam's steps.
        learning_rate: Adam's.
        per_token: whether each token of the target has a value of its own.
        cold: whether values start at random, else at the layer's own output.
        stop: whether an edit ends once each token of its target is the likeliest by `margin`.
        margin: the least difference to the next logit.
        behind_cache: whether the tokens before a prompt's last are read only once.
    """

    steps: int
    learning_rate: float
    per_token: bool
    cold: bool
    stop: bool
    margin: float
    behind_cache: bool


class Fitted(NamedTuple):
    """Trained edits.

    Attributes:
        values: [B, T, O] of each layer, by its path.
        fits: [B] bool, whether the model gives the target.
    """

    values: dict[str, Tensor]
    fits: Tensor


@contextmanager
def trying(
    layers: Mapping[str, EditedOutput], values: Mapping[str, Tensor] | None, records: bool = False
) -> Iterator[dict[str, Trial]]:
    """Lets values act in place of the codebooks; None: nothing acts."""
    trials = {path: Trial(None if values is None else values[path], records) for path in layers}
    for path, layer in layers.items():
        layer.trial = trials[path]
    try:
        yield trials
    finally:
        for layer in layers.values():
            layer.trial = None


@torch.no_grad()
def present_answers(texts: EditTexts, prompts: Prompts) -> Tensor:
    """Returns [B] bool: whether the model as it is gives the target already."""
    with prompts.given(texts.prompt):
        return gives(texts.whole(), texts.labels, 0.0)


@torch.no_grad()
def queries(
    texts: EditTexts,
    layers: Mapping[str, EditedOutput],
    prompts: Prompts,
    values: Mapping[str, Tensor] | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns what each layer looks the prompts up by, [B, D], and its own output there, [B, O].

    Args:
        values: what acts at lower layers, [B, T, O] by path; None: nothing.
    """
    with trying(layers, values, True) as trials, prompts.given(texts.prompt):
        texts.whole()
    looked: dict[str, Any] = {path: trial.query for path, trial in trials.items()}
    own: dict[str, Any] = {path: trial.output for path, trial in trials.items()}
    missed = [path for path, query in looked.items() if query is None]
    if missed:
        raise ValueError(f"target_modules: {missed[0]} takes no part in the model's forward")
    return looked, own


def fit(
    texts: EditTexts,
    layers: Mapping[str, EditedOutput],
    prompts: Prompts,
    start: Mapping[str, Tensor],
    options: FittingOptions,
) -> Fitted:
    """Trains one value (or one per token) for each prompt.

    The edits of a batch do not see each other. Those that fit keep the value of that step.

    Args:
        texts: prompts and targets.
        layers: the edited layers by path, lowest first.
        prompts: the prompts of the model's forwards.
        start: [B, O] of each layer, the values to begin with.
        options: how to train.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    tokens = texts.labels.shape[1] if options.per_token else 1
    values = {
        path: (torch.rand_like(own) if options.cold else own.clone())
        .float()[:, None]
        .repeat(1, tokens, 1)
        .requires_grad_(True)
        for path, own in start.items()
    }
    lowest = next(iter(layers))
    prefix = texts.prompt._replace(tokens=None)
    with trying(layers, None), prompts.given(prefix), torch.no_grad():
        if options.behind_cache:
            texts.keep_prefix()
    with prompts.given(texts.prompt), held_below(texts.model, lowest):
        with trying(layers, None), torch.no_grad():
            texts.logits()  # from here on, blocks below the lowest edited layer are held
        with trying(layers, values):
            return _descend(texts, values, options)


def _descend(texts: EditTexts, values: dict[str, Tensor], options: FittingOptions) -> Fitted:
    optimizer = torch.optim.Adam([*values.values()], lr=options.learning_rate)
    kept = {path: value.detach().clone() for path, value in values.items()}
    fits = torch.zeros(texts.labels.shape[0], dtype=torch.bool, device=texts.labels.device)
    for step in range(options.steps + 1):
        with torch.enable_grad():
            logits = texts.logits()
            losses = losses_of(logits, texts.labels)
        require_finite(losses, step)
        with torch.no_grad():
            right = gives(logits, texts.labels, options.margin)
            moving = ~fits if options.stop else torch.ones_like(fits)
            for path, value in values.items():
                kept[path] = torch.where(moving[:, None, None], value.detach(), kept[path])
            fits = (fits | right) if options.stop else right
        if step == options.steps or (options.stop and bool(fits.all())):
            break
        gradients = torch.autograd.grad(losses.sum(), [*values.values()], allow_unused=True)
        for value, gradient in zip(values.values(), gradients, strict=True):
            value.grad = torch.zeros_like(value) if gradient is None else gradient
        optimizer.step()
    return Fitted(kept, fits)


def losses_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean cross-entropy of each row's target, [B], from logits [B, S, C]."""
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(labels)
    return losses.sum(1) / (labels != IGNORED).sum(1)


def require_finite(losses: Tensor, step: int) -> None:
    """Raises FloatingPointError if a loss [B] is not finite after `step` steps."""
    if not torch.isfinite(losses).all():
        raise FloatingPointError(
            f"the loss of an edit is {losses.max().item()} after {step} steps: expected a finite "
            "one; use a smaller learning_rate"
        )


def gives(logits: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Returns whether each token of a target is the likeliest, by a margin: [B] bool."""
    real = labels != IGNORED
    target = labels.clamp(min=0)[..., None]
    wanted = logits.gather(-1, target).squeeze(-1)
    others = logits.scatter(-1, target, float("-inf")).amax(-1)
    return ((wanted > others) & (wanted - others >= margin) | ~real).all(1)
