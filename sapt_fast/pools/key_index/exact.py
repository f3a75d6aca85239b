"""Exact search over a table of keys."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapt_fast.ops import topk_keys
from sapt_fast.ops._keys import accumulation_dtype
from sapt_fast.ops.formulas import pair_scores
from sapt_fast.pools.key_index.table import TableIndex

__all__ = ["ExactIndex"]


class ExactIndex(TableIndex):
    """Compares every key with the query, in one pass over the table.

    Args:
        num_keys, width, metric, dtype, device: as in `TableIndex`.
        trainable: whether the keys are a parameter, which begins uniform in +-1 / sqrt(D). Its
            gradient is sparse (`torch.sparse_coo`) over the keys found.
    """

    kind = "exact"

    def __init__(
        self, num_keys: int, width: int, *, trainable: bool = False, **options: Any
    ) -> None:
        super().__init__(num_keys, width, **options)
        if trainable:
            keys = nn.init.uniform_(self.keys, -(width**-0.5), width**-0.5)
            del self.keys
            self.keys = nn.Parameter(keys)

    def _search(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        keys = self.keys[: self._span()[1]]
        if not (self.keys.requires_grad and torch.is_grad_enabled()):
            return topk_keys(query, keys, k, metric=self.metric)
        index = topk_keys(query.detach(), keys.detach(), k, metric=self.metric)[1]
        wide = accumulation_dtype(keys.dtype)
        found = F.embedding(index, self.keys, sparse=True).to(wide)  # [M, k, D]
        return pair_scores(query.to(wide).unsqueeze(1), found, self.metric), index
