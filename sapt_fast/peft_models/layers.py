"""PEFT's LoRA layers with another forward: all its adapters at once, mixed per input.

PEFT keeps owning everything: names, parameters, active adapters, merging, saving, loading. Each
forward lays the adapters' matrices side by side, R x (I + O) numbers, from the parameters as they
then are: optimizers, checkpoints and compiled graphs see nothing but PEFT's own tensors. What
cannot be computed in one pass goes to PEFT's forward.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sapt_fast.layers import checked_mixture, is_torchao
from sapt_fast.merging import Addend
from sapt_fast.ops import transforms
from sapt_fast.ops.mixed_lora import mix
from sapt_fast.ops.own_lora import Adapter, add_own_lora_, own_lora
from sapt_fast.ops.projection import PooledProjection, Projection
from sapt_fast.ops.rank_table import cached_table, rank_table
from sapt_fast.peft_models.arrow import arrow_of, arrow_weights

if TYPE_CHECKING:
    from sapt_fast.routing import Routing

    _LoraLayer = lora.Linear
else:
    _LoraLayer = object

# PEFT's layers over quantised ones, which are called as they are; those that run on a CPU are
# tested.
_QUANTISED = {
    "PooledTorchaoLoraLinear": "torchao",
    "PooledLinear8bitLt": "bnb",
    "PooledLinear4bit": "bnb",
    "PooledGPTQLoraLinear": "gptq",
    "PooledAwqLoraLinear": "awq",
    "PooledHqqLoraLinear": "hqq",
    "PooledAqlmLoraLinear": "aqlm",
    "PooledEetqLoraLinear": "eetq",
}


class Pooled(_LoraLayer):
    """What a LoRA layer of PEFT gains: it computes all its adapters in one pass.

    With weights (`model.sapt.fixed`, `mixture=`, a router) it mixes all of the model's adapters by
    them; with `adapter_names=` each sample takes its own; else it adds up the active adapters, as
    PEFT does, or mixes what its Arrow router chooses. Disabled or merged adapters, other arguments,
    other variants (DoRA, aLoRA) and adapters with a bias or of several dtypes are PEFT's.

    Attributes:
        sapt_names: gives the names of the model's LoRA adapters, in the order of the weights.
        sapt_routing: where the running weights are.
    """

    sapt_names: Callable[[], tuple[str, ...]]
    sapt_routing: "Routing"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.get("adapter_names")
        others = any(value is not None for key, value in kwargs.items() if key != "adapter_names")
        if self.sapt_routing.merged is not None:
            if names is not None or self.disable_adapters:
                self.sapt_routing.require_unmerged()
            return self.base_layer(x, *args)
        weights = self.sapt_routing.running
        if weights is not None and self.merged and not self.disable_adapters:
            raise RuntimeError(
                f"mixture weights for adapters {self.merged_adapters} that are merged into the "
                "base weights: call model.unmerge_adapter() first"
            )
        if names is not None and not (args or others or self.disable_adapters or self.merged):
            self._check_forward_args(x, adapter_names=names)
            y = _own(self, x, names)
            if y is not None:
                return y
        if names is None and weights is None and not (args or others) and mixes_by_arrow(self):
            arrow = arrow_of(self)
            assert arrow is not None
            return mixed(self, x, arrow.experts, arrow_weights(self, arrow, x))
        plain = is_plain(self)
        if weights is not None and not (plain or self.disable_adapters):
            raise RuntimeError(
                "mixture weights for a layer whose adapters cannot be mixed (variants like DoRA, "
                "a bias, several dtypes): model.sapt.report names such layers; delete these "
                "adapters, or run without weights"
            )
        if args or others or self.disable_adapters or self.merged or not plain:
            return super().forward(x, *args, **kwargs)
        adapters = self.sapt_names()
        if names is not None:
            weights = _kept(_one_hot, x)(tuple(names), adapters, x.device)
        if weights is None:
            adapters = tuple(name for name in self.active_adapters if name in self.lora_A)
        present = [name for name in adapters if name in self.lora_A]
        if not present:
            return self.base_layer(x)
        rates = {getattr(self.lora_dropout[n], "p", 0.0) for n in present if self.training}
        if weights is None:
            if rates - {0.0} and len(present) > 1:
                return super().forward(x)  # one mask for each adapter
            weights = _kept(_ones, x)(len(present), x.device)
        if len(rates) > 1:
            raise RuntimeError(
                f"lora_dropout: got {sorted(rates)}, expected one rate for all adapters that are "
                "mixed, which share the mask; set it in their configs, or call model.eval()"
            )
        mixture = checked_mixture(weights, x, len(adapters), type(self).__name__)
        return mixed(self, x, adapters, mixture, dropout=max(rates, default=0.0))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's, unless a mixture is merged by `model.sapt.merge`: then RuntimeError."""
        self.sapt_routing.require_unmerged()
        super().merge(safe_merge, adapter_names)


