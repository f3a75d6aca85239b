"""The keys, radii and values of the edits at one layer.

(GRACE, NeurIPS 2023, section 3.)
"""

from __future__ import annotations

from collections.abc import Callable, Set
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sapt_fast.ops import nearest_key, topk_keys
from sapt_fast.pools.own import Own, keeping_dtype

__all__ = ["Codebook", "Exact", "Found", "differences", "resize", "rows_of", "without"]

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
        values: [N, T, O] float32, the outputs that replace the layer's: one for all tokens (T = 1),
            or one for each token of the answer.
        edits: [N] int64, ascending, the edit to which the row belongs.
        replaced_by: [N] int64, a later edit of the same prompt, whose row acts instead; -1: none.
        hits: [N] int64, how many prompts the row has acted on.
    """

    keys: Tensor
    radii: Tensor
    values: Tensor
    edits: Tensor
    replaced_by: Tensor
    hits: Tensor

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
        self.register_buffer("values", empty(0, 1, value_width))
        for name in ("edits", "replaced_by", "hits"):
            self.register_buffer(name, empty(0, dtype=torch.int64))
        self._present: Tensor | None = None

    def __len__(self) -> int:
        return self.edits.shape[0]

    # --- look-up ---

    @torch.no_grad()
    def find(self, query: Tensor) -> Found:
        """Finds the nearest key of each query [M, D], by Euclidean distance."""
        present = self.present
        keys, radii = self.keys, self.radii
        if present is not None:
            keys, radii = keys[present], radii[present]
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

    @property
    def present(self) -> Tensor | None:
        """[P] int64, the rows that no later edit replaces; None if that is all of them."""
        if self._present is None:
            self._present = (self.replaced_by < 0).nonzero().squeeze(1)
        return None if self._present.shape[0] == len(self) else self._present

    # --- changes ---

    def add(self, keys: Tensor, values: Tensor, radii: Tensor, edits: Tensor) -> None:
        """Adds a row for each of M edits.

        Args:
            keys: [M, D].
            values: [M, T, O]. The last token's value stands for the tokens behind it.
            radii: [M].
            edits: [M] int64, ascending, greater than those that are there.
        """
        tokens = max(self.values.shape[1], values.shape[1])
        held, new = (_lengthened(v, tokens) for v in (self.values, values.to(self.values)))
        none = torch.full_like(edits, -1)
        self._set(
            keys=torch.cat([self.keys, keys.to(self.keys)]),
            radii=torch.cat([self.radii, radii.to(self.radii)]),
            values=torch.cat([held, new]),
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
            values=self.values[kept],
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
        """Sets the value [T, O] of a row."""
        values = self.values.clone()
        values[row] = value
        self._set(values=values)

    def require_consistent(self, edits: Tensor, path: str) -> None:
        """Raises ValueError unless there is a row of each buffer for some of the edits.

        Args:
            edits: [E] int64, the edits that there are.
            path: the layer's path, for the message.
        """
        shapes = {name: tuple(buffer.shape) for name, buffer in self.named_buffers()}
        known = torch.isin(self.edits, edits.to(self.edits.device)).all()
        ascending = (self.edits.diff() > 0).all()
        if {shape[0] for shape in shapes.values()} != {len(self)} or not known or not ascending:
            raise ValueError(f"{path}: got {shapes}, expected one row for each edit")

    def _set(self, **buffers: Tensor) -> None:
        for name, value in buffers.items():
            setattr(self, name, value)
        self._present = None

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        free = {"values", "keys"} if self.any_width else {"values"}
        resize(self, state_dict, prefix, free)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._present = None


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


def _lengthened(values: Tensor, tokens: int) -> Tensor:
    """Repeats the last token's value: [N, T, O] to [N, `tokens`, O]."""
    missing = tokens - values.shape[1]
    return torch.cat([values, values[:, -1:].expand(-1, missing, -1)], 1) if missing else values


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
