"""What a model answers: by generation, and under teacher forcing.

Texts of equal length run together, so nothing is padded and no answer depends on padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig

from sapt_fast.editing.data import Tokens, end_tokens
from sapt_fast.methods.edits.texts import IGNORED, kind_of

__all__ = ["Examiner", "matches"]

_Item = TypeVar("_Item")


def matches(answer: Tokens, target: Tokens) -> bool:
    """Returns whether an answer is exactly a target.

    The target ends with the end token. If the model has none, what follows the target is ignored.
    """
    return answer[: len(target)] == target


class Examiner:
    """Asks a model.

    Args:
        model: in evaluation mode.
        batch_size: how many texts run together.
        tokens: the largest number of tokens of an answer.
    """

    def __init__(self, model: Any, batch_size: int, tokens: int) -> None:
        self.model, self.batch_size, self.tokens = model, batch_size, tokens
        self.kind = kind_of(model)
        self._ends = end_tokens(model)

    @torch.no_grad()
    def answers(self, prompts: Sequence[Tokens]) -> list[Tokens]:
        """Generates greedily with a KV cache.

        Args:
            prompts: their tokens.

        Returns:
            The new tokens of each, to the first end token; the class, for a classifier.
        """

        def ask(batch: Sequence[Tokens]) -> list[Tokens]:
            ids = self._ids(batch)
            if self.kind == "classifier":
                logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
                return [(int(label),) for label in logits.argmax(-1)]
            made = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._greedy(),
            )
            start = 1 if self.kind == "encoder-decoder" else ids.shape[1]
            return [self._cut(row) for row in made[:, start:].tolist()]

        return self._together(prompts, len, ask)

    @torch.no_grad()
    def forced(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[float]:
        """Teacher forcing: the share of a target's tokens that are the likeliest.

        Each token is predicted behind the true tokens before it, so errors do not add up as in
        generation.

        Args:
            pairs: prompts and targets.
        """

        def ask(batch: Sequence[tuple[Tokens, Tokens]]) -> list[float]:
            prompts, targets = zip(*batch, strict=True)
            logits, labels = self._logits(self._ids(prompts), self._ids(targets))
            shares: list[float] = (logits.argmax(-1) == labels).float().mean(1).tolist()
            return shares

        return self._together(pairs, lambda pair: (len(pair[0]), len(pair[1])), ask)

    @torch.no_grad()
    def perplexity(self, text: Tokens, window: int) -> float:
        """exp of the mean cross-entropy of a text's tokens, in windows that do not overlap.

        Args:
            text: at least two tokens; the first of each window is not predicted.
            window: tokens of a window.

        Raises:
            ValueError: if the model is not decoder-only, or the text too short.
        """
        self.require_text(text)
        parts = [text[i : i + window] for i in range(0, len(text), window)]
        parts = [part for part in parts if len(part) > 1]

        def ask(batch: Sequence[Tokens]) -> list[float]:
            ids = self._ids(batch)
            found = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            logits = found.logits[:, :-1].float().transpose(1, 2)
            sums: list[float] = (
                F.cross_entropy(logits, ids[:, 1:], reduction="none").sum(1).tolist()
            )
            return sums

        sums = self._together(parts, len, ask)
        mean = math.fsum(sums) / sum(len(part) - 1 for part in parts)
        return math.exp(min(mean, 700.0))  # the largest exponent of a float is 709

    def require_text(self, text: Tokens) -> None:
        """Raises ValueError if the perplexity of a text is not defined."""
        if self.kind != "causal":
            raise ValueError(
                f"text: {type(self.model).__name__} is not decoder-only, so a text has no "
                "perplexity; leave the text out"
            )
        if len(text) < 2:
            raise ValueError(f"text: got {len(text)} tokens, expected at least 2")

    def _logits(self, prompts: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits [B, S, C] of the targets, and the targets [B, S]."""
        if self.kind == "classifier":
            logits = self.model(input_ids=prompts, attention_mask=torch.ones_like(prompts)).logits
            return logits[:, None], targets
        inputs = {"input_ids": prompts, "labels": targets}
        if self.kind == "causal":
            inputs["input_ids"] = torch.cat([prompts, targets], 1)
            unread = torch.full_like(prompts, IGNORED)
            inputs["labels"] = torch.cat([unread, targets], 1)  # shows where the prompt ends
        mask = torch.ones_like(inputs["input_ids"])
        logits = self.model(**inputs, attention_mask=mask, use_cache=False).logits
        if self.kind == "causal":
            logits = logits[:, prompts.shape[1] - 1 : -1]
        return logits, targets

    def _together(
        self,
        items: Sequence[_Item],
        length: Callable[[_Item], Hashable],
        ask: Callable[[Sequence[_Item]], list[Any]],
    ) -> list[Any]:
        """Calls `ask` on batches of items of one length; returns the results in order."""
        results: list[Any] = [None] * len(items)
        for places in self._batches([length(item) for item in items]):
            found = ask([items[place] for place in places])
            for place, result in zip(places, found, strict=True):
                results[place] = result
        return results

    def _batches(self, lengths: Sequence[Hashable]) -> Iterator[list[int]]:
        groups: dict[Hashable, list[int]] = {}
        for place, length in enumerate(lengths):
            groups.setdefault(length, []).append(place)
        for places in groups.values():
            for start in range(0, len(places), self.batch_size):
                yield places[start : start + self.batch_size]

    def _ids(self, rows: Sequence[Tokens]) -> Tensor:
        return torch.tensor(rows, device=self.model.device)

    def _cut(self, row: list[int]) -> Tokens:
        ends = [place for place, token in enumerate(row) if token in self._ends]
        return tuple(row[: ends[0] + 1] if ends else row)

    def _greedy(self) -> GenerationConfig:
        """Greedy search, without what a model's own generation config may add to it."""
        own = self.model.generation_config
        return GenerationConfig(
            max_new_tokens=self.tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            temperature=1.0,
            top_k=50,
            top_p=1.0,
            bos_token_id=own.bos_token_id,
            eos_token_id=own.eos_token_id,
            pad_token_id=self._pad(own),
            decoder_start_token_id=own.decoder_start_token_id,
        )

    def _pad(self, own: Any) -> int:
        if own.pad_token_id is not None:
            return int(own.pad_token_id)
        return self._ends[0] if self._ends else 0
