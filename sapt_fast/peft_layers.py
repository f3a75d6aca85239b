"""PEFT's LoRA layer with another forward: all its adapters at once, mixed per input.

PEFT keeps owning everything: names, parameters, active adapters, merging, saving, loading. What a
layer's forward cannot compute in one pass it hands to PEFT's own.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sapt_fast.layers import checked_mixture
from sapt_fast.ops.mixed_lora import mix
from sapt_fast.ops.projection import PooledProjection, Projection
from sapt_fast.ops.rank_table import RankTable, rank_table

if TYPE_CHECKING:
    from sapt_fast.routing import Routing


# Held by whatever moves parameters: threads may start their first forwards at once.
MOVING = threading.RLock()
OUTDATED = (
    "adapters were added, deleted, moved or rescaled since the last forward that was not compiled: "
    "run another such before the compiled one"
)


@dataclass(frozen=True)
class _Members:
    """Neighbouring adapters of a stack.

    Attributes:
        names: of those that the layer has. active: those of them that are not passed over.
        start, stop: their rows. count: adapters that weights are for, with or without rows here.
        ones: [1, count], 1 for the active adapters.
    """

    names: tuple[str, ...]
    active: tuple[str, ...]
    start: int
    stop: int
    count: int
    table: RankTable
    ones: Tensor


class LoraStack:
    """The LoRA matrices of one layer in two pieces of memory, [R, I] and [R, O].

    The layer's own parameters are made views of them (`lora_B`'s transposed), so training,
    `load_adapter` and hot-swaps write where the kernels read. Whatever moves, adds or deletes a
    parameter is noticed before the next forward; a compiled one notices all but `p.data = ...`.
    Tensors that stand in for the parameters (`torch.func.functional_call`) are read through a copy.

    Args:
        layer: PEFT's.
        names: of all LoRA adapters of the model, in the order of the weights.
    """

    _layer: Any  # its ModuleDicts hold linear layers, which they do not say

    def __init__(self, layer: lora.LoraLayer, names: Sequence[str]) -> None:
        self._layer = layer
        self._names = tuple(names)
        self.plain = False
        self._parts: list[tuple[Tensor, int]] | None = None
        self._members: dict[tuple[str, ...] | None, _Members] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of all LoRA adapters of the model."""
        return self._names

    @names.setter
    def names(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._parts = None

    @property
    def present(self) -> list[str]:
        """Those of the adapters that this layer has, in their order."""
        return [name for name in self._names if name in self._layer.lora_A]

    def realign(self) -> None:
        """Brings the stack up to date with the layer's adapters; does nothing if it is."""
        if not self._is_current():
            with MOVING:
                if not self._is_current():
                    self._restack()

    def require_current(self) -> None:
        """Raises RuntimeError if, while a graph is traced, the stack is seen to be out of date."""
        parts, modules = self._parts, self._layer._modules
        present = [
            module._parameters.get("weight")
            for part in ("lora_A", "lora_B")
            for module in modules[part]._modules.values()
        ]
        if (
            parts is None
            or len(present) != len(parts)
            or any(weight is not own for weight, (own, _) in zip(present, parts, strict=True))
            or any(
                self._stamps.get(name) != value
                for name, value in self._layer.scaling.items()
                if not isinstance(value, Tensor)
            )
        ):
            raise RuntimeError(OUTDATED)

    def members(self, active: Sequence[str] | None) -> _Members | None:
        """The rows of the active adapters (None: of all), with those that lie between them."""
        key = None if active is None else tuple(active)
        # A graph reads scalings that are tensors anew each time: a hot-swap writes into them.
        swaps = torch.compiler.is_compiling() and _has_tensors(self._layer.scaling)
        if swaps or key not in self._members:
            made = self._make_members(key)
            if torch.compiler.is_compiling() or made is None:
                return made
            self._members[key] = made
        return self._members[key]

    def pooled(self, x: Tensor, members: _Members, fused: bool) -> PooledProjection:
        """What `mix` takes; `fused` with the base layer's product."""
        layer = self._layer
        rows = slice(members.start, members.stop)
        train_a, train_b, train_rows = [], [], []
        start = members.start
        for name in members.names if torch.is_grad_enabled() else ():
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            if name in members.active and (a.requires_grad or b.requires_grad):
                train_a.append(a)
                train_b.append(b.t())
                first = start - members.start
                train_rows += [first, first + a.shape[0]]
            start += a.shape[0]
        weight, bias = _base_weights(layer) if fused else (None, None)
        given = Projection(weight, bias, self._a[rows], self._b[rows], *members.table)
        return PooledProjection(given, train_a, train_b, train_rows)

    def release(self) -> None:
        """Gives the layer's parameters memory of their own again."""
        for name in self._layer.lora_A:
            for part in (self._layer.lora_A, self._layer.lora_B):
                weight = part[name].weight
                weight.data = weight.data.clone(memory_format=torch.contiguous_format)

    def _is_current(self) -> bool:
        # In every forward of every layer: no look-up through nn.Module.
        if self._parts is None or self._stamps != _stamps(self._layer.scaling):
            return False
        modules = self._layer._modules
        present = [
            module._parameters.get("weight")
            for part in ("lora_A", "lora_B")
            for module in modules[part]._modules.values()
        ]
        return len(present) == len(self._parts) and all(
            weight is own and weight.data_ptr() == address
            for weight, (own, address) in zip(present, self._parts, strict=True)
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _restack(self) -> None:
        layer, names = self._layer, self.present
        self._parts = None
        self._members.clear()
        self.plain = is_plain(layer)
        weights = [linear.weight for linear in _linears(layer)]
        if names and self.plain:
            a = [layer.lora_A[name].weight for name in names]
            b = [layer.lora_B[name].weight for name in names]
            self._a = torch.cat([w.data for w in a])
            self._b = torch.cat([w.data.t() for w in b])
            if _stand_in(weights):
                return
            sizes = [w.shape[0] for w in a]
            for weight, part in zip(a, self._a.split(sizes), strict=True):
                weight.data = part
            for weight, part in zip(b, self._b.split(sizes), strict=True):
                weight.data = part.t()
            made = self._make_members(None)
            if made is not None:
                self._members[None] = made
        self._stamps = _stamps(layer.scaling)
        self._parts = [(weight, weight.data_ptr()) for weight in weights]

    @torch.inference_mode(False)
    def _make_members(self, active: tuple[str, ...] | None) -> _Members | None:
        layer, present = self._layer, self.present
        ranks = {name: layer.lora_A[name].weight.shape[0] for name in present}
        chosen = present if active is None else [name for name in present if name in active]
        if not chosen:
            return None
        first, last = present.index(chosen[0]), present.index(chosen[-1])
        names = tuple(present[first : last + 1])
        start = sum(ranks[name] for name in present[:first])
        stop = start + sum(ranks[name] for name in names)
        counted = self._names if active is None else names
        dtype = torch.promote_types(self._a.dtype, torch.float32)
        scaling: Any = [layer.scaling.get(name, 0.0) for name in counted]
        if _has_tensors(layer.scaling):
            scaling = torch.stack([torch.as_tensor(s, device=self._a.device) for s in scaling])
        layout = [ranks.get(name, 0) for name in counted]
        table = rank_table(layout, scaling, self._a.device, dtype)
        ones = [[float(active is None or name in active) for name in counted]]
        weights = torch.tensor(ones, device=self._a.device, dtype=dtype)
        return _Members(names, tuple(chosen), start, stop, len(counted), table, weights)

    # A copy of the model has other parameters: it makes a stack of its own.
    def __getstate__(self) -> dict[str, Any]:
        return {"_layer": self._layer, "_names": self._names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, plain=False, _parts=None, _members={})


class PooledLinear(lora.Linear):
    """`peft.tuners.lora.Linear` that computes all its adapters in one pass.

    With weights (`model.sapt.fixed`, `mixture=`, a router) it mixes all of the model's adapters by
    them; with `adapter_names=` each sample takes its own; else it adds up the active adapters, as
    PEFT does. Merged or disabled adapters, other arguments, variants (DoRA, aLoRA) and adapters
    with a bias or of several dtypes are PEFT's.
    """

    sapt_stack: LoraStack
    sapt_routing: "Routing"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.get("adapter_names")
        others = any(value is not None for key, value in kwargs.items() if key != "adapter_names")
        stack, routing = self.sapt_stack, self.sapt_routing
        if torch.compiler.is_compiling():
            stack.require_current()
        elif not routing.has_realigned:
            stack.realign()  # the model's forward has done so for all its layers
        weights = routing.running
        if weights is not None and self.merged and not self.disable_adapters:
            raise RuntimeError(
                f"mixture weights for adapters {self.merged_adapters} that are merged into the "
                "base weights: call model.unmerge_adapter() first"
            )
        if args or others or self.disable_adapters or self.merged or not stack.plain:
            return super().forward(x, *args, **kwargs)
        if names is not None:
            self._check_forward_args(x, adapter_names=names)
            weights = _one_hot(tuple(names), stack.names, x.device)
        members = stack.members(self.active_adapters if weights is None else None)
        if members is None:
            return self.base_layer(x)
        rates = {0.0} if not self.training else _dropouts(self, members.names)
        if weights is None and rates != {0.0} and len(members.names) > 1:
            return super().forward(x)  # one mask for each adapter
        if len(rates) > 1:
            raise RuntimeError(
                f"lora_dropout: got {sorted(rates)}, expected one rate for all adapters that are "
                "mixed, which share the mask; set it in their configs, or call model.eval()"
            )
        dropout = rates.pop()
        weights = members.ones if weights is None else weights
        mixture = checked_mixture(weights, x, members.count, type(self).__name__)
        if dropout or not is_plain_base(self.base_layer):
            [delta] = mix(F.dropout(x, dropout), mixture, [stack.pooled(x, members, False)])
            return self.base_layer(x) + delta
        return mix(x, mixture, [stack.pooled(x, members, True)])[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PooledLinear":
        super()._apply(fn, recurse)
        self.sapt_stack.realign()  # a compiled forward does not look where the parameters are
        return self


def _linears(layer: Any) -> list[nn.Linear]:
    """All A, then all B."""
    return [*layer.lora_A.values(), *layer.lora_B.values()]


def _has_tensors(scaling: dict[str, float | Tensor]) -> bool:
    return any(isinstance(value, Tensor) for value in scaling.values())


def _stand_in(weights: Sequence[Tensor]) -> bool:
    """Whether any is not a parameter, but a tensor that a caller put there for a while."""
    return any(type(weight) is not nn.Parameter for weight in weights)


def _stamps(scaling: dict[str, float | Tensor]) -> dict[str, object]:
    """What changes when a scaling does; PEFT's hot-swap keeps them in tensors."""
    return {
        name: (id(value), value._version) if isinstance(value, Tensor) else value
        for name, value in scaling.items()
    }


def is_plain(layer: Any) -> bool:
    """Whether every adapter of the layer is y = scaling B A x, and all have one dtype."""
    return (
        not layer.lora_variant
        and not any(layer.lora_bias.values())
        and all(type(linear) is nn.Linear for linear in _linears(layer))
        and len({linear.weight.dtype for linear in _linears(layer)}) <= 1
    )


def is_plain_base(base: nn.Module) -> bool:
    """Whether calling the base layer is its product and nothing else."""
    return type(base) in (nn.Linear, Conv1D) and "forward" not in vars(base) and not _hooked(base)


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


def _base_weights(layer: PooledLinear) -> tuple[Tensor, Tensor | None]:
    base: Any = layer.base_layer
    return base.weight.t() if isinstance(base, Conv1D) else base.weight, base.bias


def _dropouts(layer: PooledLinear, names: Sequence[str]) -> set[float]:
    """The rates of the dropout on the adapters' input."""
    return {getattr(layer.lora_dropout[name], "p", 0.0) for name in names}


@lru_cache(maxsize=16)
def _one_hot(names: tuple[str, ...], adapters: tuple[str, ...], device: torch.device) -> Tensor:
    """[B, K]: row b selects the adapter names[b]; "__base__" none."""
    index = [[float(name == adapter) for adapter in adapters] for name in names]
    with torch.inference_mode(False):  # all layers, and later calls, share it
        return torch.tensor(index, device=device)
