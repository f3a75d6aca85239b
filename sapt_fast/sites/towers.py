"""Finds a model's token embeddings, and the models inside it."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def token_embedding(model: Any) -> Any:
    """Returns the table of token embeddings, which the router reads.

    Raises:
        ValueError: if the model has none; image and audio models do not.
    """
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    if isinstance(embedding, nn.Embedding):
        return embedding
    found = "none" if embedding is None else f"a {type(embedding).__name__}"
    raise ValueError(
        f"model: got {type(model).__name__} (model type {model.config.model_type!r}) with {found} "
        "as its input embeddings, expected a table of token embeddings (nn.Embedding), which the "
        "router reads. For a model without one, add LoRA adapters with peft.get_peft_model, patch "
        "that PeftModel, and pass the weights: model(..., mixture=weights) or "
        "model.sapt.fixed(weights)"
    )


def input_layer(model: Any) -> Any:
    """Returns the layer that reads the inputs: token embeddings, or the projection of patches.

    Raises:
        ValueError: if the model has neither.
    """
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    if hasattr(embedding, "weight"):
        return embedding
    inside = model if embedding is None else embedding
    patches = next((m for m in inside.modules() if isinstance(m, nn.Conv2d)), None)
    return token_embedding(model) if patches is None else patches


def input_width(model: Any) -> int:
    """Returns D, the width of the embeddings of tokens or patches."""
    layer = input_layer(model)
    width: int = layer.weight.shape[0 if isinstance(layer, nn.Conv2d) else 1]
    return width


def tower_notes(model: PreTrainedModel, patched: Iterable[str]) -> list[str]:
    """Returns a note if layers of one name were patched in several parts of a model, else none.

    Args:
        model: the model.
        patched: paths of patched layers, relative to the model.
    """
    towers = _towers(model)
    counts: dict[str, Counter[str]] = {}
    for path in patched:
        tower = next((t for t in towers if path.startswith(f"{t}.")), "")
        counts.setdefault(path.rpartition(".")[2], Counter())[tower] += 1
    several = {name: by_tower for name, by_tower in counts.items() if len(by_tower) > 1}
    if not several:
        return []
    total = sum(several.values(), Counter[str]())
    where = ", ".join(f"{tower or 'the rest'} ({count})" for tower, count in total.items())
    name = min(several)
    tower = re.escape(next(reversed(several[name])))
    return [
        f"target_modules: layers named {', '.join(sorted(several))} were patched in several parts "
        f"of the model: {where}. To patch only one part, pass a regular expression for the whole "
        f"path, such as target_modules=r'{tower}\\..*\\.{name}'"
    ]


def _towers(model: PreTrainedModel) -> list[str]:
    """Returns the paths of the outermost models of another type inside a model."""
    towers: list[str] = []
    kind = model.config.model_type
    for path, module in model.named_modules():
        inner = isinstance(module, PreTrainedModel) and module.config.model_type != kind
        if inner and not any(path.startswith(f"{tower}.") for tower in towers):
            towers.append(path)
    return towers
