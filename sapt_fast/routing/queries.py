"""Routing of methods whose weights come from queries, which a caller may give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sapt_fast.routing.forward import Forward
from sapt_fast.routing.hooks import Routing

__all__ = ["QueryRouting"]


class QueryRouting(Routing):
    """`Routing` with one set of weights per sample, from the sample's query."""

    def checked(self, weights: Tensor) -> Tensor:
        """As `Running.checked`, without weights per token."""
        weights = super().checked(weights)
        if weights.dim() == 3:
            count = self.count()
            raise ValueError(
                f"weights: got shape {tuple(weights.shape)}, expected [{count}] or [B, {count}]: "
                "a sample has one set of weights"
            )
        return weights

    def _set(self, forward: Forward, weights: Tensor | None, inputs: dict[str, Any]) -> None:
        super()._set(forward, weights, inputs)
        if forward.segments is not None:
            raise RuntimeError(
                f"position_ids: got {len(forward.segments)} texts in {forward.segments.shape[0]} "
                "rows, but a row has one set of weights: give it a padded batch"
            )

    @property
    def cosines(self) -> Tensor | None:
        """[B, N], by which this thread's last forward chose, with gradient to the keys; or None."""
        return getattr(self._thread, "cosines", None)

    @cosines.setter
    def cosines(self, value: Tensor | None) -> None:
        self._thread.cosines = value

    def _chosen(
        self, forward: Forward, inputs: dict[str, Any], given: Tensor | None
    ) -> Tensor | None:
        self.cosines = None  # those of an earlier forward
        return super()._chosen(forward, inputs, given)

    @property
    def queries(self) -> Tensor | None:
        """[B, D] that replace those of the inputs, in this thread; None for none."""
        return getattr(self._thread, "queries", None)

    @contextmanager
    def use_queries(self, queries: Tensor) -> Iterator[None]:
        """Replaces the queries of the inputs while the context lasts, in this thread."""
        before, self._thread.queries = self.queries, queries
        try:
            yield
        finally:
            self._thread.queries = before
