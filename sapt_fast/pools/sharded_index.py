"""An index of keys that is divided by rows over processes."""

from __future__ import annotations

import torch
from torch import Tensor

from sapt_fast.pools.codebook import Exact
from sapt_fast.pools.key_index.table import TableIndex
from sapt_fast.pools.sharded_experts import RowShards, sharded_search

__all__ = ["ShardedIndex"]


class ShardedIndex(Exact):
    """Keys of all processes under the numbers that one index would give them.

    All processes call `search` and `keys_at` together. A `state_dict` has this process's keys.

    Args:
        local: this process's keys, numbered from 0.
        shards: which keys these are.
    """

    def __init__(self, local: TableIndex, shards: RowShards) -> None:
        super().__init__()
        shards.require_keys(local)
        self.local = local
        self.shards = shards

    @property
    def num_keys(self) -> int:
        """N, over all processes."""
        return self.shards.num_rows

    @property
    def width(self) -> int:
        """D."""
        return self.local.width

    def search(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As `sharded_search`."""
        return sharded_search(self.local, self.shards, query, k)

    def set_rows(self, rows: Tensor, keys: Tensor) -> None:
        """As `KeyIndex.set_rows`, for the rows of this process."""
        here = self.shards.local(rows) >= 0
        self.local.set_rows(self.shards.kept(rows), keys[here.to(keys.device)])

    def remove_rows(self, rows: Tensor) -> None:
        """As `KeyIndex.remove_rows`, for the rows of this process."""
        self.local.remove_rows(self.shards.kept(rows))

    def build(self) -> None:
        """As `KeyIndex.build`."""
        self.local.build()

    def keys_at(self, rows: Tensor) -> Tensor:
        """Returns the keys [M, D] in rows [M], which are the same on all processes."""
        at = self.shards.local(rows)
        keys = self.local.keys.new_zeros(len(rows), self.width)
        keys[at >= 0] = self.local.keys[at[at >= 0]]
        everyone = self.shards.group.gather(keys).unflatten(0, (self.shards.group.size, -1))
        return everyone[self.shards.owner(rows), torch.arange(len(rows), device=rows.device)]

    def require_rows(self, rows: Tensor) -> None:
        """Raises ValueError unless these rows have keys, and no others."""
        self.local.require_rows(self.shards.kept(rows))
