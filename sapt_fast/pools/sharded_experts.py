"""A bank of experts, and an index of their keys, sharded by rows over processes.

Each process stores and searches its own rows. Queries go to all processes, which return their k
best keys. Inputs go to the processes of their experts, which return what these add. Experts, their
gradients and the state of their optimizer never leave their process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapt_fast.pools.collectives import Group, Sent, exchanged, gathered_rows
from sapt_fast.pools.experts import ExpertBank
from sapt_fast.pools.key_index import KeyIndex, ProductIndex
from sapt_fast.pools.own import Own
from sapt_fast.pools.row_table import require_ids
from sapt_fast.pools.selections import require_index

__all__ = ["RowShards", "ShardedExperts", "sharded_search"]


class RowShards:
    """Which of N rows this process has: a contiguous part.

    Parts differ by one row at most; the larger ones come first (`torch.tensor_split`).

    Args:
        num_rows: N, over all processes.
        group: the processes.

    Attributes:
        num_rows, group: as above.
        first: the first row of this process.
        count: number of rows of this process.

    Raises:
        ValueError: if there are fewer rows than processes.
    """

    def __init__(self, num_rows: int, group: Group) -> None:
        self.num_rows, self.group = num_rows, group
        if num_rows < group.size:
            raise ValueError(
                f"num_experts: got {num_rows} for {group.size} processes, expected at least "
                f"{group.size}, one for each"
            )
        self._size, self._larger = divmod(num_rows, group.size)
        self.first = group.rank * self._size + min(group.rank, self._larger)
        self.count = self._size + (group.rank < self._larger)

    def owner(self, ids: Tensor) -> Tensor:
        """Returns the process of each row; -1 for -1 and for what is out of range."""
        # Without the row that each larger part has more, all parts would have the same size.
        larger, smaller = ids // (self._size + 1), (ids - self._larger) // self._size
        inside = (ids >= 0) & (ids < self.num_rows)
        return torch.where(inside, torch.where(larger < self._larger, larger, smaller), -1)

    def local(self, ids: Tensor) -> Tensor:
        """Returns the rows within this process; -1 for those of others and for -1."""
        at = ids - self.first
        return torch.where((at >= 0) & (at < self.count), at, -1)

    def kept(self, ids: Tensor) -> Tensor:
        """Returns the rows of these that this process has, numbered within it."""
        local = self.local(ids)
        return local[local >= 0]

    def require_keys(self, index: KeyIndex) -> None:
        """Raises TypeError or ValueError unless an index has a key for each row of this process."""
        if isinstance(index, ProductIndex):
            raise TypeError("index: got product keys, which are no rows, expected another kind")
        if index.num_keys != self.count:
            raise ValueError(
                f"index: got {index.num_keys} keys, expected {self.count} (of this process's rows)"
            )


class ShardedExperts(Own, nn.Module):
    """A bank whose experts are divided over processes; every process has its own inputs.

    `mix` gives what an `ExpertBank` of all experts gives, up to the order of a sum: a delta is
    summed within each process first, and then over the processes in their order. Every run gives
    the same bits. All processes have to call `mix`, `training_rows` and the backward together; they
    may have different numbers of rows. A `state_dict` has this process's experts only: use
    `storage.sharded_bank_files` to save all.

    Args:
        num_experts: N, over all processes.
        r, in_features, out_features: as for `ExpertBank`.
        group: a process group; None for all processes.
        options: further arguments of `ExpertBank`.

    Attributes:
        bank: this process's experts, numbered from 0. Give it to an optimizer of
            `pools.row_optimizers`.
        shards: which experts these are.

    Raises:
        ValueError: if there are fewer experts than processes.
    """

    def __init__(
        self,
        num_experts: int,
        r: int,
        in_features: int,
        out_features: int,
        *,
        group: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.shards = RowShards(num_experts, Group(group))
        self.bank = ExpertBank(
            self.shards.count, r, in_features, out_features, first=self.shards.first, **options
        )

    @property
    def num_experts(self) -> int:
        """N, over all processes."""
        return self.shards.num_rows

    @property
    def version(self) -> int:
        """That of this process's bank."""
        return self.bank.version

    def training_rows(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hands out the rows of the experts that any process names, as `ExpertBank.training_rows`.

        An expert's gradient is the sum over the losses of all processes. If each has the mean over
        its own rows, divide it by the number of processes.

        Args:
            ids: [U] int64, experts 0 to N - 1, distinct: those that this process's rows select.

        Returns:
            Those of all processes' experts that this one stores, numbered as in `bank` [V] int64,
            ascending; and their A [V, r, I] and B [V, r, O].

        Raises:
            TypeError, ValueError: if ids are not int64, out of range or not distinct.

        Example:
            >>> import torch
            >>> from sapt_fast.pools.row_optimizers import RowAdam
            >>> from sapt_fast.pools.sharded_experts import ShardedExperts
            >>> experts, index = ShardedExperts(100, 1, 8, 6), torch.tensor([[3, 70]])
            >>> optimizer = RowAdam(experts.bank, lr=0.03)
            >>> local, a, b = experts.training_rows(index.unique())
            >>> experts.mix(torch.ones(1, 8), index, torch.ones(1, 2)).sum().backward()
            >>> optimizer.step(local, (a.grad, b.grad))
        """
        require_ids("ids", ids, self.num_experts)
        local = self.shards.local(self.shards.group.gather_ragged(ids).unique())
        local = local[local >= 0]
        return (local, *self.bank.training_rows(local))

    def mix(
        self,
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        scaling: float = 1.0,
        *,
        backend: str | None = None,
    ) -> Tensor:
        """Computes the weighted sum of the selected experts' outputs, where these are stored.

        Args:
            x: [M, I]; M may differ between processes.
            index: [M, k] int64, experts 0 to N - 1; -1 for none.
            weights: [M, k].
            scaling, backend: as in `ExpertBank.mix`.

        Returns:
            delta, [M, O], as `ExpertBank.mix`; differentiable in x, weights and rows in training.

        Raises:
            ValueError, TypeError: if a shape, index, dtype or device does not fit.
        """
        if x.dim() != 2 or index.dim() != 2 or weights.shape != index.shape:
            raise ValueError(
                f"x, index, weights: got shapes {tuple(x.shape)}, {tuple(index.shape)} and "
                f"{tuple(weights.shape)}, expected [M, I], [M, k] and [M, k]"
            )
        if len(index) != len(x):
            raise ValueError(f"index: got {len(index)} rows, expected {len(x)} (those of x)")
        require_index(index, self.num_experts)
        sent = Sent(self.shards.owner(index), self.shards.group)
        local = self.shards.local(sent.send(index))
        delta = self.bank.mix(sent.send(x), local, sent.send(weights), scaling, backend=backend)
        return sent.returned(delta)


def sharded_search(
    index: KeyIndex, shards: RowShards, query: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Finds the k best of all processes' keys, as one index of all keys would.

    All processes have to call this together; they may have different numbers of queries.

    Args:
        index: this process's keys, numbered from 0; not product keys, which are no rows.
        shards: which keys these are.
        query: [M, D], this process's queries.
        k: number of keys to find.

    Returns:
        scores [M, k] and index [M, k] int64 as `KeyIndex.search` returns them, with numbers among
        all keys. Equal scores are ordered by these numbers, if `index` orders its own so.
        Differentiable in the query, and in keys that train.

    Raises:
        TypeError: if the index has product keys, which cannot be divided by rows.
        ValueError: if the index has another number of keys than `shards`.
        ValueError, TypeError, RuntimeError: as `KeyIndex.search`.
    """
    group = shards.group
    shards.require_keys(index)
    if query.dim() != 2:
        raise ValueError(f"query: got shape {tuple(query.shape)}, expected [M, {index.width}]")
    missing = max(group.counts(len(query), query.device)) - len(query)
    queries = gathered_rows(F.pad(query, (0, 0, 0, missing)), group)
    scores, found = index.search(queries, k)
    numbers = torch.where(found >= 0, found + shards.first, -1)
    # [W * M, k], best first for each process -> [M, W * k], in the order of the processes
    scores = exchanged(scores, group).unflatten(0, (group.size, -1)).transpose(0, 1).flatten(1)
    numbers = group.exchange(numbers).unflatten(0, (group.size, -1)).transpose(0, 1).flatten(1)
    # Ascending and stable as in `topk_keys`: NaN is last; here, before what is missing.
    order = scores.detach().neg().sort(dim=1, stable=True).indices
    absent = numbers.gather(1, order) < 0
    order = order.gather(1, absent.to(torch.uint8).sort(dim=1, stable=True).indices)[:, :k]
    count = len(query)
    return scores.gather(1, order)[:count], numbers.gather(1, order)[:count]