class PooledLinear(Pooled, lora.Linear):
    """`peft.tuners.lora.Linear`, pooled."""


def pooled_kind(kind: type) -> type[Pooled] | None:
    """The class that a layer of PEFT's class `kind` gets; None if its adapters cannot be pooled."""
    if kind is lora.Linear:
        return PooledLinear
    name = f"Pooled{kind.__name__}"
    known = name in _QUANTISED and kind.__module__ == f"peft.tuners.lora.{_QUANTISED[name]}"
    return _pooled_quantised(kind) if known else None


@cache
def _pooled_quantised(kind: type) -> type[Pooled]:
    attributes = {"__module__": __name__, "__doc__": f"PEFT's `{kind.__name__}`, pooled."}
    return type(f"Pooled{kind.__name__}", (Pooled, kind), attributes)


def __getattr__(name: str) -> Any:
    """The classes over quantised layers, which pickle looks for by their names."""
    if name not in _QUANTISED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"peft.tuners.lora.{_QUANTISED[name]}")
    return _pooled_quantised(getattr(module, name.removeprefix("Pooled")))


def _own(layer: Any, x: Tensor, names: Sequence[str]) -> Tensor | None:
    """The base output plus each sample's own adapter; None where the mixture must do it.

    A GPU's mixture skips adapters without weight by itself, and is a single launch.
    """
    traced = _is_traced(x)
    if x.device.type != "cpu" or traced or layer.training or torch.is_grad_enabled():
        return None
    if torch.is_autocast_enabled("cpu") or layer.lora_variant or any(layer.lora_bias.values()):
        return None
    # nn.Module's own lookups would cost more than the adapters' arithmetic
    linears_a, linears_b = layer.lora_A._modules, layer.lora_B._modules
    scaling = layer.scaling
    index: dict[str, int] = {}
    adapters: list[Adapter] = []
    dtypes = set()
    for name in dict.fromkeys(names):
        linear_a = linears_a.get(name)
        if linear_a is None:  # "__base__", or an adapter of other layers
            continue
        linear_b = linears_b[name]
        if type(linear_a) is not nn.Linear or type(linear_b) is not nn.Linear:
            return None
        a, b = linear_a._parameters.get("weight"), linear_b._parameters.get("weight")
        if type(a) is not nn.Parameter or type(b) is not nn.Parameter or not a.is_cpu:
            return None
        dtypes.add(a.dtype)
        dtypes.add(b.dtype)
        index[name] = len(adapters)
        adapters.append(Adapter(a, b, float(scaling[name])))
    if len(dtypes) > 1 or not dtypes <= {x.dtype, torch.float32}:
        return None
    owner = [index.get(name, -1) for name in names]
    base = layer.base_layer
    if _is_plain_base(base) and base.weight.dtype == x.dtype and base.weight.is_cpu:
        weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
        return own_lora(x, weight, base.bias, adapters, owner)
    y = base(x)
    if y.dtype != x.dtype:
        delta = add_own_lora_(x.new_zeros(y.shape), x, adapters, owner)
        return y + delta.to(y.dtype)
    return add_own_lora_(y.contiguous(), x, adapters, owner)


def mixed(
    layer: Any, x: Tensor, adapters: Sequence[str], mixture: Tensor, *, dropout: float = 0.0
) -> Tensor:
    """A PEFT layer's base output plus the mixture of its adapters.

    Args:
        layer: `peft.tuners.lora.Linear`, for which `is_plain` holds.
        adapters: the K adapters that the weights are for; the layer may lack some, not all.
        mixture: [S, K]; S divides the rows of x.
        dropout: rate on the adapters' input, with one mask for all.
    """
    base: Any = layer.base_layer
    if dropout or not _is_plain_base(base):
        dropped = F.dropout(x, dropout) if dropout else x
        [delta] = mix(dropped, mixture, [_pooled(layer, x, adapters, None, None)])
        y: Tensor = base(x)
        return y + delta.to(y.dtype)
    weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
    return mix(x, mixture, [_pooled(layer, x, adapters, weight, base.bias)])[0]


