"""What a model consists of: its table of token embeddings, and the models that it is built from."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def token_embedding(model: Any) -> Any:
    """The table of token embeddings, by which inputs are routed.

    Raises:
        ValueError: the model has none, as image and audio models.
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
        "as its input embeddings, expected a table of token embeddings (nn.Embedding), by which "
        "inputs are routed. For a model without one, add LoRA adapters with peft.get_peft_model, "
        "patch that PeftModel, and give the weights: model(..., mixture=weights) or "
        "model.sapt.fixed(weights)"
    )


def tower_notes(model: PreTrainedModel, patched: Iterable[str]) -> list[str]:
    """A note for each layer name that was patched in several of a model's towers.

    Args:
        patched: paths of layers, relative to the model.
    """
    towers = _towers(model)
    counts: dict[str, dict[str, int]] = {}
    for path in patched:
        tower = next((t for t in towers if path.startswith(f"{t}.")), "")
        by_tower = counts.setdefault(path.rpartition(".")[2], {})
        by_tower[tower] = by_tower.get(tower, 0) + 1
    notes = []
    for name, by_tower in counts.items():
        if len(by_tower) > 1:
            where = ", ".join(f"{t or 'the rest'} ({n})" for t, n in by_tower.items())
            pattern = rf"{max(by_tower)}\..*\.{name}"
            notes.append(
                f"target_modules: layers named {name!r} were patched in several parts of the "
                f"model: {where}. To patch one part only, give target_modules as a regular "
                f"expression for the whole path, such as {pattern!r}"
            )
    return notes


def _towers(model: PreTrainedModel) -> list[str]:
    """The paths of the outermost models of another type inside a model."""
    towers: list[str] = []
    kind = model.config.model_type
    for path, module in model.named_modules():
        inner = isinstance(module, PreTrainedModel) and module.config.model_type != kind
        if inner and not any(path.startswith(f"{tower}.") for tower in towers):
            towers.append(path)
    return towers
