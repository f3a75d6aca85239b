"""Which parts of a PEFT model weights reach, which they only choose from, and which refuse them.

Whatever PEFT switches by the active adapter would act beside the weights, in silence. So with
weights every such part is looked at before the model runs: pooled layers mix, wrappers take the
copy of the one adapter that has all of the weight, and for the rest no adapter with weight may own
it.
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
    """A part that weights cannot mix.

    Attributes:
        path: of the module. part: the module. reason: why it cannot be mixed.
    """

    path: str
    part: Any
    reason: str


def switched_parts(model: PeftModel) -> list[tuple[str, Any]]:
    """(path, module) of all that PEFT switches by the active adapter, in the model's order."""
    parts: list[tuple[str, Any]] = [
        (path, module)
        for path, module in model.base_model.named_modules(prefix="base_model")
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    ]
    inside = {id(part._modules.get("token_adapter")) for _, part in parts}
    return [(path, part) for path, part in parts if id(part) not in inside]


def owners_of(part: Any) -> frozenset[str]:
    """The adapters that have something in a layer or wrapper of PEFT."""
    return frozenset(part._get_available_adapters())


def why_switched(part: Any) -> str:
    """Why weights cannot mix a part that is no pooled layer."""
    if isinstance(part, AuxiliaryTrainingWrapper):
        return (
            f"{part._error_message_name()} of adapters {sorted(owners_of(part))}: copies have no "
            "mixture, weights can only choose one"
        )
    kind = type(part)
    return f"{kind.__module__}.{kind.__name__} is not a LoRA layer that can be pooled"


def admit(parts: list[tuple[str, Any]], weights: Tensor, names: tuple[str, ...]) -> bool:
    """Raises RuntimeError if weights cannot reach all that the adapters they are for bring.

    Args:
        parts: of `switched_parts`.
        weights: [S, K] or [S, T, K], with which the model is about to run.
        names: of the K adapters.

    Returns:
        Whether there are parts that no mixture reaches, for which a look at the weights is due.
    """
    found = list(_obstacles(parts, weights.shape[0]))
    if not found or len(names) != weights.shape[-1]:  # else the layers say what is wrong
        return bool(found)
    _admit_all(found, weights, names)
    return True


@torch.compiler.disable(reason="the values of the weights decide what runs")
def _admit_all(found: list[Obstacle], weights: Tensor, names: tuple[str, ...]) -> None:
    if is_traced(weights):
        raise RuntimeError(
            f"{found[0].path}: {found[0].reason}, so what runs depends on the values of the "
            "weights, which are not known while a model is traced"
        )
    trains = weights.requires_grad and torch.is_grad_enabled()
    some = (weights.detach() != 0).reshape(-1, len(names)).any(0).tolist()
    weighted = {name for name, any_weight in zip(names, some, strict=True) if any_weight or trains}
    for obstacle in found:
        _admit(obstacle, weights, names, weighted, trains)


def choice(part: Chosen, weights: Tensor, names: tuple[str, ...]) -> list[str | None] | None:
    """The adapter whose copy each sample takes; None if weights do not say so, or it cannot."""
    owners = owner_of_each(weights.detach(), names, owners_of(part))
    return None if owners is None or (len(owners) > 1 and not part.sapt_can_split()) else owners


def require_mergeable(parts: list[tuple[str, Any]], weighted: set[str]) -> None:
    """Raises ValueError if an adapter with weight has something that base weights cannot hold."""
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
                f"nothing is merged, as not all that the adapters bring can be: {path}: {reason}"
            )


def _obstacles(parts: list[tuple[str, Any]], samples: int) -> Iterator[Obstacle]:
    """The parts that weights of so many samples cannot mix; those that are disabled aside."""
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
    """Raises RuntimeError if PEFT has merged adapters of this part into the base weights."""
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
                f"{path}: {reason}, and {acting} have weight in a mixture"
                f"{' that trains' if trains else ''}. Give each sample one adapter with weight "
                "exactly 1 and all others 0, or these adapters weight 0, or run without weights"
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
            f"{path}: {reason}, and adapters {state}, which would act beside the mixture. Give "
            "them weight 0 and make another adapter active (model.set_adapter), delete them "
            "(model.delete_adapter), or run without weights"
        )
