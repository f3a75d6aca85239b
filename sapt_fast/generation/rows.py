"""Texts that a model writes side by side, after a prefix that it reads once."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sapt_fast.generation.forwards import Forwards
from sapt_fast.generation.row_cache import RowCache

Tokens = Sequence[int]


def common(*texts: Tokens) -> int:
    """Returns how many tokens all texts begin with."""
    count = 0
    for tokens in zip(*texts, strict=False):
        if len(set(tokens)) > 1:
            break
        count += 1
    return count


class Rows(ABC):
    """Rows of a batch, each of which continues the same prefix.

    Args:
        forwards: of the model.

    Attributes:
        count: rows now.
        prefilled: tokens of prompts that the model has read.
        joins: whether rows may be added while others are being written.
        mixture: [1, K], of a patched model: what the prefix is read with; None: what its first
            text is routed to.
    """

    joins: bool

    def __init__(self, forwards: Forwards) -> None:
        self.forwards = forwards
        self.count = 0
        self.prefilled = 0
        self.mixture: Tensor | None = None
        self._tokens: list[int] = []  # of the first row in the cache

    @abstractmethod
    def open(self, prompts: Sequence[Tokens], rows: int, new_tokens: int) -> None:
        """Reads what all prompts begin with, as far as it has not been read before.

        Args:
            prompts: of all texts that will be added.
            rows: how many may be written at a time.
            new_tokens: that each may have.
        """

    @abstractmethod
    def add(
        self, prompts: Sequence[Tokens], mixture: Tensor | None = None
    ) -> tuple[Tensor, list[list[int]]]:
        """Adds rows.

        Args:
            prompts: of the new rows.
            mixture: [k, K], their weights; None: those of the prefix.

        Returns:
            The logits [k, V] after each prompt, and for each row the tokens of its prompt that are
            not read yet. They have to be given to `step`, one after the other.
        """

    @abstractmethod
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Reads a token of each row; returns the logits [count, V] of what comes next."""

    @abstractmethod
    def keep(self, order: Sequence[int]) -> None:
        """Keeps these rows, in this order. A row moves to the front only."""

    def _ids(self, rows: Sequence[Any]) -> Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self.forwards.device)


