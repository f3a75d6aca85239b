"""Finds the parts of a vision transformer between which prompts enter and leave.

Supported are the towers of ViT, DeiT, BEiT, DINOv2 (with and without registers), CLIP and SigLIP,
alone or inside a larger model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["VisionParts", "reads_images", "vision_parts"]


@dataclass(frozen=True)
class _Kind:
    """What the code of a tower does.

    Attributes:
        prefix: rows before the patches, without registers.
        resizes: whether positions are interpolated for images of any size without being asked to.
    """

    prefix: int
    resizes: bool


_VIT, _CLIP = _Kind(1, False), _Kind(1, False)
# By the name of the tower's class; earlier transformers have the second name of CLIP and SigLIP.
_TOWERS = {
    "ViTModel": _VIT,
    "DeiTModel": _Kind(2, False),
    "BeitModel": _Kind(1, True),
    "Dinov2Model": _Kind(1, True),
    "Dinov2WithRegistersModel": _Kind(1, True),
    "CLIPVisionModel": _CLIP,
    "CLIPVisionTransformer": _CLIP,
    "SiglipVisionModel": _Kind(0, False),
    "SiglipVisionTransformer": _Kind(0, False),
}
# The classes whose classifier reads the tower's output, in a way that is known here.
_CLASSIFIERS = {
    f"{name}ForImageClassification"
    for name in ("ViT", "DeiT", "Beit", "Dinov2", "Dinov2WithRegisters", "CLIP", "Siglip")
}
_LAYERS = ("layers", "encoder.layer", "encoder.layers")


@dataclass(frozen=True)
class VisionParts:
    """The parts of a vision tower.

    Attributes:
        path: the tower's path in the model; "" if the model is the tower.
        tower: the module that takes pixel_values [B, C, H, W] and returns the hidden states.
        embeddings: its embeddings, which return [B, prefix + patches, D].
        layers: its encoder layers.
        norm: the last norm, of rows [..., D]; what the tower applies to its last layer's output, or
            to what it pools of that output.
        pre_norm: the norm between embeddings and first layer (CLIP); None if there is none.
        classifier: the layer that predicts classes; None unless the model is one of the towers'
            own image classifiers.
        prefix: number of rows before the patches: CLS, distillation token, registers.
        width: D.
        image_size: (H, W) of the images that the positions are made for.
        patch_size: (H, W) of a patch.
        channels: C.
        resizes: whether positions are interpolated for images of any size without being asked to.
    """

    path: str
    tower: Any
    embeddings: Any
    layers: nn.ModuleList
    norm: nn.Module
    pre_norm: nn.Module | None
    classifier: nn.Module | None
    prefix: int
    width: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    channels: int
    resizes: bool

    @property
    def has_cls(self) -> bool:
        """Whether the first row is CLS."""
        return self.prefix > 0

    def layers_path(self) -> str:
        """Returns the path of `layers` in the model."""
        inside = next(n for n, m in self.tower.named_modules() if m is self.layers)
        return f"{self.path}.{inside}" if self.path else inside

    def cls_position(self) -> Tensor | None:
        """Returns the position embedding [D] of CLS; None if the model has none."""
        embeddings = self.embeddings
        table = getattr(embeddings, "position_embeddings", None)
        if table is None and hasattr(embeddings, "position_embedding"):
            table = embeddings.position_embedding.weight[None]
        if table is None or not self.has_cls:
            return None
        position: Tensor = table[0, 0]
        return position

    def has_dropout(self) -> bool:
        """Returns whether the tower drops values at random in training."""
        rates = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout",
                 "drop_path_rate", "dropout")  # fmt: skip
        return any(getattr(self.tower.config, name, 0) for name in rates)

    def require_images(self, pixel_values: object, interpolate: bool = False) -> Tensor:
        """Returns the images, if they are [B, C, H, W] of channels and a size that the model takes.

        Args:
            pixel_values: the images.
            interpolate: whether the model is asked to interpolate its positions.

        Raises:
            TypeError: if they are no tensor of floats.
            ValueError: if their shape does not fit.
        """
        if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
            is_tensor = isinstance(pixel_values, Tensor)
            got = getattr(pixel_values, "dtype", "") if is_tensor else type(pixel_values).__name__
            raise TypeError(f"pixel_values: got {got}, expected a tensor of floats [B, C, H, W]")
        shape, (height, width) = tuple(pixel_values.shape), self.image_size
        if len(shape) != 4 or shape[1] != self.channels:
            raise ValueError(
                f"pixel_values: got shape {shape}, expected [B, {self.channels}, H, W]: the model "
                f"takes images of {self.channels} channels"
            )
        if shape[2] < self.patch_size[0] or shape[3] < self.patch_size[1]:
            raise ValueError(
                f"pixel_values: got images of {shape[2]} x {shape[3]}, expected at least one patch "
                f"of {self.patch_size[0]} x {self.patch_size[1]}"
            )
        if shape[2:] != self.image_size and not (interpolate or self.resizes):
            raise ValueError(
                f"pixel_values: got images of {shape[2]} x {shape[3]}, expected {height} x {width},"
                " for which the model has positions; resize them, or pass "
                "interpolate_pos_encoding=True"
            )
        return pixel_values


def reads_images(model: Any) -> bool:
    """Returns whether a model takes images: it generates no text, and pixel_values are its input.

    A model of images and texts without generation (CLIP) takes images by its vision tower.
    """
    if model.can_generate():
        return False
    return getattr(model, "main_input_name", "") == "pixel_values" or bool(_towers(model))


def vision_parts(model: Any) -> VisionParts:
    """Finds the parts of a model's vision tower.

    Args:
        model: a transformers model of images, its tower, or a model that contains one.

    Raises:
        ValueError: if the model contains no supported tower, or several.
    """
    found = _towers(model)
    if len(found) != 1:
        described = "no" if not found else f"{len(found)}"
        raise ValueError(
            f"model: got {type(model).__name__} (model type {model.config.model_type!r}) with "
            f"{described} vision transformers, expected one of a supported type: "
            f"{', '.join(name for name in _TOWERS if name.endswith('Model'))}, alone or in a model"
        )
    (path, tower, kind), config = found[0], found[0][1].config
    classifies = any(kind.__name__ in _CLASSIFIERS for kind in type(model).__mro__)
    classifier: Any = model.classifier if classifies else None
    return VisionParts(
        path=path,
        tower=tower,
        embeddings=tower.embeddings,
        layers=_first(tower, _LAYERS),
        norm=_last_norm(tower),
        pre_norm=getattr(tower, "pre_layrnorm", None),
        classifier=classifier if isinstance(classifier, nn.Linear) else None,
        prefix=kind.prefix + getattr(config, "num_register_tokens", 0),
        width=config.hidden_size,
        image_size=_pair(config.image_size),
        patch_size=_pair(config.patch_size),
        channels=config.num_channels,
        resizes=kind.resizes,
    )


def _towers(model: Any) -> list[tuple[str, Any, _Kind]]:
    found = []
    for path, module in model.named_modules():
        names = [kind.__name__ for kind in type(module).__mro__]
        name = next((name for name in names if name in _TOWERS), None)
        if name is not None and hasattr(module, "embeddings"):
            found.append((path, module, _TOWERS[name]))
    return found


def _first(tower: Any, paths: tuple[str, ...]) -> Any:
    modules = dict(tower.named_modules())
    return next(modules[path] for path in paths if path in modules)


def _last_norm(tower: Any) -> Any:
    """The norm of the hidden states; BEiT with mean pooling has it behind its pooling."""
    norm = _first(tower, ("layernorm", "post_layernorm"))
    pooler = getattr(tower, "pooler", None)
    inside = getattr(pooler, "layernorm", None)
    return inside if isinstance(norm, nn.Identity) and inside is not None else norm


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
