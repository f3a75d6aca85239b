"""What the memory of a model finds for a prompt, without an answer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sapt_fast.methods.edits.handle import evaluating
from sapt_fast.methods.memory.facts import Recalled
from sapt_fast.sites.memory import FactLookup, Lookup

__all__ = ["recall"]


def recall(handle: Any, tokens: Tensor) -> Recalled:
    """Finds the experts of a prompt's tokens [T], at the first layer.

    Args:
        handle: a `methods.mome.MomeHandle`.
        tokens: of the prompt.

    Raises:
        RuntimeError: before `fit_router`.
    """
    lookup: Any = handle.lookup
    query = handle.queries([tokens])
    if query is None:
        return _recalled(lookup, _found_at_end(handle, tokens), None, math.nan)
    if not isinstance(lookup, FactLookup):
        return _recalled(lookup, lookup.decide(query), None, float(lookup.search(query)[0].max()))
    score, fact = lookup.nearest(query)
    number = None if fact < 0 else int(fact)
    acts = bool(lookup.decide(query)["fact"] >= 0)
    return _recalled(lookup, {"fact": fact, "score": score}, number, float(score), acts)


def _recalled(
    lookup: Lookup,
    decided: dict[str, Tensor],
    fact: int | None,
    score: float,
    acts: bool | None = None,
) -> Recalled:
    experts, weights = lookup.experts_of(decided)
    found = experts[0] >= 0
    acts = bool(found.any()) if acts is None else acts
    listed = tuple(experts[0, found].tolist()), tuple(weights[0, found].tolist())
    return Recalled(fact, score, acts, *listed)


def _found_at_end(handle: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Returns what the prompt's last token finds at the first layer."""
    layer = next(iter(handle.layers.values()))
    texts = handle.batch([(tokens, torch.zeros(1, dtype=torch.int64))])
    chosen: list[Any] = []
    layer.chosen = chosen
    given = handle.prompts.given(texts.prompt)
    try:
        with handle.listening(), evaluating(handle._model), torch.no_grad(), given:
            texts.whole()
    finally:
        layer.chosen = None
    at = int(texts.prompt.last)
    experts, weights = (t[:, at] for t in chosen[0])
    return {"experts": experts, "weights": weights}
