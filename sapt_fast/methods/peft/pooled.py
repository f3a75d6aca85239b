"""What every pooled layer of PEFT shares: weights of all adapters, or PEFT's own forward."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft.tuners.lora.layer import VARIANT_KWARG_KEYS
from torch import Tensor

from sapt_fast.methods.peft.looks import Weighed
from sapt_fast.routing.running import Running
from sapt_fast.sites.merging import Addend

if TYPE_CHECKING:
    from peft.tuners.lora.layer import Linear as _LoraLayer
else:
    _LoraLayer = object

# What PEFT's layers take for themselves and do not hand to the base layer.
_PEFTS_OWN = ("adapter_names", *VARIANT_KWARG_KEYS)


class Pooled(_LoraLayer):
    """What a LoRA layer of PEFT gains: with weights it mixes all of the model's adapters by them.

    Weights come from `model.sapt.fixed`, `mixture=` or a router; `adapter_names=` overrides a
    router. Without weights, and while the adapters are disabled, it is PEFT's layer.

    Attributes:
        sapt_weighed: gives for the running weights [.., K] the adapters that have any, their
            columns, and whether this layer was found to be able to mix them.
        sapt_routing: the model's running weights.
        sapt_name: PEFT's name of the layer's class.
    """

    sapt_weighed: Callable[[Tensor], Weighed]
    sapt_routing: Running
    sapt_name: str

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.sapt_name = pefts_kind(cls).__name__

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.get("adapter_names") if kwargs else None
        routing = self.sapt_routing
        if routing.merged is not None:
            if names is not None or self.disable_adapters:
                routing.require_unmerged()
            return self.base_layer(x, *args, **_of_base(kwargs))
        if self._disable_adapters:
            return self._as_peft(x, *args, **kwargs)
        weights = routing.running if names is None else None
        if weights is None:
            return self._unweighted(x, names, args, kwargs)
        if self.merged_adapters:
            raise RuntimeError(already_merged(self))
        adapters, weights, admitted = self.sapt_weighed(weights)
        held = self.sapt_adapters()
        present = [name for name in adapters if name in held]
        if not present:
            return self.base_layer(x, *args, **_of_base(kwargs))
        reason = None if admitted else self.sapt_why_not(present)
        if reason is not None:
            raise RuntimeError(f"mixture weights for a layer that cannot be mixed: {reason}")
        return self._weighted(x, adapters, weights, args, _of_base(kwargs))

    def sapt_adapters(self) -> Mapping[str, Any]:
        """The adapters that this layer has, by name."""
        raise NotImplementedError

    def sapt_why_not(self, adapters: Sequence[str] | None = None) -> str | None:
        """Why these adapters (None: all) cannot be mixed here; None if they can."""
        raise NotImplementedError

    def sapt_addend(self, adapters: Sequence[str], weights: Tensor) -> Addend:
        """The static mixture, to be merged into the base weight; the adapters can be mixed.

        Args:
            adapters: K names; the layer has at least one of them.
            weights: [K].

        Raises:
            ValueError: this layer's base weight cannot hold it.
        """
        raise NotImplementedError

    def _weighted(
        self,
        x: Tensor,
        adapters: tuple[str, ...],
        weights: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """The base output plus the mixture; the layer has some of the adapters, all mixable.

        Args:
            weights: of the K adapters, [1, K], [B, K] or [B, T, K].
            args, kwargs: more arguments of the base layer.
        """
        raise NotImplementedError

    def _unweighted(
        self, x: Tensor, names: Sequence[str] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """What PEFT computes: the sum of the active adapters, or each sample's own of `names`."""
        return self._as_peft(x, *args, **kwargs)

    def _as_peft(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(x, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's, unless a mixture is merged by `model.sapt.merge`: then RuntimeError."""
        self.sapt_routing.require_unmerged()
        super().merge(safe_merge, adapter_names)

    def _get_name(self) -> str:
        """PEFT's name of the layer, for its `get_layer_status` and for print."""
        return self.sapt_name


def pefts_kind(kind: type) -> type:
    """The class that a pooled layer had before."""
    return next(base for base in kind.__mro__ if not issubclass(base, Pooled))


def already_merged(layer: Any) -> str:
    """What to do about adapters that PEFT has merged."""
    return (
        f"weights for adapters {layer.merged_adapters} that are merged into the base weights: call "
        "model.unmerge_adapter() first"
    )


def _of_base(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that PEFT hands to the base layer."""
    return {k: v for k, v in kwargs.items() if k not in _PEFTS_OWN} if kwargs else kwargs
