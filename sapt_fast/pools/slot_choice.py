"""Chooses which experts of a batch to train, so that others' answers change less.

Continual Learning via Sparse Memory Finetuning (arXiv 2510.15103): train the experts
that this batch uses often and other data seldom (TF-IDF).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sapt_fast.checks import require_count
from sapt_fast.pools.row_table import RowTable, require_ids

__all__ = ["SlotUse"]


class SlotUse:
    """Counts in how many batches of background data each expert is used.

    Args:
        num_experts: N.
        device: of the counts.

    Attributes:
        batches: number of batches that `add` has got.

    Example:
        >>> import torch
        >>> from sapt_fast.pools.slot_choice import SlotUse
        >>> use = SlotUse(1000)
        >>> use.add(torch.tensor([[1, 2]]))
        >>> use.choose(torch.tensor([[1, 2], [3, 2]]), 1)
        tensor([3])
    """

    def __init__(self, num_experts: int, device: torch.device | str = "cpu") -> None:
        require_count("num_experts", num_experts)
        self.batches = 0
        self._counts = RowTable(num_experts, {"batches": ((), torch.int64)}, torch.device(device))

    def add(self, index: Tensor) -> None:
        """Counts one batch of background data.

        Args:
            index: any shape, int64, the experts that it uses; -1 for none.
        """
        ids, _ = self._used(index)
        seen = self._seen(ids)
        self._counts.write(self._counts.add(ids), {"batches": seen + 1})
        self.batches += 1

    def choose(self, index: Tensor, count: int) -> Tensor:
        """Returns the experts of a batch with the largest TF-IDF.

        With c uses in this batch of C, and b of B background batches, an expert's TF-IDF is
        c / C * log((B + 1) / (b + 1)). Equal ones are ordered by id.

        Args:
            index: any shape, int64, the experts that the batch uses; -1 for none.
            count: number of experts; all of the batch if it has fewer.

        Returns:
            [U] int64, ascending, U at most `count`.
        """
        require_count("count", count)
        ids, uses = self._used(index)
        rarity = ((self.batches + 1) / (self._seen(ids).double() + 1)).log()
        scores = uses / uses.sum() * rarity
        best = scores.sort(descending=True, stable=True).indices[:count]
        return ids[best].sort().values

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the counts.

        Returns:
            ids: [T] int64, the experts that were used.
            counts: [T] int64, the number of batches of each.
            batches: [] int64.
        """
        counts = self._counts.used("batches")
        return {
            "ids": self._counts.used_ids(),
            "counts": counts,
            "batches": torch.tensor(self.batches),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replaces the counts by those of `state_dict`.

        Raises:
            KeyError: if a tensor is missing.
            TypeError, ValueError: if ids are out of range or not distinct; nothing has changed.
        """
        require_ids("ids", state["ids"], self._counts.num_ids)
        counts = RowTable(self._counts.num_ids, self._counts.shapes, self._counts.device)
        counts.write(counts.add(state["ids"].to(counts.device)), {"batches": state["counts"]})
        self._counts, self.batches = counts, int(state["batches"])

    def _seen(self, ids: Tensor) -> Tensor:
        """Returns the number of background batches of each expert."""
        at = self._counts.find(ids)
        known = at >= 0
        seen = torch.zeros_like(ids)
        seen[known] = self._counts.gather("batches", at[known])
        return seen

    def _used(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the experts of an index, ascending, and the number of uses of each."""
        ids, uses = index.to(self._counts.device).unique(return_counts=True)
        uses, ids = uses[ids >= 0], ids[ids >= 0]
        require_ids("index", ids, self._counts.num_ids)
        return ids, uses
