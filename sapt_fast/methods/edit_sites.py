"""The layers that edits replace by default, and their widths."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

__all__ = ["default_targets", "in_decoder", "widths_of"]

# Last projections of MLPs, as the model's path behind the block's number.
_LAST = (
    r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo",  # T5
    r".*\bencoder\.layers?\.(\d+)\.(?:output\.dense|fc2)",  # BERT, BART
    r".*\bh\.(\d+)\.mlp\.(?:c_proj|dense_4h_to_h)",  # GPT-2, BLOOM
    r".*\blayers\.(\d+)\.mlp\.(?:down_proj|dense_4h_to_h|fc2)",  # LLaMA-like, GPT-NeoX, Phi
    r".*\bdecoder\.layers\.(\d+)\.fc2",  # OPT
)
_CAUSAL_DEPTH = 0.73  # of the released layers: 35 of GPT2-XL's 48


def default_targets(model: Any) -> tuple[str, ...]:
    """Returns the layer to edit: the last projection of one MLP.

    In an encoder it is that of the block before the last, in a decoder-only model that at 0.73 of
    the depth: blocks behind it have to read the value.

    Raises:
        ValueError: if the model has no layer of a known name.
    """
    names = [name for name, _ in model.named_modules()]
    for pattern in _LAST:
        found = {int(m[1]): m[0] for name in names if (m := re.fullmatch(pattern, name))}
        if found:
            depth = len(found)
            index = max(0, depth - 2)
            if model.can_generate() and not getattr(model.config, "is_encoder_decoder", False):
                index = min(index, round(_CAUSAL_DEPTH * depth))
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
