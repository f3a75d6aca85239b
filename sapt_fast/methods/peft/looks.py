"""What mixture weights say when somebody looks: which adapters have any, and whose sample is whose.

Weights on the CPU that need no gradient are looked at in every forward: an adapter without any
weight is absent then, forward and backward. A look at a GPU's weights waits for all that runs
there, so it is taken only for parts of which just one adapter can act.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Weighed(NamedTuple):
    """The adapters that have weight.

    Attributes:
        adapters: their names. weights: their columns, [.., K'].
        admitted: whether every layer was just found to be able to mix them.
    """

    adapters: tuple[str, ...]
    weights: Tensor
    admitted: bool = False


def can_be_read(weights: Tensor) -> bool:
    """Whether values are at hand without waiting, and zeros get no gradient."""
    return weights.device.type == "cpu" and not weights.requires_grad and not is_traced(weights)


def is_traced(weights: Tensor) -> bool:
    """Whether a tracer or a transform stands in for the values."""
    return (
        torch.compiler.is_compiling()
        or type(weights) not in (Tensor, nn.Parameter)
        or torch._C._functorch.is_functorch_wrapped_tensor(weights)
    )


def version_of(weights: Tensor) -> int | None:
    """How often the weights were written to; None where torch does not count."""
    return None if torch.compiler.is_compiling() or weights.is_inference() else weights._version


def weigh(weights: Tensor, names: tuple[str, ...]) -> Weighed:
    """Leaves out the adapters whose weight is exactly 0 in every sample and token.

    Args:
        weights: [.., K], one for each of `names`; values that can be read.
    """
    if len(names) != weights.shape[-1]:
        return Weighed(names, weights)  # of an earlier set of adapters: the layer says so
    some: list[bool] = (weights != 0).reshape(-1, len(names)).any(0).tolist()
    if all(some):
        return Weighed(names, weights)
    kept = [k for k, any_weight in enumerate(some) if any_weight]
    return Weighed(tuple(names[k] for k in kept), weights[..., kept])


def owner_of_each(
    weights: Tensor, names: Sequence[str], owners: frozenset[str]
) -> list[str | None] | None:
    """Whose copy of a part each sample takes, if weights say so at all.

    Args:
        weights: [S, K] or [S, T, K].
        owners: the adapters that have a copy of the part.

    Returns:
        For each of the S samples an owner that has all of the weight (exactly 1, all others 0), or
        None where no owner has any; one entry if all samples agree. None if a sample mixes an
        owner with others, or its tokens take several.
    """
    per_sample = weights.unsqueeze(1) if weights.dim() == 2 else weights
    chosen: list[str | None] = []
    for tokens in per_sample.tolist():
        of_tokens = {_owner(row, names, owners) for row in tokens}
        if len(of_tokens) != 1:
            return None
        [owner] = of_tokens
        if owner == "":
            return None
        chosen.append(owner)
    return chosen[:1] if len(set(chosen)) == 1 else chosen


def _owner(row: Sequence[float], names: Sequence[str], owners: frozenset[str]) -> str | None:
    """The owner that has all of the weight; None if no owner has any, "" if it is shared."""
    weighted = [name for name, weight in zip(names, row, strict=True) if weight != 0]
    if owners.isdisjoint(weighted):
        return None
    return weighted[0] if len(weighted) == 1 and row[names.index(weighted[0])] == 1 else ""
