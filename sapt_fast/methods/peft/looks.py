"""Reads the values of mixture weights: which adapters have weight, and which one a sample uses.

Weights on the CPU that need no gradient are read in every forward: an adapter without weight is
then left out, forward and backward. Reading a GPU's weights waits for all its pending work. So it
is done only for modules that run one adapter's copy.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Weighed(NamedTuple):
    """The adapters that have weight.

    Attributes:
        adapters: their K' names.
        weights: their columns, [.., K'].
        admitted: whether it was just checked that every layer can mix them.
    """

    adapters: tuple[str, ...]
    weights: Tensor
    admitted: bool = False


class Seen(threading.local):
    """What was read from the weights of this thread's forward.

    Attributes:
        weights: the tensor that was read.
        at: its version, and the adapters' names at that time.
        weighed: the adapters that have weight.
        named: whether the forward has `adapter_names`, which override a router.
    """

    def __init__(self) -> None:
        # Set from the start: an attribute that is added later would cause a recompilation.
        self.weights: Tensor | None = None
        self.at: tuple[int, tuple[str, ...]] | None = None
        self.weighed: Weighed | None = None
        self.named = False

    @contextmanager
    def by_name(self, hooks: AbstractContextManager[None]) -> Iterator[None]:
        """Runs PEFT's hooks for `adapter_names`, and removes them even after an error."""
        hooks.__enter__()
        before, self.named = self.named, True
        try:
            yield
        finally:
            self.named = before
            hooks.__exit__(None, None, None)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


def can_be_read(weights: Tensor) -> bool:
    """Returns whether values can be read without waiting, and zeros get no gradient."""
    return weights.device.type == "cpu" and not weights.requires_grad and not is_traced(weights)


def is_traced(weights: Tensor) -> bool:
    """Returns whether the tensor has no values, because a tracer or a transform runs."""
    return (
        torch.compiler.is_compiling()
        or type(weights) not in (Tensor, nn.Parameter)
        or torch._C._functorch.is_functorch_wrapped_tensor(weights)
    )


def version_of(weights: Tensor) -> int | None:
    """Returns how often the weights were written to; None if torch does not count it."""
    return None if torch.compiler.is_compiling() or weights.is_inference() else weights._version


def weigh(weights: Tensor, names: tuple[str, ...]) -> Weighed:
    """Leaves out the adapters whose weight is exactly 0 in every sample and token.

    Args:
        weights: [.., K], one for each of `names`; its values can be read.
        names: of the K adapters.
    """
    if len(names) != weights.shape[-1]:
        return Weighed(names, weights)  # of an earlier set of adapters: the layer raises
    some: list[bool] = (weights != 0).reshape(-1, len(names)).any(0).tolist()
    if all(some):
        return Weighed(names, weights)
    kept = [k for k, any_weight in enumerate(some) if any_weight]
    return Weighed(tuple(names[k] for k in kept), weights[..., kept])


def owner_of_each(
    weights: Tensor, names: Sequence[str], owners: frozenset[str]
) -> list[str | None] | None:
    """Returns which adapter's copy of a module each sample uses, if the weights determine it.

    Args:
        weights: [S, K] or [S, T, K].
        names: of the K adapters.
        owners: the adapters that have a copy of the module.

    Returns:
        For each of the S samples, the owner that has all of the weight (exactly 1, all others 0),
        or None if no owner has weight; a single entry if all samples agree. None instead of the
        list if a sample mixes an owner with others, or its tokens use several owners.
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
    """Returns the owner that has all of the weight; None if no owner has any, "" if shared."""
    weighted = [name for name, weight in zip(names, row, strict=True) if weight != 0]
    if owners.isdisjoint(weighted):
        return None
    return weighted[0] if len(weighted) == 1 and row[names.index(weighted[0])] == 1 else ""
