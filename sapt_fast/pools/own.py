"""What tells the modules that methods add to a model from the model's own."""

from collections.abc import Collection

from torch import nn


class Own:
    """A module that a method adds to a model: no part of the base model, nor what is in it."""


def own_paths(model: nn.Module) -> list[str]:
    """The paths of the modules that methods added to a model, without those inside of them."""
    paths: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, Own) and not is_inside(path, paths):
            paths.append(path)
    return paths


def is_inside(name: str, paths: Collection[str]) -> bool:
    """Whether a module's path, or a tensor's name, is one of these paths or below one of them."""
    start = f"{name}."
    return any(start.startswith(f"{path}.") for path in paths)
