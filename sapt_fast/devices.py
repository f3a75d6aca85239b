"""Models that accelerate has dispatched: over several devices, or offloaded to the CPU or a disk.

Its hooks stay: each module's forward runs inside its hook, which moves the inputs to the execution
device and brings weights that are elsewhere. What reads a weight without a call asks here.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def execution_device(module: nn.Module) -> torch.device:
    """Where a module with weights computes: as its hook says, else where they are."""
    for hook in _hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    own = (*module._parameters.values(), *module._buffers.values())
    return next(tensor.device for tensor in own if tensor is not None)


def is_offloaded(module: nn.Module) -> bool:
    """Whether a module's own weights are here only while it is called."""
    return any(getattr(hook, "offload", False) for hook in _hooks(module))


def present_weight(module: nn.Module) -> Tensor:
    """The weight of a module; of an offloaded one, as it is kept in memory or on the disk."""
    weight: Any = module.weight
    if weight.is_meta:
        for hook in _hooks(module):
            if getattr(hook, "offload", False):
                return hook.weights_map["weight"]
    return weight


def only_places(module: nn.Module) -> bool:
    """Whether accelerate's hooks of a module do no more than move its inputs and weights."""
    kinds = {type(hook).__name__ for hook in _hooks(module)}
    return kinds <= {"AlignDevicesHook", "ModelHook"}


def is_wrapped_by_accelerate(module: nn.Module) -> bool:
    """Whether the forward on the instance is accelerate's, which calls `_old_forward` inside."""
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

    One that loads a block's weights at once would put its own copies in the place of what trains,
    and one that casts a layer's weights for each forward would round them.
    """
    for name, module in model.named_modules():
        for hook in _hooks(module):
            if getattr(hook, "storage_dtype", None) is not None:
                raise ValueError(
                    f"model: accelerate casts {name or 'the model'} to {hook.storage_dtype} after "
                    "each forward, and would round adapters inside it as well; remove that hook, "
                    "or quantise the base model"
                )
            whole = getattr(hook, "offload", False) and getattr(hook, "place_submodules", False)
            if whole and next(module.children(), None) is not None:
                raise ValueError(
                    f"model: accelerate loads all weights below {name or 'the model'} at once "
                    "(preload_module_classes), adapters included, which would lose what is "
                    "trained; dispatch the model without preload_module_classes"
                )


class Resident(nn.Module):
    """A module whose parameters accelerate may move to another device, but not offload.

    They are read without calling the module, so no hook would bring them back. They also stay the
    same objects, which an optimizer may hold already.
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
    """`nn.Linear` whose weight is read where it is not called."""


class ResidentNorm(Resident, nn.LayerNorm):
    """`nn.LayerNorm` whose weights are read where it is not called."""


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook = vars(module).get("_hf_hook")
    return iter(()) if hook is None else _parts(hook)


def _parts(hook: Any) -> Iterator[Any]:
    """A hook, or those that accelerate's SequentialHook runs one after the other."""
    inner = getattr(hook, "hooks", None)
    if inner is None:
        yield hook
        return
    for part in inner:
        yield from _parts(part)
