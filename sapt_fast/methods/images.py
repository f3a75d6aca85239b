"""Handles of methods whose queries are those of images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sapt_fast.methods.queried import QueryHandle
from sapt_fast.routing.images import ImageRouting
from sapt_fast.sites.image_embeddings import vision_parts
from sapt_fast.sites.image_queries import ImageQueries

__all__ = ["ImageHandle"]


class ImageHandle(QueryHandle):
    """`QueryHandle` of a vision transformer: the frozen model computes the queries of images."""

    inputs = "images"
    routing: ImageRouting

    @classmethod
    def settled(cls, model: Any, config: Any) -> Any:
        """Returns the config, which trains and saves the classifier unless it names modules."""
        parts = vision_parts(model)
        if config.modules_to_save is not None or parts.classifier is None:
            return config
        name = next(n for n, m in model.named_modules() if m is parts.classifier)
        return replace(config, modules_to_save=[name])

    def install(self) -> None:
        """Adds the hooks and unfreezes the `modules_to_save`; called by `patch`."""
        self.routing.tower = self._parts.tower
        super().install()

    def _new_queries(self) -> Any:
        config = self.config
        queries = ImageQueries(self._model, config.query_layer, config.query_pooling)
        self._parts = queries.parts
        return queries

    def query(self, pixel_values: Any, interpolate_pos_encoding: bool | None = None) -> Tensor:
        """Returns the queries [B, D] of images, by the model without the method; no gradient.

        Args:
            pixel_values: [B, C, H, W].
            interpolate_pos_encoding: as passed to the model.

        Raises:
            TypeError, ValueError: if the images do not fit the model.
            ValueError: inside `queries`, if they are those of another number of images.
            RuntimeError: after loading, if `look_up_by` has to be called.
        """
        self._parts.require_images(pixel_values, bool(interpolate_pos_encoding))
        return self._queried(
            len(pixel_values), lambda: self._queries(pixel_values, bool(interpolate_pos_encoding))
        )

    def look_up_by(self, encoder: nn.Module) -> None:
        """Lets another frozen model compute the queries; call it before the first task.

        The encoder is not saved: call this after loading, too.

        Args:
            encoder: in eval mode, takes pixel_values [B, C, H, W] and returns [B, D].

        Raises:
            ValueError, RuntimeError: if the encoder is in training mode, or returns something else.
            RuntimeError: if there are keys of another width.
        """
        images = ImageQueries(self._model, encoder=encoder)
        width = images.width
        if self.tasks and width != self.query_width:
            raise RuntimeError(
                f"encoder: got queries of width {width}, expected {self.query_width}, that of the "
                "keys"
            )
        if width != self.query_width:
            self.set_query_width(width)
        self._queries, self._encoder_is_missing = images, False