def addend(layer: Any, adapters: Sequence[str], weights: Tensor) -> Addend:
    """The static mixture of a PEFT layer's adapters, to be merged; `is_plain` holds.

    Args:
        weights: [K], one for each of `adapters`; the layer may lack some.
    """
    present = [(k, name) for k, name in enumerate(adapters) if name in layer.lora_A]
    scaled = [
        layer.lora_B[name].weight.detach().t().double() * (float(weights[k]) * layer.scaling[name])
        for k, name in present
    ]
    a = torch.cat([layer.lora_A[name].weight.detach() for _, name in present])
    return Addend(layer.base_layer, a, torch.cat(scaled), isinstance(layer.base_layer, Conv1D))


def _pooled(
    layer: Any, x: Tensor, adapters: Sequence[str], weight: Tensor | None, bias: Tensor | None
) -> PooledProjection:
    present = [name for name in adapters if name in layer.lora_A]
    a = [layer.lora_A[name].weight for name in present]
    b = [layer.lora_B[name].weight.t() for name in present]
    rows_a, rows_b = torch.cat(a), torch.cat(b)
    train_a, train_b, train_rows = [], [], []
    tracked = transforms.active()  # by whom is not known
    start = 0
    for part_a, part_b in zip(a, b, strict=True):
        stop = start + part_a.shape[0]
        if tracked or part_a.requires_grad or part_b.requires_grad:
            train_a.append(part_a)
            train_b.append(part_b)
            train_rows += [start, stop]
        start = stop
    ranks = tuple(layer.lora_A[n].weight.shape[0] if n in layer.lora_A else 0 for n in adapters)
    scaling = tuple(layer.scaling.get(name, 0.0) for name in adapters)
    dtype = torch.promote_types(x.dtype, torch.float32)
    if any(isinstance(value, Tensor) for value in scaling):  # PEFT's hot-swap for compiled models
        values = [torch.as_tensor(value, device=x.device, dtype=dtype) for value in scaling]
        table = rank_table(ranks, torch.stack(values), x.device, dtype)
    else:
        table = _kept(cached_table, x)(ranks, scaling, x.device, dtype)
    projection = Projection(weight, bias, rows_a.detach(), rows_b.detach(), *table)
    return PooledProjection(projection, train_a, train_b, train_rows)


def _kept(make: Any, x: Tensor) -> Callable[..., Any]:
    """A cached function, or without its cache where x is traced: a fake result must not be kept."""
    return make.__wrapped__ if _is_traced(x) else make


def _is_traced(x: Tensor) -> bool:
    """Whether tensors made now belong to a graph or to a transform, and x has no memory to read."""
    compiling = torch.compiler.is_compiling()
    return compiling or type(x) not in (Tensor, nn.Parameter) or transforms.active()


def is_plain(layer: Any, adapters: Sequence[str] | None = None) -> bool:
    """Whether every adapter, or each of those, is y = scaling B A x, and all have one dtype."""
    names = list(layer.lora_A) if adapters is None else adapters
    linears = [stack[name] for stack in (layer.lora_A, layer.lora_B) for name in names]
    return (
        not any(name in layer.lora_variant or layer.lora_bias.get(name) for name in names)
        and all(type(linear) is nn.Linear for linear in linears)
        and len({linear.weight.dtype for linear in linears}) <= 1
    )


def mixes_by_arrow(layer: Any) -> bool:
    """Whether Arrow chooses the layer's experts now and they can be computed in one pass."""
    if not layer.lora_variant or layer.disable_adapters or layer.merged:
        return False
    arrow = arrow_of(layer)
    if arrow is None or not is_plain(layer, arrow.experts):
        return False
    [router] = layer.active_adapters
    return not (layer.training and getattr(layer.lora_dropout[router], "p", 0.0))


def _is_plain_base(base: nn.Module) -> bool:
    """Whether calling the base layer is its product and nothing else."""
    if type(base) not in (nn.Linear, Conv1D) or is_torchao(base.weight):
        return False
    return base.weight.layout is torch.strided and "forward" not in vars(base) and not _hooked(base)


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


@lru_cache(maxsize=16)
def _one_hot(names: tuple[str, ...], adapters: tuple[str, ...], device: torch.device) -> Tensor:
    """[B, K]: row b selects the adapter names[b]; "__base__" none."""
    index = [[float(name == adapter) for adapter in adapters] for name in names]
    with torch.inference_mode(False):  # all layers, and later calls, share it
        return torch.tensor(index, device=device)


@lru_cache(maxsize=64)
def _ones(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(1, count, device=device)
