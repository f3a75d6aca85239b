"""PEFT's LoRA layers with another forward, which computes all adapters at once, mixed per input.

PEFT still owns names, parameters, active adapters, merging, saving and loading. Each forward
concatenates the adapters' current matrices, R x (I + O) numbers. So optimizers, checkpoints and
compiled graphs see only PEFT's own tensors. What cannot be computed in one pass goes to PEFT's
forward.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from types import MappingProxyType
from typing import Any, cast

import torch
from peft.tuners import lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sapt_fast.devices import is_offloaded, present_weight
from sapt_fast.methods.peft.arrow import arrow_of, arrow_weights
from sapt_fast.methods.peft.other_layers import OTHER_KINDS
from sapt_fast.methods.peft.parts import (
    all_modules_are_hooked,
    drop_rate,
    is_bare,
    is_hooked,
    why_not_plain,
)
from sapt_fast.methods.peft.pooled import Pooled
from sapt_fast.ops import transforms
from sapt_fast.ops._dropout import drawn
from sapt_fast.ops.mixed_lora import mix
from sapt_fast.ops.own_lora import Adapter, add_own_lora_, own_lora
from sapt_fast.ops.projection import PooledProjection, Projection
from sapt_fast.ops.rank_table import cached_table, rank_table
from sapt_fast.routing.running import checked_mixture
from sapt_fast.sites.linear import is_torchao
from sapt_fast.sites.merging import Addend

# PEFT's layers over quantised ones, whose base layers are called unchanged. Only those that run on
# a CPU are tested.
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


class OnePass(Pooled):
    """The mixin of LoRA layers over linear layers, which computes all adapters in one pass.

    It also does so without weights. With `adapter_names=`, each sample uses its own adapter;
    otherwise the active adapters are summed, as in PEFT, or an Arrow router's selection is mixed.

    The following run through PEFT's forward: merged adapters, other arguments, other variants
    (DoRA, aLoRA), and adapters with a bias, with several dtypes, or with hooked or replaced parts.
    """

    def sapt_adapters(self) -> Mapping[str, Any]:
        stack: Any = self._modules["lora_A"]
        return cast(Mapping[str, Any], stack._modules)

    def sapt_why_not(self, adapters: Sequence[str] | None = None) -> str | None:
        return why_not_plain(self, adapters)

    def sapt_addend(self, adapters: Sequence[str], weights: Tensor) -> Addend:
        return addend(self, adapters, weights)

    def _weighted(
        self,
        x: Tensor,
        adapters: tuple[str, ...],
        weights: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        dropouts: Any = self._modules["lora_dropout"]
        rates = {drop_rate(dropouts[name]) for name in adapters if name in dropouts}
        if len(rates) > 1:
            raise RuntimeError(
                f"lora_dropout: got {sorted(rates)}, expected one rate for all mixed adapters, "
                "because they share the mask; set it in their configs, or call model.eval()"
            )
        mixture = checked_mixture(weights, x, len(adapters), self._get_name())
        rate = max(rates, default=0.0)
        return mixed(self, x, adapters, mixture, dropout=rate, args=args, kwargs=kwargs)

    def _unweighted(
        self, x: Tensor, names: Sequence[str] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        others = any(v is not None for key, v in kwargs.items() if key != "adapter_names")
        if args or others or self.merged_adapters:
            return self._as_peft(x, *args, **kwargs)
        held = self.sapt_adapters()
        if names is not None:
            self._check_forward_args(x, adapter_names=names)
            y = _own(self, x, names)
            if y is not None:
                return y
            adapters = tuple(name for name in dict.fromkeys(names) if name in held)
        elif mixes_by_arrow(self):
            arrow = arrow_of(self)
            assert arrow is not None
            return mixed(self, x, arrow.experts, arrow_weights(self, arrow, x))
        else:
            adapters = tuple(name for name in self.active_adapters if name in held)
        if not adapters:
            return self.base_layer(x)
        if why_not_plain(self, adapters) is not None:
            return self._as_peft(x, **kwargs)
        dropouts: Any = self._modules["lora_dropout"]
        rates = {drop_rate(dropouts[name]) for name in adapters}
        if rates != {0.0} and (len(adapters) > 1 or names is not None):
            return self._as_peft(x, **kwargs)  # one mask for each adapter
        if names is None:
            weights = _kept(_ones, x)(len(adapters), x.device)
        else:
            weights = _kept(_one_hot, x)(tuple(names), adapters, x.device)
        mixture = checked_mixture(weights, x, len(adapters), self._get_name())
        return mixed(self, x, adapters, mixture, dropout=max(rates))


class PooledLinear(OnePass, lora.Linear):
    """`peft.tuners.lora.Linear` with all adapters in one pass."""


_KINDS: dict[type, type[Pooled]] = {lora.Linear: PooledLinear, **OTHER_KINDS}


def pooled_kind(kind: type) -> type[Pooled] | None:
    """Returns our subclass of PEFT's layer class `kind`; None if it has none."""
    if kind in _KINDS:
        return _KINDS[kind]
    name = f"Pooled{kind.__name__}"
    known = name in _QUANTISED and kind.__module__ == f"peft.tuners.lora.{_QUANTISED[name]}"
    return _pooled_quantised(kind) if known else None


