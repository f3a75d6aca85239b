"""Layers whose output a method changes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from sapt_fast.pools.own import Own, is_inside, own_paths
from sapt_fast.sites.report import PatchReport

__all__ = [
    "AtOutput",
    "attach_output",
    "detach_output",
    "find_outputs",
    "listen",
    "require_output",
    "silence",
]


class AtOutput(Own, nn.Module):
    """The base class of modules that change a layer's output.

    Attributes:
        listens: whether the layer calls it.
    """

    listens = True

    def at_output(self, output: Tensor, args: tuple[Any, ...]) -> Tensor:
        """Returns the tensor [..., O] that replaces the layer's output.

        Args:
            output: the layer's output, [..., O].
            args: the positional arguments of the layer's call.
        """
        raise NotImplementedError


def find_outputs(model: nn.Module, names: Sequence[str] | str) -> PatchReport:
    """Returns the modules whose outputs a method can change.

    Args:
        model: the model, which is not changed.
        names: last parts of paths, or one regular expression for the whole path.

    Raises:
        ValueError: if no module matches.
        ValueError: if a string is not a regular expression.
    """
    report, own = PatchReport(), own_paths(model)
    paths = [path for path, _ in model.named_modules() if path and not is_inside(path, own)]
    if isinstance(names, str):
        try:
            report.patched = [path for path in paths if re.fullmatch(names, path)]
        except re.error as error:
            raise ValueError(
                f"target_modules: got {names!r}, expected a regular expression: {error}"
            ) from None
    else:
        for name in names:
            found = [path for path in paths if path == name or path.endswith(f".{name}")]
            report.patched += [path for path in found if path not in report.patched]
            if not found:
                report.unmatched.append(name)
    if not report.patched:
        raise ValueError(f"target_modules: {names!r} matches no module of {type(model).__name__}")
    return report


def attach_output(model: nn.Module, path: str, slot: str, module: AtOutput) -> None:
    """Adds `module` to a layer as its child `slot`, to change the layer's output.

    Args:
        model: the model.
        path: the layer's path.
        slot: the name of the child.
        module: called with the layer's output in each forward, if it listens.

    Raises:
        ValueError: if the layer has a child or attribute of that name.
    """
    layer = model.get_submodule(path)
    if hasattr(layer, slot):
        raise ValueError(f"{path}: got a layer with {slot}, expected one without it")
    layer.add_module(slot, module)
    if module.listens:
        layer.register_forward_hook(_Hook(slot))


def listen(model: nn.Module, path: str, slot: str) -> None:
    """Lets the layer call its module from now on."""
    layer = model.get_submodule(path)
    module: Any = layer._modules[slot]
    if not module.listens:
        module.listens = True
        layer.register_forward_hook(_Hook(slot))


def silence(model: nn.Module, path: str, slot: str) -> None:
    """Undoes `listen`: the layer runs as if there were no module."""
    layer = model.get_submodule(path)
    module: Any = layer._modules[slot]
    module.listens = False
    _remove_hook(layer, slot)


def require_output(model: nn.Module, path: str, slot: str) -> None:
    """Raises ValueError if the layer no longer has what `attach_output` put there."""
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{path}: the model has no such layer any more") from None
    module: Any = layer._modules.get(slot)
    hooked = any(_is_hook(hook, slot) for hook in layer._forward_hooks.values())
    if module is None or hooked != module.listens:
        raise ValueError(
            f"{path}: got {type(layer).__module__}.{type(layer).__name__} without {slot}, expected "
            "the layer that patch changed; undo first what another library did to the model since"
        )


def detach_output(model: nn.Module, path: str, slot: str) -> None:
    """Undoes `attach_output`."""
    layer = model.get_submodule(path)
    _remove_hook(layer, slot)
    delattr(layer, slot)


def _remove_hook(layer: nn.Module, slot: str) -> None:
    for key, hook in list(layer._forward_hooks.items()):
        if _is_hook(hook, slot):
            del layer._forward_hooks[key]


def _is_hook(hook: Any, slot: str) -> bool:
    return isinstance(hook, _Hook) and hook.slot == slot


class _Hook:
    """Calls the module, found by its name, so that a copied layer calls its own copy."""

    def __init__(self, slot: str) -> None:
        self.slot = slot

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        module: Any = layer._modules[self.slot]
        if isinstance(output, Tensor):
            return module.at_output(output, args)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (module.at_output(output[0], args), *output[1:])
        raise RuntimeError(
            f"{type(layer).__name__}: got an output of type {type(output).__name__}, expected a "
            "tensor, or a tuple that begins with one"
        )
