"""Generated images of patterns and a tiny random vision transformer, which need no files."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

__all__ = ["DEMO_CLASSES", "DEMO_IMAGE_SIZE", "demo_image", "demo_vision_model"]

DEMO_IMAGE_SIZE = 16
DEMO_CLASSES = ("checks", "columns", "frame", "left", "rows", "upper")
_NOISE = 40.0
_CELLS = 4


def demo_vision_model(classes: int, dtype: torch.dtype = torch.float32) -> Any:
    """Returns a ViT with two layers of width 32, the same random weights every time.

    Args:
        classes: number of rows of its head.
        dtype: of its weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ViTConfig(  # type: ignore[call-arg]  # some fields are only known to its parents
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=DEMO_IMAGE_SIZE,
            patch_size=4,
            num_labels=classes,
            initializer_range=0.2,
        )
        model: Any = ViTForImageClassification(config)
        return model.to(dtype).eval()


def demo_image(label: str, seed: str) -> Image.Image:
    """Returns an RGB image of a class's pattern, in a random colour, with noise.

    Args:
        label: one of `DEMO_CLASSES`.
        seed: what is random.
    """
    draw = np.random.default_rng([ord(letter) for letter in f"{label}/{seed}"])
    row, column = np.indices((_CELLS, _CELLS))
    edge = _CELLS - 1
    pattern = {
        "checks": (row + column) % 2,
        "columns": column % 2,
        "frame": (row % edge == 0) | (column % edge == 0),
        "left": column < _CELLS // 2,
        "rows": row % 2,
        "upper": row < _CELLS // 2,
    }[label]
    whole = np.kron(pattern, np.ones((DEMO_IMAGE_SIZE // _CELLS,) * 2))[..., None]
    values = whole * draw.uniform(120, 200, 3) + draw.normal(20, _NOISE, (*whole.shape[:2], 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))