class OwnLengths(Rows):
    """Rows with a length of each own, in a cache with places: any row may join at any time.

    The prompts of rows that join together are padded between the prefix and their end. The padding
    is masked and has no position.

    Args:
        forwards: of the model.
        layers: of its cache.
        static: whether every step reads keys and values of the same shape.
    """

    joins = True

    def __init__(self, forwards: Forwards, layers: int, static: bool) -> None:
        super().__init__(forwards)
        self._layers = layers
        self._static = static
        self._cache: RowCache | None = None
        self._single = False  # whether there was never but one row, whose tokens are known

    def open(self, prompts: Sequence[Tokens], rows: int, new_tokens: int) -> None:
        old, device = self._cache, self.forwards.device
        longest = min(map(len, prompts)) - 1
        read = min(common(self._tokens, *prompts), longest)
        self._prefix = read if len(prompts) == 1 else min(common(*prompts), longest)
        columns = max(map(len, prompts)) + new_tokens
        cache = self._cache = self.forwards.row_cache(self._layers, rows, columns)
        if read and old is not None:
            cache.copy_row(old, 0, slice(0, 1), read)
        self._tokens, self.count = list(prompts[0][: self._prefix]), 0
        self._weights: Tensor | None = None
        self._mask = torch.zeros(rows, columns, dtype=torch.long, device=device)
        self._at: list[int] = []
        self._index = torch.arange(rows, device=device)
        if self._prefix > read:
            self._read(prompts[0][read : self._prefix], read)
        if rows > 1 and self._prefix:
            cache.copy_row(cache, 0, slice(1, rows), self._prefix)

    def _read(self, tokens: Tokens, past: int) -> None:
        """Reads tokens of the prefix, in the first row."""
        self._window(0, 1, past, past + len(tokens))
        self._run(self._ids([tokens]))
        self.prefilled += len(tokens)

    def add(
        self, prompts: Sequence[Tokens], mixture: Tensor | None = None
    ) -> tuple[Tensor, list[list[int]]]:
        if not self._prefix and len(prompts) > 1:  # nothing that padding could look at
            parts = [
                self.add([prompt], None if mixture is None else mixture[i : i + 1])
                for i, prompt in enumerate(prompts)
            ]
            return torch.cat([logits for logits, _ in parts]), [rest for _, (rest,) in parts]
        prefix, first, last = self._prefix, self.count, self.count + len(prompts)
        endings = [prompt[prefix:] for prompt in prompts]
        length = max(map(len, endings))
        holes = [length - len(ending) for ending in endings]
        ids = self._ids([[0] * hole + list(e) for hole, e in zip(holes, endings, strict=True)])
        end = prefix + length
        self._mask[first:last] = 0
        self._mask[first:last, :end] = 1
        for row, hole in enumerate(holes, first):
            self._mask[row, prefix : prefix + hole] = 0
        steps = torch.arange(length, device=ids.device)
        hole_of = torch.tensor(holes, device=ids.device)[:, None]
        positions = (steps - hole_of).clamp(min=0) + prefix
        self._window(first, last, prefix, end)
        weights = self.mixture if mixture is None else mixture
        masked = prefix > 0  # the first forward of a text needs no mask
        logits = self._run(
            ids,
            weights,
            self._mask[first:last, :end] if masked else None,
            positions if masked else None,
        )
        self._join(positions[:, -1], mixture, end, prompts)
        return logits, [[] for _ in prompts]

    def _join(
        self, last: Tensor, mixture: Tensor | None, end: int, prompts: Sequence[Tokens]
    ) -> None:
        """Takes new rows in, after the forward of their prompts."""
        if self.count == 0:
            self._positions, self._weights = last, mixture
        else:
            self._positions = torch.cat([self._positions, last])
            if mixture is not None and self._weights is not None:
                self._weights = torch.cat([self._weights, mixture])
        self._at += [end] * len(prompts)
        self.count += len(prompts)
        self._single = self.count == 1
        self._tokens = list(prompts[0] if self._single else prompts[0][: self._prefix])
        self.prefilled += sum(len(prompt) - self._prefix for prompt in prompts)

    def step(self, tokens: Sequence[int]) -> Tensor:
        count, at = self.count, self._at
        last = max(at)
        end = self._mask.shape[1] if self._static else last + 1
        self._window(0, count, last, end)
        if min(at) == last and not self._static:
            self._mask[:count, last] = 1
        else:
            window, columns = self._window_of, torch.tensor(at, device=self._mask.device)
            window.at, window.index = columns, self._index[:count]
            self._mask[window.index, columns] = 1
        self._positions = self._positions + 1
        if self._single:
            self._tokens.append(tokens[0])
        self._at = [column + 1 for column in at]
        return self._run(
            self._ids(tokens)[:, None],
            self.mixture if self._weights is None else self._weights,
            self._mask[:count, :end],
            self._positions[:, None],
        )

    def keep(self, order: Sequence[int]) -> None:
        for row, source in enumerate(order):
            if row != source:
                assert self._cache is not None
                tokens = self._at[source]
                self._cache.copy_row(self._cache, source, slice(row, row + 1), tokens)
                self._mask[row] = self._mask[source]
        self._at = [self._at[row] for row in order]
        kept = torch.tensor(order, dtype=torch.long, device=self._mask.device)
        self._positions = self._positions[kept]
        if self._weights is not None:
            self._weights = self._weights[kept]
        self.count = len(order)

    @property
    def _window_of(self) -> Any:
        assert self._cache is not None
        return self._cache.window

    def _window(self, first: int, last: int, past: int, end: int) -> None:
        window = self._window_of
        window.first, window.last, window.past, window.end = first, last, past, end
        window.at = window.index = None

    def _run(
        self,
        ids: Tensor,
        weights: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        assert self._cache is not None
        given = self.mixture if weights is None else weights
        logits = self.forwards(ids, self._cache, mixture=given, mask=mask, positions=positions)
        if self.mixture is None:
            self.mixture = getattr(self._cache, "routing_weights", None)
        return logits


class EqualLengths(Rows):
    """Rows that always have the same length, for models of every kind.

    Rows whose prompts are longer still read them while the others are being written. No padding
    and no positions are needed. Rows may only be added if there are none.
    """

    joins = False

    def __init__(self, forwards: Forwards) -> None:
        super().__init__(forwards)
        self._cache: Any = None
        self._prefix_cache: Any = None

    def open(self, prompts: Sequence[Tokens], rows: int, new_tokens: int) -> None:
        longest = min(map(len, prompts)) - 1
        self._prefix = 0 if len(prompts) == 1 else min(common(*prompts), longest)
        self._prefix_cache, self.count = self.forwards.cache(), 0
        if self._prefix:
            self._run(self._prefix_cache, self._ids([prompts[0][: self._prefix]]))
            self.prefilled += self._prefix

    def add(
        self, prompts: Sequence[Tokens], mixture: Tensor | None = None
    ) -> tuple[Tensor, list[list[int]]]:
        endings = [list(prompt[self._prefix :]) for prompt in prompts]
        length = min(map(len, endings))
        self._cache = copy.deepcopy(self._prefix_cache)
        self.count, self._weights = len(prompts), mixture
        if self._prefix:
            self._cache.reorder_cache(self._ids([0] * self.count))
        self.prefilled += sum(map(len, endings))
        logits = self._run(self._cache, self._ids([ending[:length] for ending in endings]))
        return logits, [ending[length:] for ending in endings]

    def step(self, tokens: Sequence[int]) -> Tensor:
        return self._run(self._cache, self._ids(tokens)[:, None])

    def keep(self, order: Sequence[int]) -> None:
        if order and list(order) != list(range(self.count)):
            kept = self._ids(order)
            self._cache.reorder_cache(kept)
            if self._weights is not None:
                self._weights = self._weights[kept]
        self.count = len(order)

    _weights: Tensor | None = None

    def _run(self, cache: Any, ids: Tensor) -> Tensor:
        weights = self.mixture if self._weights is None else self._weights
        logits = self.forwards(ids, cache, mixture=weights)
        if self.mixture is None:
            self.mixture = getattr(cache, "routing_weights", None)
        return logits


def rows_of(forwards: Forwards, static: bool = False) -> Rows:
    """Returns rows of the kind that suits the model.

    Args:
        forwards: of the model.
        static: whether every step has to read keys and values of the same shape.

    Raises:
        ValueError: if the model's cache has no such shape.
    """
    layers = forwards.row_layers()
    if layers is not None:
        return OwnLengths(forwards, layers, static)
    if static:
        raise ValueError(
            "static_cache: got True for a model without positions of its own for each row (an "
            "encoder-decoder model, a sliding window, prompts); expected False"
        )
    return EqualLengths(forwards)
