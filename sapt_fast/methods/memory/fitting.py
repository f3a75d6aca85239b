"""Trains experts until the model gives each fact's target with a small loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sapt_fast.methods.edits.fitting import gives, losses_of, require_finite
from sapt_fast.methods.edits.texts import EditTexts, held_below
from sapt_fast.pools.collectives import Group, Share
from sapt_fast.pools.experts import ExpertBank
from sapt_fast.pools.row_optimizers import RowOptimizer
from sapt_fast.pools.sharded_experts import RowShards, ShardedExperts
from sapt_fast.pools.slot_choice import SlotUse
from sapt_fast.routing.forward import Prompt
from sapt_fast.routing.prompts import Prompts
from sapt_fast.sites.memory import MemoryOutput

__all__ = ["FactTexts", "Outcome", "Trainer"]


class Outcome(NamedTuple):
    """The result of training.

    Attributes:
        losses: [F] float32, the mean cross-entropy of each fact's target.
        fits: [F] bool, whether the loss is small enough and each token of the target the likeliest.
        epochs: how many passes over the facts it took.
    """

    losses: Tensor
    fits: Tensor
    epochs: int


class FactTexts:
    """Facts that run through the model together, of which only the part above a memory runs again.

    Args:
        texts: prompts and targets.
        prompts: the prompts of the model's forwards.
        lowest: the path of the lowest layer with memory.
        decided: experts and weights of the prompts, as in `Prompt.decided`; None: layers look up.
        share: which rows of a batch these facts are; None: all.
    """

    def __init__(
        self,
        texts: EditTexts,
        prompts: Prompts,
        lowest: str,
        decided: Mapping[str, Tensor] | None,
        share: Share | None = None,
    ) -> None:
        self.texts = texts
        self.share = share or Share(len(texts.labels), Group(alone=True))
        self.decided = decided
        self._prompts = prompts
        self._lowest = lowest
        self._held: dict[int, Any] = {}
        if self.share.group.size > 1:  # all run the layers alike, also for prompts of one token
            return
        with prompts.given(self._prompt()._replace(tokens=None)), torch.no_grad():
            texts.keep_prefix()

    def logits(self) -> Tensor:
        """Runs the model: logits [B, S, C] of the targets."""
        below = held_below(self.texts.model, self._lowest, self._held)
        with self._prompts.given(self._prompt()), below:
            return self.texts.logits()

    def _prompt(self) -> Prompt:
        return self.texts.prompt._replace(decided=dict(self.decided or {}))


class Trainer:
    """Trains the experts that facts use, in all layers together.

    Args:
        layers: the layers with memory, lowest first.
        optimizer: makes the optimizer of a bank.
        until: the loss at which a fact is learned.
        epochs: the largest number of passes over the facts.
        shards: which experts this process has.
        slots: how many experts of a batch are trained, and what chooses those of each bank; None:
            all are.
    """

    def __init__(
        self,
        layers: Sequence[MemoryOutput],
        optimizer: Callable[[ExpertBank], RowOptimizer],
        until: float,
        epochs: int,
        shards: RowShards,
        slots: tuple[int, Sequence[SlotUse]] | None = None,
    ) -> None:
        self.layers = layers
        banks = {id(layer.bank): layer.bank for layer in layers}
        self.optimizers = {
            key: optimizer(bank.bank if isinstance(bank, ShardedExperts) else bank)
            for key, bank in banks.items()
        }
        self.shards = shards
        self.slots: tuple[int, Mapping[int, SlotUse]] | None = None
        if slots is not None:
            self.slots = slots[0], dict(zip(banks, slots[1], strict=True))
        self.until = until
        self.epochs = epochs

    def train(self, batches: Sequence[FactTexts]) -> Outcome:
        """Trains until every fact fits, or for `epochs`.

        A step changes only the experts of facts that do not fit. So a fact that fits keeps its
        experts, unless it shares them with one that does not.

        Args:
            batches: the facts, with all that share experts with one of them.

        Raises:
            FloatingPointError: if a loss is not finite.
        """
        for epoch in range(self.epochs + 1):
            found = [self._train_on(batch, epoch) for batch in batches]
            if all(bool(fits.all()) for _, fits in found):
                break
        losses, fits = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Outcome(losses, fits, epoch)

    def _train_on(self, batch: FactTexts, epoch: int) -> tuple[Tensor, Tensor]:
        def moving(losses: Tensor, fits: Tensor) -> Tensor:
            require_finite(losses, epoch)
            return ~fits if epoch < self.epochs else torch.zeros_like(fits)

        losses, fits, _ = self._visit(batch, (), moving)
        return losses, fits

    def gradients(
        self, batch: FactTexts, keys: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Makes a step on all facts; returns their losses [B], and the gradients of `keys`."""
        losses, _, grads = self._visit(batch, keys, lambda losses, fits: torch.ones_like(fits))
        return losses, grads

    def _visit(
        self,
        batch: FactTexts,
        keys: Sequence[Tensor],
        moving: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Makes a step on some facts; losses and which facts to train are of all processes.

        Args:
            batch: the facts.
            keys: further tensors whose gradients are returned.
            moving: tells the facts to train, [B] bool, by the losses [B] and whether facts fit [B].

        Returns:
            The losses and whether facts fit, before the step; and the gradients.
        """
        ids = {key: self._trained(key, index) for key, index in self.used(batch).items()}
        leaves = {key: o.bank.training_rows(ids[key]) for key, o in self.optimizers.items()}
        grads: list[Tensor | None] = [None] * len(keys)
        try:
            with self._recording() as chosen, torch.enable_grad():
                logits = batch.logits()
                losses = losses_of(logits, batch.texts.labels)
            with torch.no_grad():
                fits = gives(logits, batch.texts.labels, 0.0) & (losses <= self.until)
            all_losses, fits = map(batch.share.gather, (losses.detach(), fits))
            rows = moving(all_losses, fits)
            if bool(rows.any()) and losses.requires_grad:  # else no experts were found
                rows = batch.share.mine(rows)
                grads = self._step(losses, rows, ids, leaves, chosen, keys)
            return all_losses, fits, grads
        finally:
            for optimizer in self.optimizers.values():
                optimizer.bank.stop_training()

    def _step(
        self,
        losses: Tensor,
        moving: Tensor,
        ids: Mapping[int, Tensor],
        leaves: Mapping[int, tuple[Tensor, Tensor]],
        chosen: Mapping[int, Sequence[tuple[Tensor, Tensor]]],
        keys: Sequence[Tensor],
    ) -> list[Tensor | None]:
        flat = [*keys, *(leaf for pair in leaves.values() for leaf in pair)]
        grads = torch.autograd.grad(losses[moving].sum(), flat, allow_unused=True)
        found = iter(grads[len(keys) :])
        for key, optimizer in self.optimizers.items():
            of_a, of_b = next(found), next(found)
            used = torch.cat([index[moving].flatten() for index, _ in chosen[key]])
            rows = torch.isin(ids[key], self._here(used))
            if of_a is not None and of_b is not None and bool(rows.any()):
                optimizer.step(ids[key][rows], (of_a[rows], of_b[rows]))
        return [*grads[: len(keys)]]

    def _trained(self, key: int, index: Tensor) -> Tensor:
        """Returns the experts [U] to train of a bank, of those that processes use."""
        if self.slots is None:
            return self._here(index)
        count, uses = self.slots
        return uses[key].choose(index, count).to(index.device)

    def _here(self, index: Tensor) -> Tensor:
        """Returns which experts of all processes' this one has, ascending, as its bank counts."""
        return self.shards.kept(self.shards.group.gather_ragged(index.unique())).unique()

    def used(self, batch: FactTexts) -> dict[int, Tensor]:
        """Returns the experts that the batch uses, once per use, of each bank; -1 for none."""
        if batch.decided is not None:
            found = {key: list(_experts_in(batch.decided)) for key in self.optimizers}
        else:
            with self._recording() as chosen, torch.no_grad():
                batch.logits()
            found = {key: [index for index, _ in calls] for key, calls in chosen.items()}
        return {key: torch.cat([t.flatten() for t in calls]) for key, calls in found.items()}

    @contextmanager
    def _recording(self) -> Iterator[dict[int, list[tuple[Tensor, Tensor]]]]:
        """Yields experts and weights [B, T, K] of each call of a layer, by its bank."""
        chosen: dict[int, list[tuple[Tensor, Tensor]]] = {key: [] for key in self.optimizers}
        for layer in self.layers:
            layer.chosen = chosen[id(layer.bank)]
        try:
            yield chosen
        finally:
            for layer in self.layers:
                layer.chosen = None


def _experts_in(decided: Mapping[str, Tensor]) -> Iterator[Tensor]:
    return (value for name, value in decided.items() if name.endswith(":experts"))
