"""Tables with rows only for the few of N ids that were ever written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sapt_fast.pools.id_map import SPARE, IdMap

__all__ = ["RowTable", "require_ids"]

_LEAST_ROWS = 64


class RowTable:
    """Named tables whose rows belong to ids; an id takes memory once it has been added.

    All tables have the same number of rows (`capacity`), of which the first `len` are in use.

    Args:
        num_ids: N; ids are 0 to N - 1.
        shapes: shape and dtype of one row of each table.
        device: of everything.

    Attributes:
        ids: [capacity] int64, the id of each row.
        tables: by name, [capacity, *shape].
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        num_ids: int,
        shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        device: torch.device,
    ) -> None:
        self.num_ids = num_ids
        self.shapes = dict(shapes)
        self._size = 0
        self._map = IdMap(num_ids, device)
        self.ids = torch.empty(0, dtype=torch.int64, device=device)
        self.tables = {
            name: torch.empty(0, *shape, dtype=dtype, device=device)
            for name, (shape, dtype) in self.shapes.items()
        }

    def __len__(self) -> int:
        return self._size

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @property
    def nbytes(self) -> int:
        """Number of bytes of tables, ids and map, spare rows included."""
        tensors = self.ids, *self.tables.values()
        return self._map.nbytes + sum(tensor.nbytes for tensor in tensors)

    def used_ids(self) -> Tensor:
        """Returns the ids that have a row, [len] int64, in the order of the rows."""
        return self.ids[: self._size]

    def used(self, name: str) -> Tensor:
        """Returns the rows of a table that are in use, [len, *shape], sharing memory with it."""
        return self.tables[name][: self._size]

    def find(self, ids: Tensor) -> Tensor:
        """Returns the rows of ids -1 to N (int64, any shape); -1 for ids without one, -1 and N."""
        return self._map.find(ids)

    def add(self, ids: Tensor) -> Tensor:
        """Returns the rows of distinct ids [U]; those without one get a row with undefined values.

        This waits for the device.
        """
        at = self.find(ids)
        new = ids[at < 0]
        if len(new):
            self.make_room(new)
            start, end = self._size, self._size + len(new)
            self.ids[start:end] = new
            self._size = end
            self._map.set(new, torch.arange(start, end, device=self.device))
            at = self.find(ids)
        return at

    def make_room(self, ids: Tensor) -> None:
        """Takes the memory that `add` needs for distinct ids [U]. This waits for the device."""
        self.reserve(self._size + int((self.find(ids) < 0).sum()))
        self._map.reserve(ids)

    def read(self, at: Tensor) -> dict[str, Tensor]:
        """Returns copies of the rows `at` [U] of all tables."""
        return {name: self.gather(name, at) for name in self.tables}

    def gather(self, name: str, at: Tensor) -> Tensor:
        """Returns copies of the rows `at` [U] of one table."""
        return self.tables[name][at]

    def write(self, at: Tensor, values: Mapping[str, Tensor]) -> None:
        """Writes values into the rows `at` [U] of the tables that are named."""
        for name, value in values.items():
            table = self.tables[name]
            table[at] = value.to(table)

    def remove(self, ids: Tensor) -> None:
        """Takes the rows of distinct ids away; the last rows move into the places of these.

        Ids without a row are ignored. This waits for the device.
        """
        at = self.find(ids)
        gone = at[at >= 0].sort().values
        self._map.drop(ids)
        size = self._size - len(gone)
        last = torch.arange(size, self._size, device=self.device)
        source = last[~torch.isin(last, gone)]
        target = gone[gone < size]
        self._size = size
        if len(target) == 0:
            return
        for table in (self.ids, *self.tables.values()):
            table[target] = table[source]
        self._map.set(self.ids[target], target)

    @torch.inference_mode(False)
    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Replaces every tensor by `fn` of it, for moves to another device."""
        self._map.apply(fn)
        self.ids = fn(self.ids)
        self.tables = {name: fn(table) for name, table in self.tables.items()}

    @torch.inference_mode(False)
    def reserve(self, rows: int) -> None:
        """Makes room for this number of rows in all."""
        capacity = self.ids.shape[0]
        if rows <= capacity:
            return
        capacity = min(self.num_ids, max(rows, _LEAST_ROWS, capacity + capacity // SPARE))
        for name in self.tables:  # one after another: only one is there twice
            self.tables[name] = self._grown(self.tables[name], capacity)
        self.ids = self._grown(self.ids, capacity)  # last: without memory nothing has changed

    def _grown(self, table: Tensor, capacity: int) -> Tensor:
        larger = table.new_empty(capacity, *table.shape[1:])
        larger[: self._size] = table[: self._size]
        return larger


def require_ids(name: str, ids: Any, num_ids: int) -> None:
    """Raises ValueError or TypeError unless these are distinct ids [U] from 0 to num_ids - 1."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name}: got {kind}, expected a tensor of torch.int64")
    if ids.dim() != 1:
        raise ValueError(f"{name}: got shape {tuple(ids.shape)}, expected [U]")
    if len(ids) == 0:
        return
    ordered = ids.sort().values
    least, most = int(ordered[0]), int(ordered[-1])
    if least < 0 or most >= num_ids:
        raise ValueError(f"{name}: got values from {least} to {most}, expected 0 to {num_ids - 1}")
    twice = ordered[1:][ordered.diff() == 0]
    if len(twice):
        raise ValueError(f"{name}: got {int(twice[0])} twice, expected distinct ids")
