"""PEFT's wrappers of whole modules (`modules_to_save`, trainable tokens), with mixture weights.

A wrapper contains a copy of its module, or of some of its rows, for each adapter; PEFT runs the
active adapter's copy. Copies cannot be mixed. If one adapter has all of a sample's weight, its copy
runs for that sample. Other weights raise an error before the model runs (`switched`).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from sapt_fast.routing.running import Running

if TYPE_CHECKING:
    from peft.utils.other import AuxiliaryTrainingWrapper as _Wrapper
else:
    _Wrapper = object

# Modules whose samples can be computed separately.
_BY_SAMPLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Chosen(_Wrapper):
    """The mixin of PEFT's wrappers: runs the copy of the adapter that has all of the weight.

    Attributes:
        sapt_owners: returns, for each sample or once for all, the adapter whose copy runs (None for
            the module without adapters). Returns None instead of a list if PEFT decides. Raises
            RuntimeError if the weights select no copy.
        sapt_routing: the weights of the running forward.
    """

    sapt_owners: Callable[["Chosen"], list[str | None] | None]
    sapt_routing: Running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is not None or self.disable_adapters:
            return super().forward(*args, **kwargs)
        kwargs.pop("adapter_names", None)
        owners = self.sapt_owners(self)
        if owners is None:
            return super().forward(*args, **kwargs)
        if len(owners) == 1:
            return self._forward_as(owners[0], *args, **kwargs)
        return self._by_sample(owners, *args, **kwargs)

    def sapt_can_split(self) -> bool:
        """Returns whether samples can use different copies: the module computes each separately."""
        return isinstance(self.original_module, _BY_SAMPLE)

    def _by_sample(self, owners: list[str | None], *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[0] != len(owners):
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise RuntimeError(
                f"{self._get_name()}: got {got}, expected a first dimension of {len(owners)} "
                "samples, which use the copies of several adapters"
            )
        parts, order = [], []
        for owner in dict.fromkeys(owners):
            rows = [row for row, own in enumerate(owners) if own == owner]
            parts.append(self._forward_as(owner, x[rows], *args[1:], **kwargs))
            order += rows
        return torch.cat(parts)[[order.index(row) for row in range(len(order))]]

    def _forward_as(self, owner: str | None, *args: Any, **kwargs: Any) -> Any:
        """Runs the forward of one adapter's copy; None for the module without adapters."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the copy that runs, for models that read a module's weights."""
        own = self.__dict__
        if "sapt_owners" in own and own["sapt_routing"].is_running and not own["_disable_adapters"]:
            try:
                return nn.Module.__getattr__(self, name)
            except AttributeError:
                return self._read(name)
        return super().__getattr__(name)

    def _read(self, name: str) -> Any:
        own = getattr(self.original_module, name)
        if not isinstance(own, (Tensor, nn.Module)):  # copies differ only in these
            return own
        owners = self.sapt_owners(self)
        if owners is None:
            return super().__getattr__(name)
        if len(owners) > 1:
            raise RuntimeError(
                f"{self._get_name()}: the model reads {name!r} of this module, but its samples use "
                "the copies of several adapters; give all samples the same weights"
            )
        return self._attribute_as(owners[0], name)

    def _attribute_as(self, owner: str | None, name: str) -> Any:
        raise NotImplementedError

    def _get_name(self) -> str:
        return wrapped_kind(type(self)).__name__


class ChosenModules(Chosen, ModulesToSaveWrapper):
    """`peft.utils.ModulesToSaveWrapper` that runs the copy selected by the weights."""

    def _forward_as(self, owner: str | None, *args: Any, **kwargs: Any) -> Any:
        return self._copy(owner)(*args, **kwargs)

    def _attribute_as(self, owner: str | None, name: str) -> Any:
        return getattr(self._copy(owner), name)

    def _copy(self, owner: str | None) -> nn.Module:
        return self.original_module if owner is None else self.modules_to_save[owner]


class ChosenTokens(Chosen, TrainableTokensWrapper):
    """`peft.utils.TrainableTokensWrapper` that uses the rows selected by the weights."""

    def _forward_as(self, owner: str | None, *args: Any, **kwargs: Any) -> Any:
        if owner is None:
            return self.original_module(*args, **kwargs)
        return self.token_adapter.forward_adapters(args[0], [owner])

    def _attribute_as(self, owner: str | None, name: str) -> Any:
        if name == "weight" and owner is not None:
            return self.token_adapter.get_merged_weights([owner])
        return getattr(self.original_module, name)


CHOSEN_KINDS: dict[type, type[Chosen]] = {
    ModulesToSaveWrapper: ChosenModules,
    TrainableTokensWrapper: ChosenTokens,
}


def wrapped_kind(kind: type) -> type:
    """Returns PEFT's class of one of our wrapper classes."""
    return next(base for base in kind.__mro__ if not issubclass(base, Chosen))
