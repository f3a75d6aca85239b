"""The layers that edits replace by default, and their widths."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

__all__ = ["default_targets", "device_of", "in_decoder", "widths_of"]

# The last projection of the MLP of each block, by its path.
_LAST = (
    r"decoder\.block\.(\d+)\.layer\.2\.DenseReluDense\.wo",  # T5
    r".*\bdecoder\.layers\.(\d+)\.fc2",  # BART, OPT
    r".*\bencoder\.layers?\.(\d+)\.output\.dense",  # BERT
    r".*\bh\.(\d+)\.mlp\.(?:c_proj|dense_4h_to_h)",  # GPT-2, BLOOM
    r".*\blayers\.(\d+)\.mlp\.(?:down_proj|dense_4h_to_h|fc2)",  # LLaMA-like, GPT-NeoX, Phi
)
_DEPTH = 0.73  # of the blocks of a decoder, as in the released GRACE: 35 of GPT2-XL's 48


def default_targets(model: Any, depth: float = _DEPTH) -> tuple[str, ...]:
    """Returns the layer to edit: the last projection of the MLP of one block.

    In a decoder it is the block at `depth`, in an encoder-only model the one before the last.
    Blocks behind it have to read the value, so it is never the last of several.

    Raises:
        ValueError: if the model has no layer of a known name.
    """
    names = [name for name, _ in model.named_modules()]
    for pattern in _LAST:
        found = {int(m[1]): m[0] for name in names if (m := re.fullmatch(pattern, name))}
        if found:
            index = max(0, len(found) - 2)
            if model.can_generate():
                index = min(index, round(depth * len(found)))
            return (found[sorted(found)[index]],)
    raise ValueError(
        f"target_modules: no default is known for {type(model).__name__}; name the layer to edit, "
        "for example the last projection of an MLP at two thirds of the depth"
    )


def in_decoder(model: Any, path: str) -> bool:
    """Returns whether a layer is in the decoder of an encoder-decoder model."""
    if not getattr(model.config, "is_encoder_decoder", False):
        return False
    return any(module is model.get_submodule(path) for module in model.get_decoder().modules())


def device_of(layer: nn.Module, path: str) -> torch.device:
    """Returns a layer's device; raises ValueError if it has no weights (meta, offloaded)."""
    device = next(layer.parameters()).device
    if device.type == "meta":
        raise ValueError(
            f"target_modules: got {path}, whose weights are on the meta device or offloaded, "
            "expected a layer with weights"
        )
    return device


def widths_of(layer: nn.Module, path: str) -> tuple[int, int]:
    """Returns the widths of a layer's input and output.

    Raises:
        ValueError: if they cannot be told.
    """
    given: Any = layer
    if hasattr(given, "in_features") and hasattr(given, "out_features"):
        return given.in_features, given.out_features
    weight = getattr(given, "weight", None)
    if hasattr(given, "nf") and weight is not None:  # transformers' Conv1D
        return weight.shape[0], given.nf
    raise ValueError(
        f"target_modules: got {path}, a {type(layer).__name__}, expected a linear layer"
    )
