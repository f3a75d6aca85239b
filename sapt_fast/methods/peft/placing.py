"""Our classes on PEFT's layers and wrappers: which get one, and why the others run through PEFT."""

from typing import Any, Protocol

from peft import PeftModel

from sapt_fast.devices import is_offloaded
from sapt_fast.methods.peft.layers import OnePass, mixes_by_arrow, pooled_kind
from sapt_fast.methods.peft.parts import why_not_plain
from sapt_fast.methods.peft.pooled import Pooled, pefts_kind
from sapt_fast.methods.peft.switched import owners_of, switched_parts, why_switched
from sapt_fast.methods.peft.wrappers import CHOSEN_KINDS, Chosen, wrapped_kind
from sapt_fast.sites.linear import become, runs_its_class

_UNPATCHED = "not patched yet"
_REPLACED = "its forward was replaced by another library"


class Weighing(Protocol):
    """What layers and wrappers ask of the model's handle."""

    routing: Any

    def owners(self, part: Any) -> Any:
        """Whose copy of a wrapped module runs."""

    def weighed(self, weights: Any) -> Any:
        """The adapters that have weight."""


def require_fitting(model: PeftModel) -> None:
    """Raises ValueError if a plain adapter's matrices do not fit its linear layer."""
    for path, layer in switched_parts(model):
        if not issubclass(pooled_kind(type(layer)) or object, OnePass):
            continue
        inputs, outputs = layer.in_features, layer.out_features
        for name in layer.lora_A:
            if why_not_plain(layer, [name]) is not None:
                continue  # runs through PEFT: block-diagonal matrices, say, have other shapes
            if any(
                stack[name].weight.is_meta and not is_offloaded(stack[name])
                for stack in (layer.lora_A, layer.lora_B)
            ) and is_offloaded(layer.get_base_layer()):
                raise ValueError(
                    f"{path}: adapter {name!r} has no values, because PEFT created it on the meta "
                    "device, like the weights of the offloaded base model. Load it with "
                    "PeftModel.from_pretrained, or let accelerate dispatch the PeftModel"
                )
            a, b = (stack[name].weight.shape for stack in (layer.lora_A, layer.lora_B))
            if a[1:] != (inputs,) or b != (outputs, a[0]):
                raise ValueError(
                    f"{path}: adapter {name!r}: got A {tuple(a)} and B {tuple(b)}, expected "
                    f"[r, {inputs}] and [{outputs}, r]; it belongs to another base model"
                )


def require_no_others(model: PeftModel) -> None:
    """Raises RuntimeError if layers that cannot be merged have adapters."""
    for path, layer in switched_parts(model):
        owned = isinstance(layer, (Pooled, Chosen)) or _own_kind(type(layer)) is not None
        if not owned and owners_of(layer):
            raise RuntimeError(
                f"{path}: {why_not(layer)}. It got adapters while a mixture is merged into the "
                "base weights, and they would act in addition to it: call model.sapt.unmerge() "
                "first, or delete these adapters"
            )


def can_mix(layer: Any) -> bool:
    return layer.sapt_why_not() is None or _by_arrow(layer)


def _by_arrow(layer: Any) -> bool:
    return isinstance(layer, OnePass) and mixes_by_arrow(layer)


def has_poolable(part: Any) -> bool:
    """Returns whether one pass can compute some of the layer's adapters."""
    if not isinstance(part, Pooled):
        return False
    return _by_arrow(part) or any(
        part.sapt_why_not([name]) is None for name in part.sapt_adapters()
    )


def _own_kind(kind: type) -> type | None:
    """Returns our subclass of PEFT's layer or wrapper class `kind`; None if it has none."""
    return pooled_kind(kind) or CHOSEN_KINDS.get(kind)


def _before(kind: type) -> type:
    return wrapped_kind(kind) if issubclass(kind, Chosen) else pefts_kind(kind)


def has_our_class(part: Any) -> bool:
    """Returns whether the module still has the class that `give_class` gave it."""
    kind = type(part)
    return isinstance(part, (Pooled, Chosen)) and _own_kind(_before(kind)) is kind


def give_class(part: Any, handle: Weighing) -> None:
    """Swaps the class of a PEFT layer or wrapper for ours; connects copies to this handle."""
    kind = type(part) if isinstance(part, (Pooled, Chosen)) else _own_kind(type(part))
    if kind is None:
        return
    part.sapt_routing = handle.routing
    if issubclass(kind, Chosen):
        part.sapt_owners = handle.owners
    else:
        part.sapt_weighed = handle.weighed
    become(part, kind)  # last: other threads may be running the layer


def give_back(part: Any) -> None:
    become(part, _before(type(part)))
    for name in ("sapt_routing", "sapt_owners", "sapt_weighed"):
        vars(part).pop(name, None)


def why_not(part: Any) -> str:
    if not isinstance(part, (Pooled, Chosen)) and _own_kind(type(part)) is not None:
        return _UNPATCHED if runs_its_class(part) else _REPLACED
    if not isinstance(part, Pooled):
        return why_switched(part)
    return part.sapt_why_not() or _REPLACED
