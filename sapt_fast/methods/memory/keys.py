"""Trains the keys of experts, for the first stage of a memory with learned or product keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sapt_fast.methods.edits.fitting import require_finite
from sapt_fast.methods.edits.handle import Pair, evaluating
from sapt_fast.methods.memory.fitting import FactTexts, Trainer
from sapt_fast.pools.row_optimizers import ROW_OPTIMIZERS

__all__ = ["fit_keys"]

_BATCH = 16
_RATE = 1e-3


def fit_keys(handle: Any, pairs: Sequence[Pair]) -> None:
    """Trains keys and projections, together with the experts, in one pass over the pairs.

    The gradient of a table of keys is sparse, and is taken by SparseAdam, whose state is as large
    as two tables. The experts get their start values again at the end: the model computes what it
    did before. After an error the keys are as before.

    Args:
        handle: `model.mome`, without facts.
        pairs: prompts and targets.

    Raises:
        FloatingPointError: if a loss is not finite.
    """
    kind, config = ROW_OPTIMIZERS[handle.config.optimizer], handle.config
    layers = [*handle.layers.values()]
    trainer = Trainer(
        layers, lambda bank: kind(bank, lr=config.learning_rate), 0.0, 1, handle.shards
    )
    with _training(handle) as keys, evaluating(handle._model), handle.listening():
        tables = [key for key in keys if key.shape == (config.num_experts, key.shape[-1])]
        others = [key for key in keys if not any(key is table for table in tables)]
        optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(others, lr=_RATE)]
        if tables:
            optimizers.append(torch.optim.SparseAdam(tables, lr=_RATE))
        for first in range(0, len(pairs), _BATCH):
            part = pairs[first : first + _BATCH]
            with torch.enable_grad():
                decided = _decided(handle, part)
            batch = FactTexts(handle.batch(part), handle.prompts, handle.lowest, decided)
            losses, grads = trainer.gradients(batch, keys)
            require_finite(losses, first // _BATCH)
            for key, grad in zip(keys, grads, strict=True):
                key.grad = grad
            for optimizer in optimizers:
                optimizer.step()
    if handle.uses:
        _count_uses(handle, trainer, pairs)


def _count_uses(handle: Any, trainer: Trainer, pairs: Sequence[Pair]) -> None:
    """Counts the experts that the prompts use by the keys as they are now."""
    batches: list[dict[int, Tensor]] = []
    with evaluating(handle._model), handle.listening():
        for first in range(0, len(pairs), _BATCH):
            part = pairs[first : first + _BATCH]
            batch = FactTexts(
                handle.batch(part), handle.prompts, handle.lowest, _decided(handle, part)
            )
            batches.append(trainer.used(batch))
    for use, key in zip(handle.uses, trainer.optimizers, strict=True):
        use.count([batch[key] for batch in batches])


def _decided(handle: Any, pairs: Sequence[Pair]) -> dict[str, Tensor] | None:
    """Returns experts and weights of prompts, which depend on the keys; None for tokens."""
    query = handle.queries([prompt for prompt, _ in pairs])
    if query is None:
        return None
    experts, weights = handle.lookup.weighted(*handle.lookup.search(query))
    name = handle.prompts.name
    return {f"{name}:experts": experts, f"{name}:weights": weights}


@contextmanager
def _training(handle: Any) -> Iterator[list[Tensor]]:
    """Yields keys and projections, which require gradients in the context."""
    keys: list[Tensor] = []
    for lookup in handle.lookups:
        lookup.threshold = None  # keys that train may not reach it yet
        keys += [lookup.projection, *lookup.index.parameters()]
    before = [key.detach().clone() for key in keys]
    try:
        for key in keys:
            key.requires_grad_(True)
        yield keys
    except BaseException:
        with torch.no_grad():
            for key, values in zip(keys, before, strict=True):
                key.copy_(values)
        raise
    finally:
        for lookup in handle.lookups:
            lookup.threshold = handle.config.least_score
        for key in keys:
            key.requires_grad_(False)
            key.grad = None
        for bank in handle.banks:
            bank.reset_rows(bank.touched.clone())
