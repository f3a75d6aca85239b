"""Packed rows: several texts one after the other in one row of tokens, each routed on its own.

transformers packs texts without padding (`DataCollatorWithFlattening`, TRL's packing) and tells
them apart by position ids that restart, by cumulative lengths or by an index of the text. A router
sees each text as it would see it alone, together with texts of the same length, so that no text
needs padding and the weights are those of the text alone, whatever the router computes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k")
_PER_TOKEN = ("input_ids", "inputs_embeds", "labels")
_INSTEAD = (
    "or give the weights: mixture= or model.sapt.fixed(weights), [B, T, K] for one weight per "
    "token and adapter"
)


class Segments:
    """The places of the S texts of packed rows [B, T].

    Args:
        starts: the index of the first token of each text, counted over all rows; ascending.
        shape: (B, T).
    """

    def __init__(self, starts: Sequence[int], shape: tuple[int, int]) -> None:
        self.starts = starts
        self.shape = shape
        ends = [*starts[1:], shape[0] * shape[1]]
        self.lengths = [end - start for start, end in zip(starts, ends, strict=True)]

    def __len__(self) -> int:
        return len(self.starts)

    def spread(self, weights: Tensor) -> Tensor:
        """[B, T, K], for every token the weights [S, K] of its text."""
        text = torch.arange(len(self)).repeat_interleave(torch.tensor(self.lengths))
        return weights[text.to(weights.device)].view(*self.shape, -1)

    def of_texts(self, weights: Tensor) -> Tensor:
        """[S, K], for every text the weights [B, T, K] of its first token."""
        return weights.flatten(0, 1)[torch.tensor(self.starts, device=weights.device)]

    def weights(self, route: Callable[..., Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """[B, T, K], for every token the weights that its text gets alone, with gradient.

        Args:
            route: returns [1, K], [n, K] or [n, L, K] for n texts of L tokens.
            inputs: the arguments of a forward that have a value for every token of [B, T].

        Raises:
            RuntimeError: if route returns weights for another number of texts or tokens.
        """
        places, parts = [], []
        for _, tokens, batch in self._batches(inputs):
            weights = route(attention_mask=None, **batch)
            per_token = weights[:, None] if weights.dim() == 2 else weights
            fits = zip(per_token.shape, (*tokens.shape, per_token.shape[-1]), strict=True)
            if any(got not in (1, expected) for got, expected in fits):
                raise RuntimeError(
                    f"mixture weights of shape {tuple(weights.shape)} from a router that was given "
                    f"{len(tokens)} texts of {tokens.shape[1]} tokens, expected one row per text"
                )
            places.append(tokens.flatten())
            parts.append(per_token.expand(*tokens.shape, -1).flatten(0, 1))
        return _in_order(parts, places).view(*self.shape, -1)

    def rows(self, function: Callable[..., Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """Returns [S, D], for every text the row that `function` returns; inputs as `weights`."""
        places, parts = [], []
        for texts, tokens, batch in self._batches(inputs):
            places.append(torch.tensor(texts, device=tokens.device))
            parts.append(function(attention_mask=None, **batch))
        return _in_order(parts, places)

    def _batches(
        self, inputs: Mapping[str, Any]
    ) -> Iterator[tuple[list[int], Tensor, dict[str, Tensor | None]]]:
        """Yields, for each length L, which n texts have it, their tokens [n, L] and the inputs."""
        flat: dict[str, Tensor | None] = dict.fromkeys(_PER_TOKEN)
        for name in _PER_TOKEN:
            value = inputs.get(name)
            if isinstance(value, Tensor) and value.shape[:2] == self.shape:
                flat[name] = value.flatten(0, 1)
        device = next(value.device for value in flat.values() if value is not None)
        texts: dict[int, list[int]] = {}
        for text, length in enumerate(self.lengths):
            texts.setdefault(length, []).append(text)
        for length, alike in texts.items():
            starts = torch.tensor([self.starts[text] for text in alike], device=device)
            tokens = starts[:, None] + torch.arange(length, device=device)
            yield alike, tokens, {n: None if v is None else v[tokens] for n, v in flat.items()}


def find_segments(inputs: Mapping[str, Any], causal: Callable[[], bool]) -> Segments | None:
    """Finds the texts of packed rows; None if each row is one text.

    A row without a mask is packed if transformers treats it so: a text ends where the next position
    is not one more. `cu_seq_lens_q` (or `_k`) and `seq_idx` are other ways to give these ends.

    Args:
        inputs: the arguments of a forward, by name, with input_ids [B, T] or inputs_embeds.
        causal: whether the model is decoder-only. Others may not keep the texts of a row apart.

    Raises:
        RuntimeError: if the inputs disagree on where texts end, the texts do not all begin at the
            same position, or the inputs do not tell whether rows are packed.
    """
    source = inputs.get("input_ids")
    source = inputs.get("inputs_embeds") if source is None else source
    if source is None or source.shape[1] == 1:
        return None
    rows, columns = source.shape[:2]
    positions = _two_dimensional(inputs.get("position_ids"), rows, columns)
    index = _two_dimensional(inputs.get("seq_idx"), rows, columns)
    name = next((name for name in _LENGTHS if inputs.get(name) is not None), None)
    if positions is None and index is None and name is None:
        return None
    if _is_traced(source):
        raise RuntimeError(
            "position_ids: whether they restart, as those of packed texts do, cannot be read in a "
            "compiled or captured forward: leave position_ids (and cu_seq_lens_q, seq_idx) "
            f"out if each row is one text, {_INSTEAD}, as an uncompiled "
            "model.sapt.route(..., position_ids=...) returns them"
        )
    mask, told = inputs.get("attention_mask"), {}
    if positions is not None:
        if mask is None and (index is not None or name is not None or causal()):
            told["position_ids"] = _starts(positions[:, 1:] != positions[:, :-1] + 1)
        elif _restarts(positions, mask).any():
            raise RuntimeError(_unclear(mask))
    if index is not None:
        told["seq_idx"] = _starts(index[:, 1:] != index[:, :-1])
    if name is not None:
        told[name] = _from_lengths(name, inputs[name], rows, columns)
    if not told:
        return None
    first, *others = told
    for other in others:
        if told[other] != told[first]:
            raise RuntimeError(
                f"{first} and {other}: they put {len(told[first])} and {len(told[other])} texts "
                f"into {rows} rows of {columns} tokens, or end them in different places; give one "
                f"of them, {_INSTEAD}"
            )
    if len(told[first]) == rows:
        return None
    if mask is not None:
        raise RuntimeError(
            f"{first}: got several texts in a row as well as an attention_mask; leave the mask "
            f"out, {_INSTEAD}"
        )
    if positions is not None:
        begin = positions.flatten()[torch.tensor(told[first], device=positions.device)]
        if (begin != begin[0]).any():
            raise RuntimeError(
                f"position_ids: the {len(begin)} texts in {rows} rows begin at positions "
                f"{sorted(set(begin.tolist()))}, expected one for all; for padded rows give an "
                f"attention_mask, for parts of texts their whole texts, {_INSTEAD}"
            )
    return Segments(told[first], (rows, columns))


def _is_traced(source: Tensor) -> bool:
    """Whether values cannot be read, because torch.compile or a CUDA graph records the forward."""
    if torch.compiler.is_compiling():
        return True
    return source.is_cuda and torch.cuda.is_current_stream_capturing()


def _two_dimensional(value: Any, rows: int, columns: int) -> Tensor | None:
    """[B, T] of a value per token; None for other shapes, such as rotary positions of images."""
    if not isinstance(value, Tensor):
        return None
    if value.dim() == 3 and value.shape[0] == 4:  # the text's own, then three for images
        value = value[0]
    if value.dim() not in (1, 2) or value.shape[-1] != columns:
        return None
    value = value[None] if value.dim() == 1 else value
    return value.expand(rows, columns) if value.shape[0] in (1, rows) else None


def _restarts(positions: Tensor, mask: Any) -> Tensor:
    """Where a position is not above that of the token before it, ignoring padding."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < positions.shape[1]:
        return positions[:, 1:] <= positions[:, :-1]
    real = (mask[:, -positions.shape[1] :] != 0).to(positions.device).expand_as(positions)
    column = torch.arange(positions.shape[1], device=positions.device)
    before = torch.where(real, column, -1).cummax(1).values[:, :-1]
    earlier = positions.gather(1, before.clamp(min=0))
    return real[:, 1:] & (before >= 0) & (positions[:, 1:] <= earlier)


