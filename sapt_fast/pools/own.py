"""Distinguishes the modules that methods add to a model from the model's own."""

from collections.abc import Callable, Set

from torch import Tensor, nn


class Own:
    """The base class of modules that a method adds; they are not part of the base model."""


def own_paths(model: nn.Module) -> frozenset[str]:
    """Returns the paths of the modules that methods added to a model."""
    return frozenset(path for path, module in model.named_modules() if isinstance(module, Own))


def is_inside(name: str, paths: Set[str]) -> bool:
    """Returns whether a module's path, or a tensor's name, is one of these paths or below one."""
    while name and name not in paths:
        name = name.rpartition(".")[0]
    return bool(name)


def keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns the `fn` of an `nn.Module._apply` without its change of dtype: it only moves."""

    def moved(tensor: Tensor) -> Tensor:
        found = fn(tensor)
        return found if found.dtype == tensor.dtype else tensor.to(found.device)

    return moved
