"""Queries of images: the features by which prompts are chosen, of a frozen model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.sites.features import bare
from sapt_fast.sites.image_embeddings import vision_parts

__all__ = ["ImageQueries"]

POOLINGS = ("cls", "mean")


class ImageQueries:
    """The features [B, D] of images, computed by a frozen model as a function of pixel_values.

        q(x) = h_0 ("cls")  or  q(x) = 1 / |P| sum_{p in P} h_p ("mean", P the patches)

    The model runs as its base model: what methods have added (adapters, prompts, hooks) takes no
    part, and dropout is off. So the queries do not move while a method trains, and may be computed
    inside a forward of the model. Layers above `layer` do not run.

    Args:
        model: a model with a vision tower that `vision_parts` knows, patched or not. It is not
            copied.
        layer: number of encoder layers that run, 1 to all of them; their output is pooled without
            the last norm. None: all, with the last norm.
        pooling: "cls" or "mean"; None for "cls", or for "mean" if the model has no CLS (SigLIP).
        encoder: a frozen module in eval mode that takes pixel_values [B, C, H, W] and returns
            [B, D]; it then computes the queries, without the model. `layer` and `pooling` must be
            None.

    Raises:
        ValueError: if the model has no vision tower, or not so many layers.
        ValueError: if the model has no CLS to pool by.
        ValueError: if `layer` or `pooling` is given with an encoder.

    Example:
        >>> import torch, transformers
        >>> from sapt_fast.sites.image_queries import ImageQueries
        >>> config = transformers.ViTConfig(
        ...     image_size=16, patch_size=8, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=2, num_attention_heads=2)
        >>> model = transformers.ViTModel(config).requires_grad_(False)
        >>> ImageQueries(model, layer=1, pooling="mean")(torch.randn(3, 3, 16, 16)).shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        model: Any,
        layer: int | None = None,
        pooling: str | None = None,
        encoder: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        parts = vision_parts(model)
        count = len(parts.layers)
        if layer is not None and (type(layer) is not int or not 1 <= layer <= count):
            raise ValueError(f"layer: got {layer!r}, expected 1 to {count} (layers), or None")
        if pooling not in (None, *POOLINGS):
            raise ValueError(f"pooling: got {pooling!r}, expected one of {POOLINGS}, or None")
        if pooling == "cls" and not parts.has_cls:
            raise ValueError(
                f"pooling: got 'cls' for {type(parts.tower).__name__}, which has no CLS token; "
                "expected 'mean'"
            )
        if encoder is not None and (layer, pooling) != (None, None):
            raise ValueError(
                f"encoder: got one with layer={layer} and pooling={pooling!r}, expected None for "
                "both: the encoder pools its own features"
            )
        self.model = model
        self.layer = layer
        self.parts = parts
        self.pooling = pooling or ("cls" if parts.has_cls else "mean")
        self.encoder = encoder
        self._width: int | None = None if encoder is not None else parts.width
        self._copy: Any = None

    @property
    def width(self) -> int:
        """D. Of an encoder it is found by running it on one image of zeros."""
        if self._width is None:
            size = (1, self.parts.channels, *self.parts.image_size)
            self._width = self(torch.zeros(size, device=self.model.device)).shape[1]
        return self._width

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Computes the queries [B, D], without gradient, in float32 (float64 for float64 models).

        Under autocast, the layers compute in its dtype.

        Args:
            pixel_values: [B, C, H, W].
            interpolate_pos_encoding: interpolate the positions for images of another size; of
                an encoder it has no effect.

        Raises:
            TypeError, ValueError: if the images do not fit the model.
            RuntimeError: if the model, or the encoder, is not frozen.
        """
        if self.encoder is not None:
            return _wide(self._encoded(pixel_values))
        return self.pooled(self.hidden(pixel_values, interpolate_pos_encoding))

    @torch.no_grad()
    def hidden(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Returns the hidden states [B, prefix + patches, D] that are pooled.

        Args, Raises: as `__call__`.
        """
        self.parts.require_images(pixel_values, bool(interpolate_pos_encoding))
        tower, norm = self._frozen()
        options = {}
        if interpolate_pos_encoding and _interpolates(self.parts.tower):
            options["interpolate_pos_encoding"] = True
        states: Tensor = tower(pixel_values, **options).last_hidden_state
        if self.layer is None:
            states = norm(states)
        return states

    def pooled(self, hidden: Tensor) -> Tensor:
        """Returns the queries [B, D] of hidden states [B, prefix + patches, D]."""
        wide = _wide(hidden[:, 0] if self.pooling == "cls" else hidden[:, self.parts.prefix :])
        return wide.detach() if self.pooling == "cls" else wide.mean(1).detach()

    def _frozen(self) -> tuple[Any, Any]:
        """Returns the tower up to `layer`, whose output is not normed, and the last norm."""
        if self._copy is None:
            parts = self.parts
            kept = [bare(block) for block in [*parts.layers][: self.layer]]
            tower = bare(parts.tower, parts.layers, nn.ModuleList(kept).eval())
            for name in ("layernorm", "post_layernorm"):
                if name in tower._modules:
                    tower._modules[name] = nn.Identity()
            for name in ("pooler", "head"):  # which would run for nothing
                if name in tower._modules:
                    tower._modules[name] = None
            if hasattr(tower, "use_head"):
                tower.use_head = False
            self._copy = tower, bare(parts.norm)
        for part in self._copy if self.layer is None else self._copy[:1]:
            self._require_frozen(part)
        frozen: tuple[Any, Any] = self._copy
        return frozen

    def require_frozen(self) -> None:
        """Raises RuntimeError if parameters that compute the queries train."""
        if self.encoder is None:
            self._frozen()

    def _require_frozen(self, part: Any) -> None:
        if torch.compiler.is_compiling():
            return  # an eager forward looks
        for name, parameter in part.named_parameters():
            if parameter.requires_grad:
                paths = {id(p): path for path, p in self.model.named_parameters()}
                raise RuntimeError(
                    f"model: {paths.get(id(parameter), name)} requires a gradient, but queries "
                    "must not change while the model trains: freeze it, or let another model "
                    "compute the queries (encoder=ImageQueries(frozen_copy); of a handle "
                    "look_up_by(ImageQueries(frozen_copy)))"
                )

    def _encoded(self, pixel_values: Tensor) -> Tensor:
        encoder: Any = self.encoder
        if getattr(encoder, "training", False):
            raise RuntimeError("encoder: got a module in training mode, expected encoder.eval()")
        query = encoder(pixel_values)
        if not isinstance(query, Tensor) or query.dim() != 2 or len(query) != len(pixel_values):
            shaped = isinstance(query, Tensor)
            got = f"shape {tuple(query.shape)}" if shaped else type(query).__name__
            raise ValueError(f"encoder: got {got}, expected [{len(pixel_values)}, D]")
        return query

    # The copy shares its tensors with the model: a copy of the model makes its own.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copy": None}


def _interpolates(tower: Any) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