@cache
def _pooled_quantised(kind: type) -> type[Pooled]:
    description = f"PEFT's `{kind.__name__}` with all adapters in one pass."
    attributes = {"__module__": __name__, "__doc__": description}
    return type(f"Pooled{kind.__name__}", (OnePass, kind), attributes)


def __getattr__(name: str) -> Any:
    """Returns the classes of quantised layers, which pickle looks up by name."""
    if name not in _QUANTISED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"peft.tuners.lora.{_QUANTISED[name]}")
    return _pooled_quantised(getattr(module, name.removeprefix("Pooled")))


def _own(layer: Any, x: Tensor, names: Sequence[str]) -> Tensor | None:
    """Returns the base output plus each sample's own adapter; None if the mixture must be used.

    On a GPU the mixture is used: it skips adapters without weight, in a single launch.
    """
    traced = _is_traced(x)
    if x.device.type != "cpu" or traced or torch.is_grad_enabled():
        return None
    if torch.is_autocast_enabled("cpu") or all_modules_are_hooked():
        return None
    # nn.Module's attribute lookups would cost more than the adapters' arithmetic
    modules, variants, biased = layer._modules, layer.lora_variant, layer.lora_bias
    linears_a, linears_b = modules["lora_A"]._modules, modules["lora_B"]._modules
    dropouts = modules["lora_dropout"]._modules
    scaling = layer.scaling
    index: dict[str, int] = {}
    adapters: list[Adapter] = []
    dtypes = set()
    for name in dict.fromkeys(names):
        linear_a = linears_a.get(name)
        if linear_a is None:  # "__base__", or an adapter of other layers
            continue
        linear_b, dropout = linears_b[name], dropouts[name]
        if type(linear_a) is not nn.Linear or type(linear_b) is not nn.Linear:
            return None
        if name in variants or biased.get(name) or not _passes_through(dropout):
            return None
        if not is_bare(linear_a) or not is_bare(linear_b):
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


def _passes_through(dropout: nn.Module) -> bool:
    """Returns whether PEFT's dropout module returns its input unchanged."""
    plain = type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training)
    return plain and is_bare(dropout)


