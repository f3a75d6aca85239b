"""Identifies the base model of a checkpoint by its type, its layers and some of its weights."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sapt_fast.devices import present_weight
from sapt_fast.pools.sharding import unsharded_class, whole
from sapt_fast.sites.linear import is_torchao, packed_weight
from sapt_fast.sites.towers import input_layer

__all__ = ["describe_base", "require_base", "require_model_type"]

_SAMPLES = 64


def describe_base(
    model: Any,
    layers: Mapping[str, tuple[int, int]],
    state: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Returns a JSON-ready description that identifies a base model.

    Args:
        model: the model.
        layers: (in_features, out_features) of each layer that has adapters, by its path.
        state: the model's state_dict, used instead of its parameters (which may be sharded).
    """
    return {
        "class": unsharded_class(model).__name__,
        "name_or_path": model.name_or_path,
        "model_type": model.config.model_type,
        "layers": {path: list(features) for path, features in layers.items()},
        "weights": _samples(model, list(layers), state or {}),
    }


def require_model_type(model: Any, saved: Any, source: Path) -> None:
    """Raises ValueError unless the model has the saved model type."""
    try:
        model_type = saved["model_type"]
    except (KeyError, TypeError) as error:
        raise _incomplete(source, error) from error
    if model_type != model.config.model_type:
        raise _mismatch(model, saved, source, f"its model type is {model.config.model_type}")


def require_base(
    model: Any,
    layers: Mapping[str, tuple[int, int]],
    saved: Any,
    source: Path,
    trained: Collection[str] = (),
) -> None:
    """Raises ValueError unless `saved` describes this model, up to the rounding of another dtype.

    Args:
        model, layers: as in `describe_base`.
        saved: the return value of `describe_base` for the saved model.
        source: the file that contains it, for messages.
        trained: names of parameters that the checkpoint contains; their values may differ.
    """
    try:
        saved_layers = {path: tuple(features) for path, features in saved["layers"].items()}
        weights = {
            name: (list(weight["shape"]), _floats(weight["values"]))
            for name, weight in saved["weights"].items()
        }
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise _incomplete(source, error) from error
    for path in sorted({**layers, **saved_layers}):
        here, there = layers.get(path), saved_layers.get(path)
        if here != there:
            reason = f"(in, out) features of layer {path}: got {here}, expected {there}"
            raise _mismatch(model, saved, source, reason)
    for name, sample in _samples(model, list(layers), {}).items():
        shape, values = weights.get(name, (None, torch.empty(0)))
        found = _floats(sample["values"])
        if shape != sample["shape"] or values.shape != found.shape:
            reason = f"shape of {name}: got {sample['shape']}, expected {shape}"
            raise _mismatch(model, saved, source, reason)
        place = _place(model) if name == "input embedding" else name
        if f"{place}.weight" in trained:
            continue
        if not torch.allclose(found, values, rtol=2**-7, atol=1e-6, equal_nan=True):
            reason = f"{name} has the same shape but other values"
            raise _mismatch(model, saved, source, reason)


def _floats(values: Any) -> Tensor:
    """Converts JSON numbers to a float64 tensor; null becomes NaN."""
    return torch.tensor([math.nan if x is None else x for x in values], dtype=torch.float64)


def _samples(
    model: Any, paths: list[str], state: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """Returns sampled values of the input embedding, and of the first and last layer.

    Quantised layers are left out.
    """
    embedding = input_layer(model)
    weights = {"input embedding": _weight(_place(model), embedding, state)}
    for path in (paths[0], paths[-1]):
        layer = model.get_submodule(path)
        if packed_weight(layer) is None and not is_torchao(layer.weight):
            weights[path] = _weight(path, layer, state)
    samples = {}
    for name, weight in weights.items():
        held = whole(weight)
        flat = held.reshape(-1)
        index = [i * (flat.numel() - 1) // (_SAMPLES - 1) for i in range(_SAMPLES)]
        found = flat[torch.tensor(index, device=flat.device)].double().tolist()
        values = [x if math.isfinite(x) else None for x in found]
        samples[name] = {"shape": list(held.shape), "values": values}
    return samples


def _place(model: Any) -> str:
    """Returns the path of the input embedding."""
    embedding = input_layer(model)
    return next((name for name, module in model.named_modules() if module is embedding), "")


def _weight(path: str, module: Any, state: Mapping[str, Tensor]) -> Tensor:
    """Returns a module's weight, from the state_dict if it contains the weight."""
    held = state.get(f"{path}.weight")
    return present_weight(module) if held is None else held


def _mismatch(model: Any, saved: Any, source: Path, reason: str) -> ValueError:
    stated = f"{saved.get('class')} {saved.get('name_or_path')!r}"
    return ValueError(
        f"model: this {type(model).__name__} is another base model than the {stated} with which "
        f"{source.parent} was saved: {reason}"
    )


def _incomplete(source: Path, error: Exception) -> ValueError:
    return ValueError(f"{source}: base_model is incomplete ({error!r})")
