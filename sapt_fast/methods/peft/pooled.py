"""The base class of our PEFT layers: a mixture of all adapters, or PEFT's own forward."""

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

# Arguments that PEFT's layers do not pass on to the base layer.
_PEFTS_OWN = ("adapter_names", *VARIANT_KWARG_KEYS)


class Pooled(_LoraLayer):
    """The mixin of PEFT's LoRA layers: with weights, the layer mixes all of the model's adapters.

    Weights come from `model.sapt.fixed`, `mixture=` or a router; `adapter_names=` overrides a
    router. Without weights, and while the adapters are disabled, PEFT's forward runs.

    Attributes:
        sapt_weighed: returns, for weights [.., K], the adapters that have weight, their columns,
            and whether the layer is known to be able to mix them.
        sapt_routing: the weights of the running forward.
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
        """Returns the layer's adapters, by name."""
        raise NotImplementedError

    def sapt_why_not(self, adapters: Sequence[str] | None = None) -> str | None:
        """Returns why the layer cannot mix these adapters; None if it can.

        Args:
            adapters: names of the adapters; None for all.
        """
        raise NotImplementedError

    def sapt_addend(self, adapters: Sequence[str], weights: Tensor) -> Addend:
        """Returns the static mixture, to be merged into the base weight.

        Args:
            adapters: K names that can be mixed; the layer has at least one of them.
            weights: [K].

        Raises:
            ValueError: if the mixture cannot be added to the layer's base weight.
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
        """Computes the base output plus the mixture.

        Args:
            x: the layer's input.
            adapters: K names that can be mixed; the layer has at least one of them.
            weights: [1, K], [B, K] or [B, T, K].
            args, kwargs: further arguments of the base layer.
        """
        raise NotImplementedError

    def _unweighted(
        self, x: Tensor, names: Sequence[str] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Computes what PEFT does: the sum of the active adapters, or each sample's own."""
        return self._as_peft(x, *args, **kwargs)

    def _as_peft(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(x, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Calls PEFT's `merge`; raises RuntimeError if `model.sapt.merge` has merged a mixture."""
        self.sapt_routing.require_unmerged()
        super().merge(safe_merge, adapter_names)

    def _get_name(self) -> str:
        """Returns PEFT's name of the layer, for `get_layer_status` and print."""
        return self.sapt_name


def pefts_kind(kind: type) -> type:
    """Returns PEFT's class of one of our layer classes."""
    return next(base for base in kind.__mro__ if not issubclass(base, Pooled))


def already_merged(layer: Any) -> str:
    """Returns the message for adapters that PEFT has merged."""
    return (
        f"mixture weights cannot be applied, because adapters {layer.merged_adapters} are merged "
        "into the base weights: call model.unmerge_adapter() first"
    )


def _of_base(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments that PEFT passes on to the base layer."""
    return {k: v for k, v in kwargs.items() if k not in _PEFTS_OWN} if kwargs else kwargs
