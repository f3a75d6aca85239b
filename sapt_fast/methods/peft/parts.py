"""Finds which parts of a PEFT layer can be computed without calling their modules.

A one-pass product reads the weights of `lora_A` and `lora_B` and never calls these modules. This
is correct only if calling them computes their product and nothing else. A part that is hooked,
parametrised, pruned or wrapped has to be called, which PEFT does. Hooks may be added or removed
after `patch`, so each forward checks. The checks avoid nn.Module's attribute lookups, which are
slower.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from sapt_fast.devices import only_places
from sapt_fast.sites.linear import runs_its_class


def is_hooked(module: nn.Module) -> bool:
    """Returns whether the module has hooks that run in its forward or backward."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


def is_bare(module: nn.Module) -> bool:
    """Returns whether calling the module runs its class's forward and nothing else."""
    return not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    ) and ("forward" not in module.__dict__ or _adds_nothing(module))


def all_modules_are_hooked() -> bool:
    """Returns whether torch has global hooks, which run on every call of every module."""
    return bool(
        torch_module._global_forward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_backward_pre_hooks
        or torch_module._global_backward_hooks
    )


def drop_rate(dropout: nn.Module) -> float:
    """Returns the current rate of PEFT's dropout module; 0 in eval mode."""
    return float(dropout.p) if type(dropout) is nn.Dropout and dropout.training else 0.0


def why_not_plain(layer: Any, adapters: Sequence[str] | None = None) -> str | None:
    """Returns why a LoRA layer over a linear layer cannot be computed in one pass; None if it can.

    Args:
        layer: `peft.tuners.lora.Linear`, or PEFT's layer over a quantised one.
        adapters: names of the layer's adapters that run; None for all of them.

    Returns:
        None if each adapter is y = scaling B A x, all have one dtype, and no part is hooked or
        wrapped.
    """
    modules = layer._modules
    stack_a, stack_b = modules["lora_A"]._modules, modules["lora_B"]._modules
    dropouts = modules["lora_dropout"]._modules
    variants, biased = layer.lora_variant, layer.lora_bias
    dtype: torch.dtype | None = None
    for name in stack_a if adapters is None else adapters:
        if name in variants:
            kinds = sorted(n for n in stack_a if n in variants)
            return f"adapters with variants ({kinds}) cannot be mixed; they run through PEFT"
        if biased.get(name):
            return f"adapters with a bias ({name!r}) cannot be mixed; they run through PEFT"
        dropout = dropouts[name]
        if not _is_plain_dropout(dropout) or not is_bare(dropout):
            return _wrapped("lora_dropout", name, dropout)
        for key, part in (("lora_A", stack_a[name]), ("lora_B", stack_b[name])):
            if type(part) is not nn.Linear or not is_bare(part):
                return _wrapped(key, name, part)
            own: Any = part._parameters.get("weight")
            now = part.weight.dtype if own is None else own.dtype
            if dtype is not None and now is not dtype:
                return "its adapters have several dtypes"
            dtype = now
    if all_modules_are_hooked():
        return "torch has a global hook on every module, so PEFT has to call the parts"
    return None


def _is_plain_dropout(dropout: nn.Module) -> bool:
    return type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.inplace)


def _adds_nothing(module: nn.Module) -> bool:
    """Returns whether the instance's forward is accelerate's and computes what the class's does.

    The hooks of a split or offloaded model only move the input and the weights. When accelerate
    removes its hooks, it leaves the class's forward on the instance.
    """
    return runs_its_class(module) and only_places(module)


def _wrapped(key: str, name: str, part: nn.Module) -> str:
    return (
        f"{key}[{name!r}] ({type(part).__name__}) is hooked, parametrised or replaced, so PEFT has "
        "to call it"
    )
