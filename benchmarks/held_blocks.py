"""Runs the blocks below an edited layer once for each prompt, for LLaMA-like models.

Edits change nothing below the layer that they edit, so that what the lower blocks make of a prompt
is the same for every measurement. `HeldBlocks` keeps it and puts it back, with the blocks' keys and
values in the cache. Only the upper blocks run again, and all blocks for the tokens generated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Row = tuple[Tensor, list[tuple[Tensor, Tensor]]]  # the last held block's output; keys and values


class HeldBlocks:
    """Holds the first blocks of a model while `on` lasts.

    Args:
        model: a causal LLaMA-like model in transformers.
        below: how many blocks are held.
    """

    def __init__(self, model: Any, below: int) -> None:
        self.below = below
        self._rows: dict[tuple[int, ...], Row] = {}
        self._prompts: list[tuple[int, ...]] | None = None  # of the running prefill
        self._active = False
        self._known = False
        model.model.register_forward_pre_hook(self._enter, with_kwargs=True)
        model.model.register_forward_hook(self._leave, with_kwargs=True)
        for index, block in enumerate(model.model.layers[:below]):
            vars(block)["forward"] = self._held(index, block.forward)

    @contextmanager
    def on(self) -> Iterator[None]:
        """A context in which prefills of rows without padding use what is held."""
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def _enter(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        cache, ids = kwargs.get("past_key_values"), kwargs.get("input_ids")
        fits = self._active and not torch.is_grad_enabled() and ids is not None
        fresh = cache is not None and cache.get_seq_length() == 0
        self._prompts = [tuple(row) for row in ids.tolist()] if fits and fresh else None
        self._known = self._prompts is not None and all(p in self._rows for p in self._prompts)

    def _leave(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self._prompts = None

    def _held(self, index: int, forward: Any) -> Any:
        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self._prompts is None:
                found: Tensor = forward(hidden, *args, **kwargs)
                return found
            cache, last = kwargs["past_key_values"], index == self.below - 1
            if self._known:
                rows = [self._rows[prompt] for prompt in self._prompts]
                keys, values = zip(*(row[1][index] for row in rows), strict=True)
                cache.update(torch.stack(keys), torch.stack(values), index)
                return torch.stack([row[0] for row in rows]) if last else hidden
            found = forward(hidden, *args, **kwargs)
            if last:
                self._keep(found, cache)
            return found

        return run

    def _keep(self, found: Tensor, cache: Any) -> None:
        for place, prompt in enumerate(self._prompts or ()):
            layers = [
                (layer.keys[place].clone(), layer.values[place].clone())
                for layer in cache.layers[: self.below]
            ]
            self._rows[prompt] = found[place].clone(), layers
