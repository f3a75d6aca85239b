"""Checks which parts of a PEFT model support mixture weights.

PEFT switches some modules by the active adapter. With weights, these would silently apply the
active adapter in addition. So every such module is checked before the model runs with weights:

- Our layers mix their adapters.
- Wrappers run the copy of the one adapter that has all of the weight.
- Any other module raises an error if an adapter with weight, or an active one, owns a part of it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from sapt_fast.methods.peft.looks import is_traced, owner_of_each
from sapt_fast.methods.peft.other_layers import PooledEmbedding
from sapt_fast.methods.peft.pooled import Pooled, already_merged
from sapt_fast.methods.peft.wrappers import Chosen


class Obstacle(NamedTuple):
    """A module that weights cannot mix.

    Attributes:
        path: the module's path.
        part: the module.
        reason: why it cannot be mixed.
    """

    path: str
    part: Any
    reason: str


def switched_parts(model: PeftModel) -> list[tuple[str, Any]]:
    """Returns (path, module) of all that PEFT switches by the active adapter, in model order."""
    parts: list[tuple[str, Any]] = [
        (path, module)
        for path, module in model.base_model.named_modules(prefix="base_model")
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    ]
    inside = {id(part._modules.get("token_adapter")) for _, part in parts}
    return [(path, part) for path, part in parts if id(part) not in inside]


def owners_of(part: Any) -> frozenset[str]:
    """Returns the adapters that own a part of a PEFT layer or wrapper."""
    return frozenset(part._get_available_adapters())


def why_switched(part: Any) -> str:
    """Returns why weights cannot mix a module that is not one of our layers."""
    if isinstance(part, AuxiliaryTrainingWrapper):
        return (
            f"{part._error_message_name()} of adapters {sorted(owners_of(part))}: copies cannot be "
            "mixed, weights can only select one"
        )
    kind = type(part)
    return f"{kind.__module__}.{kind.__name__} is not a LoRA layer that can be mixed"


def admit(parts: list[tuple[str, Any]], weights: Tensor, names: tuple[str, ...]) -> bool:
    """Raises RuntimeError if a part of an adapter with weight can be neither mixed nor selected.

    Args:
        parts: the return value of `switched_parts`.
        weights: [S, K] or [S, T, K], of the forward that is about to run.
        names: of the K adapters.

    Returns:
        Whether some modules cannot be mixed, so that the values of the weights have to be read.
    """
    found = list(_obstacles(parts, weights.shape[0]))
    if not found or len(names) != weights.shape[-1]:  # for a wrong K, the layers raise
        return bool(found)
    _admit_all(found, weights, names)
    return True


@torch.compiler.disable(reason="the values of the weights decide what runs")
def _admit_all(found: list[Obstacle], weights: Tensor, names: tuple[str, ...]) -> None:
    if is_traced(weights):
        raise RuntimeError(
            f"{found[0].path}: {found[0].reason}. What runs depends on the values of the weights, "
            "which are unknown while a model is traced; run it without tracing"
        )
    trains = weights.requires_grad and torch.is_grad_enabled()
    some = (weights.detach() != 0).reshape(-1, len(names)).any(0).tolist()
    weighted = {name for name, any_weight in zip(names, some, strict=True) if any_weight or trains}
    for obstacle in found:
        _admit(obstacle, weights, names, weighted, trains)


def choice(part: Chosen, weights: Tensor, names: tuple[str, ...]) -> list[str | None] | None:
    """Returns the adapter whose copy each sample uses; None if no such selection is possible."""
    owners = owner_of_each(weights.detach(), names, owners_of(part))
    return None if owners is None or (len(owners) > 1 and not part.sapt_can_split()) else owners


def require_mergeable(parts: list[tuple[str, Any]], weighted: set[str]) -> None:
    """Raises ValueError if a part of an adapter with weight cannot be merged."""
    for path, part in parts:
        if part.disable_adapters:
            continue
        if isinstance(part, Pooled):
            held = [name for name in part.sapt_adapters() if name in weighted]
            reason = part.sapt_why_not(held) if held else None
        else:
            held = sorted(owners_of(part) & weighted)
            active = owners_of(part).intersection(part.active_adapters)
            acts = held or (active and not isinstance(part, Chosen))
            reason = why_switched(part) if acts else None
        if reason is not None:
            raise ValueError(
                f"nothing is merged, because a part of the adapters cannot be: {path}: {reason}"
            )


def _obstacles(parts: list[tuple[str, Any]], samples: int) -> Iterator[Obstacle]:
    """Yields the enabled modules that weights of this many samples cannot mix."""
    for path, part in parts:
        if not isinstance(part, Pooled):
            if not part.disable_adapters and owners_of(part):
                require_unmerged(path, part)
                yield Obstacle(path, part, why_switched(part))
        elif not part._disable_adapters:
            if part.merged_adapters:
                require_unmerged(path, part)
            reason = _why_not_mixed(path, part, None, samples)
            if reason is not None:
                yield Obstacle(path, part, reason)


def require_unmerged(path: str, part: Any) -> None:
    """Raises RuntimeError if PEFT has merged adapters of this module into the base weights."""
    layer = part._modules.get("token_adapter", part)
    if layer.merged_adapters:
        raise RuntimeError(f"{path}: {already_merged(layer)}")


def _why_not_mixed(
    path: str, layer: Pooled, adapters: list[str] | None, samples: int
) -> str | None:
    if samples > 1 and isinstance(layer, PooledEmbedding) and "relative" in path.split(".")[-1]:
        return "a table of relative positions has one output for all samples"
    return layer.sapt_why_not(adapters)


def _admit(
    obstacle: Obstacle, weights: Tensor, names: tuple[str, ...], weighted: set[str], trains: bool
) -> None:
    path, part, reason = obstacle
    acting = sorted(owners_of(part) & weighted)
    if isinstance(part, Chosen):
        if acting and (trains or choice(part, weights, names) is None):
            raise RuntimeError(
                f"{path}: {reason}, but {acting} have weight in a mixture"
                f"{' that trains' if trains else ''}. Give each sample one adapter with weight "
                "exactly 1 and all others 0, give these adapters weight 0, or run without weights"
            )
    elif isinstance(part, Pooled):
        why = _why_not_mixed(path, part, acting, weights.shape[0]) if acting else None
        if why is not None:
            alone = [n for n in acting if _why_not_mixed(path, part, [n], weights.shape[0])]
            raise RuntimeError(
                f"{path}: mixture weights for adapters {alone or acting} that cannot be mixed "
                f"(variants like DoRA, a bias, several dtypes, parts with hooks): {why}. Give them "
                "weight 0, delete them (model.delete_adapter), or run without weights"
            )
    elif acting or (others := sorted(owners_of(part).intersection(part.active_adapters))):
        state = f"{acting} have weight" if acting else f"{others} are active"
        raise RuntimeError(
            f"{path}: {reason}, but adapters {state}; they would act in addition to the mixture. "
            "Give them weight 0 and make another adapter active (model.set_adapter), delete them "
            "(model.delete_adapter), or run without weights"
        )
