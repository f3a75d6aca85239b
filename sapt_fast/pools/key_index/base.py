"""What every index over N keys of width D can do."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sapt_fast.checks import require_choice, require_count
from sapt_fast.ops import topk_keys
from sapt_fast.ops._common import FLOATS
from sapt_fast.ops._keys import accumulation_dtype
from sapt_fast.ops.formulas import scores_of
from sapt_fast.pools.codebook import Exact

__all__ = ["KeyIndex"]

_RECALL_ROWS = 256  # queries whose exact results are compared at a time


class KeyIndex(Exact):
    """The base class of indexes, which find the k keys with the largest scores.

    Keys keep their dtype in `model.half()`: a rounded key would have other neighbours.

    Args:
        num_keys: N.
        width: D.
        metric: "dot", "cosine" or "l2" as in `topk_keys`, as far as the kind supports it.

    Attributes:
        kind: the name of the kind in `KINDS`.
        METRICS: the metrics that the kind supports.
    """

    kind: ClassVar[str]
    METRICS: ClassVar[tuple[str, ...]] = ("dot", "cosine", "l2")

    def __init__(self, num_keys: int, width: int, metric: str) -> None:
        super().__init__()
        require_count("num_keys", num_keys)
        require_count("width", width)
        require_choice("metric", metric, self.METRICS)
        self.num_keys = num_keys
        self.width = width
        self.metric = metric

    # --- look-up ---

    def search(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Finds the k keys with the largest scores, best first.

        Scores are differentiable in the query, and in keys that train; the index is not. Equal
        scores are ordered by index, unless the kind states another rule.

        Args:
            query: [M, D] on the keys' device, any floating-point dtype; converted to the keys'.
            k: at least 1; may exceed the number of keys.

        Returns:
            scores: [M, k] float32 (float64 for float64 keys); -inf where there is no key.
            index: [M, k] int64; -1 where there is no key. The result for a query that contains NaN
                is undefined, but its scores are NaN or -inf.

        Raises:
            ValueError, TypeError: if the query's shape, dtype or device, or `k`, does not fit.
            RuntimeError: if an approximate index is older than its keys, or if faiss cannot read
                keys on their device.
        """
        require_count("k", k)
        keys = self._table()
        if query.dim() != 2 or query.shape[1] != self.width:
            raise ValueError(f"query: got shape {tuple(query.shape)}, expected [M, {self.width}]")
        if query.dtype not in FLOATS:
            raise TypeError(f"query: got dtype {query.dtype}, expected one of {FLOATS}")
        if query.device != keys.device:
            raise ValueError(
                f"query: got device {query.device}, expected {keys.device} (that of the keys)"
            )
        found = min(k, self.num_present)
        if found == 0:
            shape, dtype = (query.shape[0], k), accumulation_dtype(keys.dtype)
            index = torch.full(shape, -1, device=keys.device)
            return torch.full(shape, float("-inf"), dtype=dtype, device=keys.device), index
        scores, index = self._search(query.to(keys.dtype), found)
        if found == k:
            return scores, index
        missing = (0, k - found)
        return F.pad(scores, missing, value=float("-inf")), F.pad(index, missing, value=-1)

    @torch.no_grad()
    def recall(self, query: Tensor, k: int) -> float:
        """Measures the share of the exact top k that `search` finds, averaged over the queries.

        Of keys with equal scores, each counts as well as the others. Memory: the keys [N, D] once
        more where the kind does not store them as one table.

        Args:
            query: [M, D], at least one, as in `search`.
            k: as in `search`; at most the number of keys present counts.

        Returns:
            Between 0 and 1.

        Raises:
            ValueError: if there is no query, or no key.
            ValueError, TypeError, RuntimeError: as in `search`.
        """
        index = self.search(query, k)[1]
        if query.shape[0] == 0:
            raise ValueError("query: got no rows, expected at least one")
        keys, rows = self.present_keys()
        k = min(k, rows.shape[0])
        if k == 0:
            raise ValueError("recall: the index has no keys")
        at = torch.full((self.num_keys,), -1, device=rows.device)
        at[rows] = torch.arange(rows.shape[0], device=rows.device)
        hits = 0
        for part, found in zip(query.split(_RECALL_ROWS), index.split(_RECALL_ROWS), strict=True):
            best = topk_keys(part.to(keys.dtype), keys, k, metric=self.metric)[1]
            wide = part.to(keys.dtype).double()
            least = scores_of(wide, keys, best, self.metric).amin(1, keepdim=True)
            scores = scores_of(wide, keys, at[found[:, :k].clamp(min=0)], self.metric)
            hits += int(((found[:, :k] >= 0) & (scores >= least)).sum())
        return hits / (query.shape[0] * k)

    @property
    @abstractmethod
    def num_present(self) -> int:
        """Number of keys that can be found, at most N."""

    @abstractmethod
    def present_keys(self) -> tuple[Tensor, Tensor]:
        """Returns the keys that can be found, [P, D], and their rows [P] int64, ascending."""

    # --- changes ---

    @abstractmethod
    def set_rows(self, rows: Tensor, keys: Tensor) -> None:
        """Sets the keys of rows, whether or not they have keys.

        Args:
            rows: [U] int64, each once.
            keys: [U, D], finite, on any device; converted to the keys' dtype.

        Raises:
            ValueError, TypeError: if a shape, dtype or value does not fit.
            TypeError: if the kind has no rows of its own ("product").
        """

    @abstractmethod
    def remove_rows(self, rows: Tensor) -> None:
        """Removes the keys of rows, so that no search finds them until they are set again.

        Args:
            rows: [U] int64, each once; may contain rows without keys.

        Raises:
            ValueError, TypeError: if a shape, dtype or value does not fit.
            TypeError: if the kind has no rows of its own ("product").
        """

    def build(self) -> None:
        """Builds what the kind derives from its keys; kinds that derive nothing do nothing."""

    @property
    def stale(self) -> bool:
        """Whether keys have changed since `build`, so that `search` would raise an error."""
        return False

    # --- for kinds ---

    @abstractmethod
    def _table(self) -> Tensor:
        """Returns a tensor that has the keys' dtype and device."""

    @abstractmethod
    def _search(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Searches for a query [M, D] in the keys' dtype; k is at most the number present."""

    def extra_repr(self) -> str:
        return f"kind={self.kind}, num_keys={self.num_keys}, width={self.width}"
