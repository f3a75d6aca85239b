"""Product keys: the sums of two half keys, of which the best are found without a search of all N.

(Lample et al., "Large Memory Layers with Product Keys", NeurIPS 2019, section 3.1.)
"""

from __future__ import annotations

from math import isqrt
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sapt_fast.ops import topk_keys
from sapt_fast.pools.key_index.base import KeyIndex
from sapt_fast.pools.key_index.table import require_dtype

__all__ = ["ProductIndex"]


class ProductIndex(KeyIndex):
    """Key i n + j is half i of the first table beside half j of the second; N = n^2.

        score[i n + j] = score(query[: D / 2], first[i]) + score(query[D / 2 :], second[j])

    The search is exact over these keys: it finds the k best halves of each table, and the k best of
    their sums. Equal scores are ordered by the rank of the first half, then of the second. The
    halves are parameters, uniform in +-1 / sqrt(D) at first; `requires_grad_(False)` freezes them.

    Args:
        num_keys: N, a square.
        width: D, even.
        metric: "dot" or "l2".
        dtype: of the halves; float32, bfloat16 or float16, on a CPU also float64.
        device: of the halves.

    Attributes:
        first, second: [n, D / 2].
    """

    first: nn.Parameter
    second: nn.Parameter
    kind = "product"
    METRICS = ("dot", "l2")

    def __init__(
        self,
        num_keys: int,
        width: int,
        *,
        metric: str = "dot",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_keys, width, metric)
        require_dtype(dtype)
        self.halves = isqrt(num_keys)
        if self.halves**2 != num_keys:
            less, more = self.halves**2, (self.halves + 1) ** 2
            raise ValueError(f"num_keys: got {num_keys}, expected a square ({less} or {more})")
        if width % 2:
            raise ValueError(f"width: got {width}, expected an even number")
        for name in ("first", "second"):
            half = torch.empty(self.halves, width // 2, dtype=dtype, device=device)
            bound = width**-0.5
            self.register_parameter(name, nn.Parameter(half.uniform_(-bound, bound)))
        self._grid: tuple[Any, tuple[Tensor, Tensor, Tensor]] | None = None

    @property
    def num_present(self) -> int:
        return self.num_keys

    def present_keys(self) -> tuple[Tensor, Tensor]:
        shape = self.halves, self.halves, self.width // 2
        first, second = self.first.detach(), self.second.detach()
        keys = torch.cat([first.unsqueeze(1).expand(shape), second.expand(shape)], 2)
        return keys.flatten(0, 1), torch.arange(self.num_keys, device=keys.device)

    def set_rows(self, rows: Tensor, keys: Tensor) -> NoReturn:
        raise TypeError(
            'index: got kind "product", whose keys are all pairs of two tables of half keys: no '
            'row can be set alone; use "exact", "ivf" or "hnsw"'
        )

    def remove_rows(self, rows: Tensor) -> NoReturn:
        raise TypeError(
            'index: got kind "product", whose keys are all pairs of two tables of half keys: no '
            'row can be removed alone; use "exact", "ivf" or "hnsw"'
        )

    def _table(self) -> Tensor:
        return self.first

    def _search(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        each, half = min(k, self.halves), self.width // 2
        s1, i1 = topk_keys(query[:, :half], self.first, each, metric=self.metric)
        s2, i2 = topk_keys(query[:, half:], self.second, each, metric=self.metric)
        pairs, ranks1, ranks2 = self._pairs(k, query.device)
        # Each pair is read once, so that no gradient is a sum in an order of its own.
        sums = (s1.unsqueeze(2) + s2.unsqueeze(1)).flatten(1).index_select(1, pairs)
        index = i1.index_select(1, ranks1) * self.halves + i2.index_select(1, ranks2)
        # Ascending and stable: NaN is last, and equal sums keep their order.
        scores, order = sums.neg().sort(stable=True)
        return scores[:, :k].neg(), index.gather(1, order[:, :k])

    def _pairs(self, k: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the pairs of ranks that can be among the k best.

        At least (i + 1) (j + 1) - 1 pairs come before the pair of ranks (i, j), counted from 0.

        Returns:
            [P] int64 each, ascending: positions in the grid of all ranks; the ranks i; the ranks j.
        """
        grid = self._grid  # which another thread may replace
        if grid is None or grid[0] != (k, device):
            each = min(k, self.halves)
            with torch.inference_mode(False):
                rank = torch.arange(1, each + 1, device=device)
                pairs = (rank.unsqueeze(1) * rank <= k).flatten().nonzero().squeeze(1)
                self._grid = grid = (k, device), (pairs, pairs // each, pairs % each)
        return grid[1]
