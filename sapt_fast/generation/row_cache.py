"""A key-value cache with places for rows, which begin and end at different times.

Every row has its own length. The keys and values of a step are written in place, so that a step
copies nothing of the cache.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer


@dataclass
class Window:
    """Where a forward reads and writes, for all layers of a cache.

    Attributes:
        rows: B, the rows of the cache.
        columns: C, the tokens of each row.
        first, last: the rows of the forward.
        past: tokens before those of the forward.
        end: tokens that the forward reads.
        at: [last - first] int64, the column that each row writes to; None: all write from `past`.
        index: [last - first] int64, 0, 1, ...; None as `at`.
    """

    rows: int
    columns: int
    first: int = 0
    last: int = 1
    past: int = 0
    end: int = 0
    at: Tensor | None = None
    index: Tensor | None = None


class RowLayer(DynamicLayer):
    """The keys and values of one layer, [B, H, C, D].

    Args:
        window: where the forwards read and write.
    """

    keys: Any
    values: Any

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates all rows; zeros, because masked values must be finite."""
        rows, columns = self.window.rows, self.window.columns
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros(rows, states.shape[1], columns, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes [n, H, T, D] into the window; returns [n, H, end, D] of keys and of values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self.window
        keys = self.keys[window.first : window.last]
        values = self.values[window.first : window.last]
        if window.at is None or window.index is None:
            stop = window.past + key_states.shape[2]
            keys[:, :, window.past : stop] = key_states
            values[:, :, window.past : stop] = value_states
        else:
            index, at = window.index.to(keys.device), window.at.to(keys.device)
            keys[index, :, at] = key_states[:, :, 0]
            values[index, :, at] = value_states[:, :, 0]
        return keys[:, :, : window.end], values[:, :, : window.end]

    def get_seq_length(self) -> int:
        """Tokens before those of the forward."""
        return self.window.past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The tokens that a forward reads, and the first of them."""
        return self.window.end, 0

    def copy_row(self, source: "RowLayer", row: int, to: slice, tokens: int) -> None:
        """Copies the first tokens of a row of `source`, which may be this layer, to rows."""
        if not self.is_initialized:
            self.lazy_initialization(source.keys, source.values)
        for mine, others in ((self.keys, source.keys), (self.values, source.values)):
            mine[to, :, :tokens] = others[row : row + 1, :, :tokens]


class RowCache(Cache):
    """The cache of a model whose layers all attend to the whole text.

    Args:
        layers: how many there are.
        rows, columns: its size.

    Attributes:
        window: where the next forward reads and writes.
    """

    layers: list[Any]

    def __init__(self, layers: int, rows: int, columns: int) -> None:
        self.window = Window(rows, columns)
        super().__init__(layers=[RowLayer(self.window) for _ in range(layers)])

    def copy_row(self, source: "RowCache", row: int, to: slice, tokens: int) -> None:
        """Copies the first tokens of a row of `source` to rows of this cache."""
        for mine, others in zip(self.layers, source.layers, strict=True):
            mine.copy_row(others, row, to, tokens)


class PairedRowCache(RowCache):
    """The caches of both passes of X-LoRA; this one is that of the mixed pass.

    Attributes:
        scaling: the cache of the scaling pass, with the same window.
    """

    def __init__(self, layers: int, rows: int, columns: int) -> None:
        super().__init__(layers, rows, columns)
        self.scaling = RowCache(layers, rows, columns)
        self.scaling.window = self.window
        for layer in self.scaling.layers:
            layer.window = self.window

    def append(self, scalings: Tensor) -> None:
        """Takes the scalings of a forward, of which it needs none."""

    def copy_row(self, source: Any, row: int, to: slice, tokens: int) -> None:
        """As `RowCache.copy_row`, for both passes."""
        super().copy_row(source, row, to, tokens)
        self.scaling.copy_row(source.scaling, row, to, tokens)


def full_attention_layers(config: Any) -> int | None:
    """How many layers a model's cache has; None if not all of them keep every token."""
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    plain = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
    return len(layers) if plain else None


def row_bytes(config: Any, columns: int, dtype: torch.dtype) -> int:
    """Returns the bytes of one text's keys and values, as far as a model's config tells.

    Args:
        config: of the model.
        columns: tokens of the text.
        dtype: of the keys and values.
    """
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * width * columns * dtype.itemsize)
