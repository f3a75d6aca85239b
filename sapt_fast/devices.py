"""Supports models that accelerate has dispatched to several devices, or offloaded to CPU or disk.

accelerate's hooks stay on the modules: they move the inputs to the execution device and load
offloaded weights. Code that reads a weight without calling its module uses these functions.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def execution_device(module: nn.Module) -> torch.device:
    """Returns the device on which a module computes: its hook's, else that of its weights."""
    for hook in _hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    own = (*module._parameters.values(), *module._buffers.values())
    return next(tensor.device for tensor in own if tensor is not None)


def is_offloaded(module: nn.Module) -> bool:
    """Returns whether a module's own weights are in memory only while it is called."""
    return any(getattr(hook, "offload", False) for hook in _hooks(module))


def present_weight(module: nn.Module) -> Tensor:
    """Returns the weight of a module; for an offloaded module, the CPU's or disk's copy."""
    weight: Any = module.weight
    if weight.is_meta:
        for hook in _hooks(module):
            if getattr(hook, "offload", False):
                return hook.weights_map["weight"]
    return weight


def only_places(module: nn.Module) -> bool:
    """Returns whether accelerate's hooks of a module only move its inputs and weights."""
    kinds = {type(hook).__name__ for hook in _hooks(module)}
    return kinds <= {"AlignDevicesHook", "ModelHook"}


def is_wrapped_by_accelerate(module: nn.Module) -> bool:
    """Returns whether the instance's forward is accelerate's, which calls `_old_forward`."""
    own = vars(module)
    forward = own.get("forward")
    return (
        "_hf_hook" in own
        and "_old_forward" in own
        and isinstance(forward, functools.partial)
        and any(argument is module for argument in forward.args)
    )


def require_supported_hooks(model: nn.Module) -> None:
    """Raises ValueError if a hook treats adapters inside a layer or block as base weights.

    A hook that loads a block's weights at once would replace trained parameters by copies. A hook
    that casts a layer's weights in each forward would round them.
    """
    for name, module in model.named_modules():
        for hook in _hooks(module):
            if getattr(hook, "storage_dtype", None) is not None:
                raise ValueError(
                    f"model: accelerate casts {name or 'the model'} to {hook.storage_dtype} after "
                    "each forward, which would also round adapters inside it; remove this hook, or "
                    "quantise the base model"
                )
            whole = getattr(hook, "offload", False) and getattr(hook, "place_submodules", False)
            if whole and next(module.children(), None) is not None:
                raise ValueError(
                    f"model: accelerate loads all weights below {name or 'the model'} at once "
                    "(preload_module_classes), including adapters, whose training would be lost; "
                    "dispatch the model without preload_module_classes"
                )


class Resident(nn.Module):
    """A module whose parameters accelerate may move to another device, but not offload.

    They are read without calling the module, so no hook would load them again. They also stay the
    same objects, because an optimizer may contain them.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        # accelerate sets `_old_forward`, moves the tensors, and sets `_hf_hook` and `forward`.
        if name == "_old_forward":
            vars(self)["_unmoved"] = dict(self._parameters), dict(self._buffers)
        elif name == "_hf_hook":
            self._return(value)
        elif not (name == "forward" and isinstance(value, functools.partial)):
            super().__setattr__(name, value)

    def _return(self, hook: Any) -> None:
        parameters, buffers = vars(self).pop("_unmoved")
        self._parameters.update(parameters)
        self._buffers.update(buffers)
        for part in _parts(hook):
            device = getattr(part, "execution_device", None)
            if device is not None and torch.device(device).type != "meta":
                self._apply(lambda t, place=device: t.to(place), recurse=False)
                return


class ResidentLinear(Resident, nn.Linear):
    """`nn.Linear` whose weight is read without calling it."""


class ResidentNorm(Resident, nn.LayerNorm):
    """`nn.LayerNorm` whose weights are read without calling it."""


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook = vars(module).get("_hf_hook")
    return iter(()) if hook is None else _parts(hook)


def _parts(hook: Any) -> Iterator[Any]:
    """Yields a hook, or the hooks of accelerate's SequentialHook."""
    inner = getattr(hook, "hooks", None)
    if inner is None:
        yield hook
        return
    for part in inner:
        yield from _parts(part)
