"""Tiny vision transformers of every supported type, with random weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers

WIDTH, SIZE, PATCH, CLASSES = 16, 12, 4, 5
PATCHES = (SIZE // PATCH) ** 2
_VIT = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
}
_TEXT = {**_VIT, "vocab_size": 9, "num_hidden_layers": 1, "max_position_embeddings": 4}
_BIASED = {"use_relative_position_bias": True, "use_absolute_position_embeddings": True}
_BEIT = {"drop_path_rate": 0.0}


def _vit(prefix: str, **changed: Any) -> Any:
    config = getattr(transformers, f"{prefix}Config")(**{**_VIT, **changed}, num_labels=CLASSES)
    return getattr(transformers, f"{prefix}ForImageClassification")(config)


def _dual(prefix: str) -> Any:
    config = getattr(transformers, f"{prefix}Config")(
        vision_config=_VIT, text_config=_TEXT, num_labels=CLASSES
    )
    return getattr(transformers, f"{prefix}ForImageClassification")(config)


VISION: dict[str, Callable[[], Any]] = {
    "vit": partial(_vit, "ViT"),
    "deit": partial(_vit, "DeiT"),
    "beit": partial(_vit, "Beit", **_BEIT, **_BIASED, use_mean_pooling=True),
    "beit_shared": partial(
        _vit, "Beit", **_BEIT, use_shared_relative_position_bias=True, use_mean_pooling=False
    ),
    "dinov2": partial(_vit, "Dinov2"),
    "registers": partial(_vit, "Dinov2WithRegisters", num_register_tokens=2),
    "clip": partial(_dual, "CLIP"),
    "siglip": partial(_dual, "Siglip"),
}


def vision_model(family: str, seed: int = 0) -> Any:
    """A tiny model with a classifier, every weight random, in eval mode."""
    torch.manual_seed(seed)
    model = VISION[family]()
    with torch.no_grad():
        for parameter in model.parameters():  # many start at 0 or 1
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def images(count: int = 3, size: int = SIZE, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator)
