"""The texts of edits as inputs of a model, of which only the layers above an edit run again."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicLayer

from sapt_fast.routing.forward import Prompt

__all__ = ["IGNORED", "EditTexts", "held_below", "kind_of"]

IGNORED = -100


def kind_of(model: Any) -> str:
    """Returns "encoder-decoder", "causal" or "classifier"."""
    if getattr(model.config, "is_encoder_decoder", False):
        return "encoder-decoder"
    return "causal" if model.can_generate() else "classifier"


class EditTexts:
    """Prompts and targets as a batch.

    A decoder-only model is given [prompt without its last token | last token, target], the first
    part padded on the left, the second on the right, so that all prompts end at one place.

    Args:
        model: the transformers model.
        prompts: the tokens of each prompt, at least one.
        targets: those of each target, at least one; for a classifier, the class.
        labelled: whether other methods on the model have to know where the prompts end: a
            decoder-only model is then given labels, and no part of a text on its own.

    Attributes:
        labels: [B, S] int64, the targets; -100 behind their ends.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Tensor],
        targets: Sequence[Tensor],
        labelled: bool = False,
    ) -> None:
        self.model = model
        self.labelled = labelled
        self.kind = kind_of(model)
        device = model.device
        pad = max(getattr(model.config, "pad_token_id", None) or 0, 0)  # -1: none
        self.labels = pad_sequence([*targets], batch_first=True, padding_value=IGNORED).to(device)
        self._cache: Any = None
        self._head = 0  # tokens of the prefix
        if self.kind == "causal":
            self._head = max(len(prompt) for prompt in prompts) - 1
            heads = [prompt[:-1] for prompt in prompts]
            tails = [
                torch.cat([prompt[-1:], target[:-1]])
                for prompt, target in zip(prompts, targets, strict=True)
            ]
            head = pad_sequence(heads, batch_first=True, padding_value=pad, padding_side="left")
            tail = pad_sequence(tails, batch_first=True, padding_value=pad)
            lengths = torch.tensor([len(h) for h in heads])[:, None]
            real = torch.arange(self._head)[None] >= self._head - lengths
            ends = torch.tensor([len(t) for t in tails])[:, None]
            self.mask = torch.cat([real, torch.arange(tail.shape[1])[None] < ends], 1).long()
            self.ids = torch.cat([head, tail], 1)
            last = torch.full((len(prompts),), self._head)
        else:
            self.ids = pad_sequence([*prompts], batch_first=True, padding_value=pad)
            lengths = torch.tensor([len(prompt) for prompt in prompts])
            self.mask = (torch.arange(self.ids.shape[1])[None] < lengths[:, None]).long()
            last = lengths - 1
        self.ids, self.mask = self.ids.to(device), self.mask.to(device)
        first = self.mask.argmax(1)
        tokens = self.ids.shape[1]
        self.prompt = Prompt(first, last.to(device), int(last.max()) + 1, 0, None, {}, tokens)

    def whole(self) -> Tensor:
        """Runs the model on everything: logits [B, S, C] of the targets."""
        if self.kind == "encoder-decoder":
            inputs = {"input_ids": self.ids, "attention_mask": self.mask, "labels": self.labels}
            logits: Any = self.model(**inputs, use_cache=False).logits
            return logits
        if self.kind == "classifier":
            found = self.model(input_ids=self.ids, attention_mask=self.mask)
            logits = getattr(found, "logits", None)
            if logits is None or logits.dim() != 2:
                got = "no logits" if logits is None else f"logits {tuple(logits.shape)}"
                raise ValueError(
                    f"model: got {type(self.model).__name__} with {got}, expected a model that "
                    "generates, or a classifier with one row of logits per text"
                )
            one: Tensor = logits[:, None]
            return one
        options: dict[str, Any] = self._positions(slice(None))
        if self.labelled:
            behind = torch.arange(self.ids.shape[1], device=self.ids.device) > self._head
            options["labels"] = torch.where(behind & (self.mask > 0), self.ids, IGNORED)
        elif "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            options["logits_to_keep"] = self.ids.shape[1] - self._head  # the head costs half a step
        found = self.model(input_ids=self.ids, attention_mask=self.mask, use_cache=False, **options)
        logits = found.logits[:, self._head - self.ids.shape[1] :]
        return logits

    def keep_prefix(self) -> None:
        """Computes the cache of the prompts without their last tokens, for `logits`."""
        if self.kind != "causal" or self._head == 0 or self.labelled:
            return
        part = slice(self._head)
        found = self.model(
            input_ids=self.ids[:, part],
            attention_mask=self.mask[:, part],
            use_cache=True,
            **self._positions(part),
        )
        cache = found.past_key_values
        if hasattr(cache, "layers") and all(map(_grows, cache.layers)):
            self._cache = cache
            tokens = self.ids.shape[1] - self._head
            self.prompt = self.prompt.moved(self._head)._replace(tokens=tokens)

    def logits(self) -> Tensor:
        """Runs the model behind the cache, if there is one: logits [B, S, C] of the targets."""
        if self._cache is None:
            return self.whole()
        part = slice(self._head, None)
        found = self.model(
            input_ids=self.ids[:, part],
            attention_mask=self.mask,
            past_key_values=_shared(self._cache),
            use_cache=True,
            **self._positions(part),
        )
        logits: Tensor = found.logits
        return logits

    def _positions(self, part: slice) -> dict[str, Tensor]:
        """The tokens' positions, for models that have any."""
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            return {}
        return {"position_ids": (self.mask.cumsum(1) - 1).clamp(min=0)[:, part]}


def _grows(layer: Any) -> bool:
    """Whether a layer's cache gets new tensors in each forward, so that the old ones stay."""
    return isinstance(layer, DynamicLayer) and not hasattr(layer, "recurrent_states")


def _shared(cache: Any) -> Any:
    """Returns a cache that grows on its own, with the same tensors."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


@contextmanager
def held_below(model: nn.Module, path: str, held: dict[int, Any] | None = None) -> Iterator[None]:
    """Lets the blocks below a layer run in this thread's first forward alone.

    The output of the last of them is held. In later forwards all of them return it.

    Args:
        model: the model.
        path: the layer's path. Its block, and those above, run in every forward.
        held: what was held in an earlier context, filled by the first one; None: the context
            begins without.
    """
    blocks, index = _block_of(model, path)
    below = list(blocks)[:index]
    before = [vars(block).get("forward") for block in below]
    outputs = {} if held is None else held
    for place, block in enumerate(below):
        vars(block)["forward"] = _Held(block.forward, outputs, place, index - 1)
    try:
        yield
    finally:
        for block, own in zip(below, before, strict=True):
            if own is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = own


class _Held:
    def __init__(self, forward: Any, outputs: dict[int, Any], place: int, last: int) -> None:
        self._forward = forward
        self._thread = threading.get_ident()
        self._outputs = outputs
        self._place = place
        self._last = last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return self._forward(*args, **kwargs)
        if self._last in self._outputs:
            return self._outputs[self._last]  # blocks below the last pass it on
        output = self._forward(*args, **kwargs)
        if self._place == self._last:
            self._outputs[self._last] = output
        return output


def _block_of(model: nn.Module, path: str) -> tuple[Sequence[nn.Module], int]:
    """Returns the outermost list of blocks that contains a layer, and the block's index."""
    names = path.split(".")
    for end, name in enumerate(names):
        parent = model.get_submodule(".".join(names[:end]))
        if isinstance(parent, nn.ModuleList) and name.isdigit():
            blocks: Any = parent
            return blocks, int(name)
    return [], 0