def mixed(
    layer: Any,
    x: Tensor,
    adapters: Sequence[str],
    mixture: Tensor,
    *,
    dropout: float = 0.0,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> Tensor:
    """Computes a PEFT layer's base output plus the mixture of its adapters.

    Args:
        layer: `peft.tuners.lora.Linear`, whose adapters are plain (`why_not_plain`).
        x: [..., in_features].
        adapters: names of the K adapters of the weights; the layer may lack some, not all.
        mixture: [S, K]; S divides the number of rows of x.
        dropout: rate on the adapters' input, with one mask for all adapters, drawn by torch's
            generator but not the one that `torch.nn.Dropout` would draw.
        args, kwargs: further arguments of the base layer.

    Returns:
        [..., out_features], in the base output's dtype.
    """
    base: Any = layer.base_layer
    masked = drawn(dropout, x, 1)
    if args or kwargs or not _is_plain_base(base):
        pooled = _pooled(layer, x, adapters, None, None)
        [delta] = mix(x, mixture, [pooled], dropout=masked)
        y: Tensor = base(x, *args, **kwargs)
        return y + delta.to(y.dtype)
    weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
    pooled = _pooled(layer, x, adapters, weight, base.bias)
    return mix(x, mixture, [pooled], dropout=masked)[0]


def addend(layer: Any, adapters: Sequence[str], weights: Tensor) -> Addend:
    """Returns the static mixture of a PEFT layer's adapters, to be merged.

    Args:
        layer: PEFT's layer, whose adapters are plain.
        adapters: names of the K adapters; the layer may lack some.
        weights: [K], one for each of `adapters`.
    """
    present = [(k, name) for k, name in enumerate(adapters) if name in layer.lora_A]
    scaled = [
        present_weight(layer.lora_B[name]).detach().t().double()
        * (float(weights[k]) * layer.scaling[name])
        for k, name in present
    ]
    a = torch.cat([present_weight(layer.lora_A[name]).detach() for _, name in present])
    return Addend(layer.base_layer, a, torch.cat(scaled), isinstance(layer.base_layer, Conv1D))


def _pooled(
    layer: Any, x: Tensor, adapters: Sequence[str], weight: Tensor | None, bias: Tensor | None
) -> PooledProjection:
    modules = layer._modules  # nn.Module's attribute lookups would take a fifth of the layer's time
    stack_a, stack_b = modules["lora_A"]._modules, modules["lora_B"]._modules
    present = [name for name in adapters if name in stack_a]
    a = [stack_a[name].weight for name in present]
    b = [stack_b[name].weight.t() for name in present]
    held = {name: part.shape[0] for name, part in zip(present, a, strict=True)}
    if a[0].is_meta and is_offloaded(stack_a[present[0]]):
        a, b = _brought(layer, present, x.device)
    rows_a, rows_b = torch.cat(a), torch.cat(b)
    train_a, train_b, train_rows = [], [], []
    tracked = transforms.active()  # a transform may track any of them
    start = 0
    for part_a, part_b in zip(a, b, strict=True):
        stop = start + part_a.shape[0]
        if tracked or part_a.requires_grad or part_b.requires_grad:
            train_a.append(part_a)
            train_b.append(part_b)
            train_rows += [start, stop]
        start = stop
    ranks = tuple(held.get(name, 0) for name in adapters)
    scaling = tuple(layer.scaling.get(name, 0.0) for name in adapters)
    dtype = torch.promote_types(x.dtype, torch.float32)
    if any(isinstance(value, Tensor) for value in scaling):  # PEFT's hot-swap for compiled models
        values = [torch.as_tensor(value, device=x.device, dtype=dtype) for value in scaling]
        table = rank_table(ranks, torch.stack(values), x.device, dtype)
    else:
        table = _kept(cached_table, x)(ranks, scaling, x.device, dtype)
    projection = Projection(weight, bias, rows_a.detach(), rows_b.detach(), *table)
    return PooledProjection(projection, train_a, train_b, train_rows)


def _brought(
    layer: Any, names: Sequence[str], device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Loads A and B of adapters that accelerate offloads, for one forward."""
    if layer.training and torch.is_grad_enabled():
        raise RuntimeError(
            "training is not possible, because accelerate offloads the adapters: let it dispatch "
            "only the base model, or call model.eval()"
        )
    a, b = (
        [present_weight(stack[name]).detach().to(device) for name in names]
        for stack in (layer.lora_A, layer.lora_B)
    )
    return a, [weight.t() for weight in b]


def _kept(make: Any, x: Tensor) -> Callable[..., Any]:
    """Returns the cached function; the uncached one if x is traced, to cache no fake result."""
    return make.__wrapped__ if _is_traced(x) else make


def _is_traced(x: Tensor) -> bool:
    """Returns whether x is part of a graph or transform, so that its memory cannot be read."""
    compiling = torch.compiler.is_compiling()
    return compiling or type(x) not in (Tensor, nn.Parameter) or transforms.active()


def mixes_by_arrow(layer: Any) -> bool:
    """Returns whether Arrow selects the layer's experts and one pass can compute them."""
    if not layer.lora_variant or layer.disable_adapters or layer.merged:
        return False
    arrow = arrow_of(layer)
    if arrow is None or why_not_plain(layer, arrow.experts) is not None:
        return False
    [router] = layer.active_adapters
    reads = is_bare(arrow.router) and not is_offloaded(arrow.router)
    return reads and _passes_through(layer.lora_dropout[router])


def _is_plain_base(base: nn.Module) -> bool:
    """Returns whether calling the base layer computes its matrix product and nothing else."""
    if type(base) not in (nn.Linear, Conv1D) or is_torchao(base.weight):
        return False
    return (
        base.weight.layout is torch.strided and "forward" not in vars(base) and not is_hooked(base)
    )


@lru_cache(maxsize=16)
def _one_hot(names: tuple[str, ...], adapters: tuple[str, ...], device: torch.device) -> Tensor:
    """Returns [B, K]: row b selects the adapter names[b], or none for "__base__"."""
    index = [[float(name == adapter) for adapter in adapters] for name in names]
    with torch.inference_mode(False):  # all layers, and later calls, share it
        return torch.tensor(index, device=device)


@lru_cache(maxsize=64)
def _ones(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(1, count, device=device)
