"""A cache on the compute device of rows that are stored in host memory or in files."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sapt_fast.pools.id_map import IdMap

__all__ = ["RowCache"]


class RowCache:
    """The rows that were used last (LRU).

    The maps are on the CPU, which decides; only rows move. Several threads may use it. Copies and
    pickles are empty.

    Args:
        capacity: number of rows.
        num_ids: N; ids are 0 to N - 1.
        shapes: shape and dtype of one row of each table.
        device: of the cached rows.

    Attributes:
        hits, misses: number of rows asked for that were cached, and that were not.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        capacity: int,
        num_ids: int,
        shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        device: torch.device,
    ) -> None:
        self.capacity, self.device = capacity, device
        self._made_with = capacity, num_ids, shapes, device
        self._lock = threading.Lock()
        self.tables = {
            name: torch.empty(capacity, *shape, dtype=dtype, device=device)
            for name, (shape, dtype) in shapes.items()
        }
        self._map = IdMap(num_ids, torch.device("cpu"))
        self._ids = torch.full((capacity,), -1, dtype=torch.int64)
        self._used_at = torch.zeros(capacity, dtype=torch.int64)  # 0: free
        self._calls = 0
        self.hits = self.misses = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return RowCache, self._made_with

    @property
    def hit_rate(self) -> float:
        """Share of the rows asked for that were cached; NaN before the first."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else math.nan

    def rows(self, ids: Tensor, at: Tensor, source: Any) -> dict[str, Tensor]:
        """Returns copies of rows on the device, [U, *shape] by table.

        Args:
            ids: [U] int64 on the CPU, distinct.
            at: [U] int64, their rows in `source`.
            source: has `gather(name, at)`.
        """
        with self._lock:
            place = self._map.find(ids)
            missing = place < 0
            count = int(missing.sum())
            self.hits += len(ids) - count
            self.misses += count
            if len(ids) > self.capacity:
                return self._mixed(place, missing, at, source)
            self._calls += 1
            self._used_at[place[~missing]] = self._calls
            if count:
                free = self._used_at.topk(count, largest=False, sorted=False).indices
                self._admit(free, ids[missing], at[missing], source)
                place[missing] = free
            where = place.to(self.device)
            return {name: table[where] for name, table in self.tables.items()}

    def drop(self, ids: Tensor) -> None:
        """Forgets rows [U] that have changed where they are stored."""
        with self._lock:
            place = self._map.find(ids)
            self._evict(place[place >= 0])

    def _evict(self, place: Tensor) -> None:
        ids = self._ids[place]
        self._map.drop(ids[ids >= 0])
        self._ids[place], self._used_at[place] = -1, 0

    def _admit(self, free: Tensor, ids: Tensor, at: Tensor, source: Any) -> None:
        fresh = {name: self._moved(source.gather(name, at)) for name in self.tables}
        self._evict(free)
        where = free.to(self.device)
        for name, rows in fresh.items():
            self.tables[name][where] = rows
        # Last: after an error in a copy, these places are free.
        self._map.set(ids, free)
        self._ids[free], self._used_at[free] = ids, self._calls

    def _mixed(self, place: Tensor, missing: Tensor, at: Tensor, source: Any) -> dict[str, Tensor]:
        """Copies more rows than fit, some of which are cached."""
        out = {}
        for name, table in self.tables.items():
            rows = table.new_empty(len(place), *table.shape[1:])
            rows[(~missing).to(self.device)] = table[place[~missing].to(self.device)]
            rows[missing.to(self.device)] = self._moved(source.gather(name, at[missing]))
            out[name] = rows
        return out

    def _moved(self, rows: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return rows.pin_memory().to(self.device, non_blocking=True)
        return rows.to(self.device)
