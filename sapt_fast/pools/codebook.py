"""The keys, radii and values of the edits at one layer.

(GRACE, NeurIPS 2023, section 3.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sapt_fast.ops import nearest_key, topk_keys
from sapt_fast.pools.own import Own, keeping_dtype

__all__ = [
    "Codebook",
    "Exact",
    "Found",
    "differences",
    "make_ragged",
    "resize",
    "rows_of",
    "without",
]

_MARGIN = 1e-5  # by which the older of two keys gets the smaller radius, as in the released code


class Found(NamedTuple):
    """The nearest key of each query.

    Attributes:
        row: [M] int64, the key's row; -1 without keys.
        distance: [M] float32, infinity without keys.
        acts: [M] bool, whether the query is near enough.
    """

    row: Tensor
    distance: Tensor
    acts: Tensor


class Exact(Own, nn.Module):
    """The base class of modules whose buffers keep their dtypes, also in `model.half()`.

    Rounded keys would be another distance from their prompts than their radii were chosen for.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(keeping_dtype(fn), recurse)


class Codebook(Exact):
    """One row for each edit that has a key here.

    Args:
        key_width: D.
        value_width: O.
        any_width: whether keys of another width can be loaded.
        ratio: the largest distance to the nearest key, as a share of that to the second; None: any.
        device: of the buffers.

    Attributes:
        keys: [N, D] float32.
        radii: [N] float32; a key acts on queries at most this far from it.
        values: [sum of T_n, O] float32, the outputs that replace the layer's, those of all rows one
            after the other: one for all tokens (T_n = 1), or one for each token of the answer.
        lengths: [N] int64, T_n of each row.
        edits: [N] int64, ascending, the edit to which the row belongs.
        replaced_by: [N] int64, a later edit of the same prompt, whose row acts instead; -1: none.
        hits: [N] int64, how many prompts the row has acted on.
    """

    keys: Tensor
    radii: Tensor
    values: Tensor
    lengths: Tensor
    edits: Tensor
    replaced_by: Tensor
    hits: Tensor
    _present: tuple[Tensor | None, Tensor, Tensor] | None
    _first: Tensor | None

    def __init__(
        self,
        key_width: int,
        value_width: int,
        any_width: bool,
        ratio: float | None,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.any_width = any_width
        self.ratio = ratio
        empty: Any = partial(torch.empty, device=device, dtype=torch.float32)
        self.register_buffer("keys", empty(0, key_width))
        self.register_buffer("radii", empty(0))
        self.register_buffer("values", empty(0, value_width))
        for name in ("lengths", "edits", "replaced_by", "hits"):
            self.register_buffer(name, empty(0, dtype=torch.int64))
        self._forget()

    def __len__(self) -> int:
        return self.edits.shape[0]

    # --- look-up ---

    @torch.no_grad()
    def find(self, query: Tensor) -> Found:
        """Finds the nearest key of each query [M, D], by Euclidean distance."""
        present, keys, radii = self._searched()
        query = query.float()
        row, distance = nearest_key(query, keys, torch.full_like(radii, float("inf")))
        at = row.clamp(min=0)
        if radii.shape[0] == 0:
            return Found(row, distance, torch.zeros_like(row, dtype=torch.bool))
        acts = (row >= 0) & (distance <= radii[at])
        if self.ratio is not None and radii.shape[0] > 1:
            scores, _ = topk_keys(query, keys, 2, metric="l2")
            acts &= distance <= self.ratio * (-scores[:, 1]).clamp(min=0).sqrt()
        if present is not None:
            row = torch.where(row >= 0, present[at], -1)
        return Found(row, distance, acts)

    def rows_of(self, edits: Tensor) -> Tensor:
        """Returns the rows [M] of edits [M]; -1 for -1 and for edits that are gone."""
        return rows_of(self.edits, edits)

    def _searched(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """Returns the rows [P] that no later edit replaces (None: all), their keys and radii."""
        if len(self) == 0:
            return None, self.keys, self.radii
        if self._present is None:
            present = (self.replaced_by < 0).nonzero().squeeze(1)
            if present.shape[0] == len(self):
                self._present = None, self.keys, self.radii
            else:
                self._present = present, self.keys[present], self.radii[present]
        return self._present

    @property
    def first(self) -> Tensor:
        """[N] int64, the place of each row's first value in `values`."""
        if self._first is None:
            self._first = self.lengths.cumsum(0) - self.lengths
        return self._first

    def values_at(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Returns the values of rows [M] at tokens [M, S] of the answer, [M, S, O].

        A row's last value stands for the tokens behind it, its first for those before the answer.
        """
        last = (self.lengths[rows] - 1)[:, None]
        within = torch.minimum(tokens.clamp(min=0), last)
        return self.values[self.first[rows][:, None] + within]

    # --- changes ---

    def add(self, keys: Tensor, values: Sequence[Tensor], radii: Tensor, edits: Tensor) -> None:
        """Adds a row for each of M edits.

        Args:
            keys: [M, D].
            values: [T_m, O] of each.
            radii: [M].
            edits: [M] int64, ascending, greater than those that are there.
        """
        none = torch.full_like(edits, -1)
        lengths = edits.new_tensor([len(value) for value in values])
        self._set(
            keys=torch.cat([self.keys, keys.to(self.keys)]),
            radii=torch.cat([self.radii, radii.to(self.radii)]),
            values=torch.cat([self.values, *(value.to(self.values) for value in values)]),
            lengths=torch.cat([self.lengths, lengths]),
            edits=torch.cat([self.edits, edits]),
            replaced_by=torch.cat([self.replaced_by, none]),
            hits=torch.cat([self.hits, torch.zeros_like(edits)]),
        )

    def replace(self, old: int, new: int) -> None:
        """Lets the row of edit `new` act instead of that of edit `old`, while `new` is there."""
        replaced = torch.where(self.edits == old, new, self.replaced_by)
        self._set(replaced_by=replaced)

    def remove(self, edit: int) -> None:
        """Removes the row of an edit; that which it replaced acts, unless a later one does."""
        kept = self.edits != edit
        replaced_by = without(self.replaced_by, self.edits, edit)
        self._set(
            keys=self.keys[kept],
            radii=self.radii[kept],
            values=self.values[kept.repeat_interleave(self.lengths)],
            lengths=self.lengths[kept],
            edits=self.edits[kept],
            replaced_by=replaced_by[kept],
            hits=self.hits[kept],
        )

    def split(self, radius: float, labels: Tensor, rows: Tensor) -> None:
        """Sets radii so that the balls of keys with different labels do not overlap.

            radius_i = min(radius, min_j d_ij / 2),  j over the keys with another label

        Args:
            radius: the largest radius.
            labels: [N] int64, equal for rows with equal targets.
            rows: [M] int64, the rows whose radii are computed again.
        """
        present, radii = (self.replaced_by < 0)[None], self.radii.clone()
        for part in rows.split(256):
            distance = differences(self.keys[part], self.keys)  # [m, N]
            other = present & (labels[part, None] != labels[None])
            nearest, at = torch.where(other, distance, float("inf")).min(1)
            older = (at > part) * _MARGIN
            radii[part] = (nearest / 2 - older).clamp(0, radius)
        self._set(radii=radii)

    def move(self, row: int, radius: float, key: Tensor | None) -> None:
        """Sets the radius of a row and, unless `key` [D] is None, its key."""
        radii, keys = self.radii.clone(), self.keys.clone()
        radii[row] = radius
        if key is not None:
            keys[row] = key
        self._set(radii=radii, keys=keys)

    def set_value(self, row: int, value: Tensor) -> None:
        """Sets the values [T_n, O] of a row."""
        values, first = self.values.clone(), int(self.first[row])
        values[first : first + int(self.lengths[row])] = value
        self._set(values=values)

    def require_consistent(self, edits: Tensor, path: str) -> None:
        """Raises ValueError unless there is a row of each buffer for some of the edits.

        Args:
            edits: [E] int64, the edits that there are.
            path: the layer's path, for the message.
        """
        shapes = {name: tuple(buffer.shape) for name, buffer in self.named_buffers()}
        count = len(self.values)  # one for each token, the others have one row for each edit
        rows = {shape[0] for name, shape in shapes.items() if name != "values"}
        lengths_fit = bool((self.lengths > 0).all()) and int(self.lengths.sum()) == count
        known = torch.isin(self.edits, edits.to(self.edits.device)).all()
        ascending = (self.edits.diff() > 0).all()
        if rows != {len(self)} or not lengths_fit or not known or not ascending:
            raise ValueError(f"{path}: got {shapes}, expected one row for each edit")

    def _set(self, **buffers: Tensor) -> None:
        for name, value in buffers.items():
            setattr(self, name, value)
        self._forget()

    def _forget(self) -> None:
        """Forgets what was derived from the buffers."""
        self._present = None
        self._first = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        make_ragged(state_dict, prefix)
        resize(self, state_dict, prefix, {"keys"} if self.any_width else set())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._forget()


def rows_of(held: Tensor, edits: Tensor) -> Tensor:
    """Returns where edits [M] are among those held [N], ascending; -1 for those that are not."""
    if held.shape[0] == 0:
        return torch.full_like(edits, -1)
    at = torch.searchsorted(held, edits).clamp(max=held.shape[0] - 1)
    return torch.where(held[at] == edits, at, -1)


def differences(x: Tensor, y: Tensor) -> Tensor:
    """Returns the distances of x [M, D] from y [N, D], [M, N].

    Not by a matrix product, whose rounding is larger than the distances of near keys.
    """
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def without(replaced_by: Tensor, edits: Tensor, edit: int) -> Tensor:
    """Returns which edit replaces each row's once `edit` is gone: the one that replaces `edit`.

    Args:
        replaced_by, edits: [N] int64, as in `Codebook`.
    """
    heir = torch.where(edits == edit, replaced_by, -1).amax()
    return torch.where(replaced_by == edit, heir, replaced_by)


def make_ragged(state: dict[str, Tensor], prefix: str) -> None:
    """Turns values [N, T, O] of a state_dict, as they were stored before, into today's.

    Rows had been lengthened by repeating the last value, which is left out again.
    """
    name = f"{prefix}values"
    values = state.get(name)
    if values is None or values.dim() != 3 or f"{prefix}lengths" in state:
        return
    place = torch.arange(values.shape[1], device=values.device)
    differs = torch.zeros(values.shape[:2], dtype=torch.bool, device=values.device)  # [N, T]
    differs[:, 1:] = (values[:, 1:] != values[:, :-1]).any(2)
    lengths = 1 + torch.where(differs, place, 0).amax(1)
    kept = place < lengths[:, None]
    state[name], state[f"{prefix}lengths"] = values[kept], lengths


def resize(module: nn.Module, state: dict[str, Tensor], prefix: str, free: Set[str]) -> None:
    """Gives buffers the sizes of those in a state_dict, which differ in their numbers of rows.

    Args:
        module: has the buffers.
        state, prefix: the state_dict, and what its names begin with.
        free: names of buffers of which other sizes may differ too. Others keep their sizes, so that
            loading raises an error.
    """
    for name, buffer in module._buffers.items():
        value = state.get(prefix + name)
        if buffer is None or value is None or value.dim() != buffer.dim():
            continue
        if name in free or value.shape[1:] == buffer.shape[1:]:
            setattr(module, name, buffer.new_empty(value.shape))
