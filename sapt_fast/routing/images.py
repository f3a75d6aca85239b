"""Weights of a forward that come from its images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sapt_fast.routing.forward import Forward
from sapt_fast.routing.hooks import Routing

__all__ = ["ImageRouting"]

_READ = ("pixel_values", "interpolate_pos_encoding")


class ImageRouting(Routing):
    """`Routing` whose router reads pixel_values [B, C, H, W].

    Attributes:
        tower: the vision tower, which may be called on its own; None for the base model.
    """

    tower: Any = None

    def roots(self) -> tuple[Any, ...]:
        """The model with its head, and the tower inside it.

        Of a model that also takes texts, whose rows are not those of the images, only the tower.
        """
        if self.tower is None:
            return super().roots()
        takes_images = getattr(self.model, "main_input_name", "") == "pixel_values"
        return (self.model, self.tower) if takes_images else (self.tower,)

    def _routed(self, forward: Forward, module: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
        return self.router.route(**image_inputs(inputs)) if self.routes else None

    def checked(self, weights: Tensor) -> Tensor:
        """As `Running.checked`, without weights per token."""
        weights = super().checked(weights)
        if weights.dim() == 3:
            count = self.count()
            raise ValueError(
                f"weights: got shape {tuple(weights.shape)}, expected [{count}] or [B, {count}]: "
                "an image has one set of weights"
            )
        return weights

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
        """[B, D] that replace those of the images, in this thread; None for none."""
        return getattr(self._thread, "queries", None)

    @contextmanager
    def use_queries(self, queries: Tensor) -> Iterator[None]:
        """Replaces the queries of the images while the context lasts, in this thread."""
        before, self._thread.queries = self.queries, queries
        try:
            yield
        finally:
            self._thread.queries = before


def image_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a router of images reads among the arguments of a forward."""
    return {name: inputs.get(name) for name in _READ}
