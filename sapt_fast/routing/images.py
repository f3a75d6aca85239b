"""Weights of a forward that come from its images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sapt_fast.routing.forward import Forward
from sapt_fast.routing.queries import QueryRouting

__all__ = ["ImageRouting"]

_READ = ("pixel_values", "interpolate_pos_encoding")


class ImageRouting(QueryRouting):
    """`QueryRouting` whose router reads pixel_values [B, C, H, W].

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


def image_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a router of images reads among the arguments of a forward."""
    return {name: inputs.get(name) for name in _READ}
