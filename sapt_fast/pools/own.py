"""Distinguishes the modules that methods add to a model from the model's own."""

from collections.abc import Collection

from torch import nn


class Own:
    """The base class of modules that a method adds; they are not part of the base model."""


def own_paths(model: nn.Module) -> list[str]:
    """Returns the paths of the outermost modules that methods added to a model."""
    paths: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, Own) and not is_inside(path, paths):
            paths.append(path)
    return paths


def is_inside(name: str, paths: Collection[str]) -> bool:
    """Returns whether a module's path, or a tensor's name, is one of these paths or below one."""
    start = f"{name}."
    return any(start.startswith(f"{path}.") for path in paths)