def _starts(begins: Tensor) -> list[int]:
    """First tokens, over all rows, from [B, T - 1]: whether a text begins at each later token."""
    begins = F.pad(begins, (1, 0), value=True)
    starts: list[int] = begins.flatten().nonzero()[:, 0].tolist()
    return starts


def _from_lengths(name: str, lengths: Any, rows: int, columns: int) -> list[int]:
    ends = torch.as_tensor(lengths).flatten().tolist()
    ordered = all(a <= b for a, b in pairwise(ends))
    if not ends or ends[0] != 0 or ends[-1] != rows * columns or not ordered:
        raise RuntimeError(
            f"{name}: got {ends}, expected the ends of texts from 0 to {rows * columns}, the "
            f"tokens of {rows} rows of {columns}"
        )
    starts = sorted(set(ends[:-1]) - {ends[-1]})
    if not set(starts).issuperset(range(0, rows * columns, columns)):
        raise RuntimeError(f"{name}: got {ends}, where a text runs on into the next row")
    return starts


def _unclear(mask: Any) -> str:
    if mask is None:
        return (
            "position_ids: they restart, and this model, which is not decoder-only, is not known "
            "to keep texts of one row apart: give each text a row of its own, an attention_mask "
            f"where there is padding, {_INSTEAD}"
        )
    shape = list(mask.shape) if hasattr(mask, "shape") else type(mask).__name__
    return (
        f"position_ids: they restart among the tokens of a row although there is an attention_mask "
        f"{shape}, so whether the row is one text or several cannot be told: leave the mask out if "
        f"it is several, or the position_ids if it is one, {_INSTEAD}"
    )


def _in_order(parts: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
    """Row i of all parts goes to the place that is named for it."""
    return torch.cat([*parts])[torch.cat([*places]).argsort()]
