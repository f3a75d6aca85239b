"""The mixed layers of a patched model: the same modules with another class and forward."""

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sapt_fast.devices import is_wrapped_by_accelerate
from sapt_fast.ops._common import autocasts
from sapt_fast.ops._dropout import drawn
from sapt_fast.ops.mixed_lora import mix
from sapt_fast.pools.lora import AdapterPool
from sapt_fast.routing.forward import Waiting
from sapt_fast.routing.running import Running

if TYPE_CHECKING:
    _Other = nn.Linear
else:
    _Other = object


class Mixed:
    """Attributes that every mixed layer has in addition to those of its base class.

    Attributes:
        sapt_pool: the layer's adapters.
        sapt_routing: the model's running weights, or its gates.
        sapt_dropout: probability of dropping an element of the adapters' input, in training.
        sapt_grad_through_frozen: of `ops.mixed_lora_linear`.
    """

    sapt_pool: AdapterPool
    sapt_routing: Running
    sapt_dropout: float
    sapt_grad_through_frozen: bool
    training: bool

    def _mixed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        pool = self.sapt_pool
        if not len(pool) or self.sapt_routing.merged is not None:
            return F.linear(x, weight, bias)
        mixture = self.sapt_routing.mixture(x, pool, type(self).__name__)
        if is_torchao(weight):
            return self._plus_mixture(F.linear(x, weight, bias), x, mixture)
        through, rate = self.sapt_grad_through_frozen, self._drop_rate()
        return pool(x, weight, bias, mixture, grad_through_frozen=through, dropout_p=rate)

    def _drop_rate(self) -> float:
        """The rate of the dropout of the adapters' input, now."""
        return self.sapt_dropout if self.training else 0.0

    def _plus_mixture(self, y: Tensor, x: Tensor, mixture: Tensor) -> Tensor:
        """Returns y [..., O] plus the mixture for x; y itself may be anybody's, and stays."""
        pool, through, rate = self.sapt_pool, self.sapt_grad_through_frozen, self._drop_rate()
        rows = None
        if type(y) is Tensor and y.dtype == x.dtype and not autocasts(x.device):
            rows = y.flatten(0, -2) if y.dim() > 1 else y.unsqueeze(0)
        delta = pool(x, None, rows, mixture, grad_through_frozen=through, dropout_p=rate)
        return y + delta.to(y.dtype) if rows is None else delta


class MixedLinear(Mixed, nn.Linear):
    """`nn.Linear` plus the mixture of its pool.

    Attributes:
        sapt_group: the layers that the model calls with the same input; or None.
    """

    sapt_group: "InputGroup | None" = None

    def forward(self, input: Tensor) -> Tensor:
        y = None if self.sapt_group is None else self.sapt_group.output(self, input)
        return self._mixed(input, self.weight, self.bias) if y is None else y


class InputGroup:
    """Layers with one input (queries, keys and values), computed when the first is called.

    The results of the others wait in the running forward until these are called with that tensor.

    Args:
        layers: in the order in which the model calls them.
    """

    def __init__(self, layers: list[MixedLinear]) -> None:
        self.layers = layers

    def output(self, layer: MixedLinear, x: Tensor) -> Tensor | None:
        """Returns the layer's output; None if it must be computed on its own."""
        waiting = layer.sapt_routing.waiting
        if waiting is None or layer.sapt_routing.merged is not None:
            return None
        if layer is not self.layers[0]:
            return self._take(layer, x, waiting)
        waiting.pop(self, None)
        if not self._can_share(x):
            return None
        mixture = layer.sapt_routing.mixture(x, layer.sapt_pool, type(layer).__name__)
        through = layer.sapt_grad_through_frozen
        pooled = [m.sapt_pool.projection(x, m.weight, m.bias, through) for m in self.layers]
        dropout = drawn(layer._drop_rate(), x, len(pooled))
        first, *others = mix(x, mixture, pooled, through, dropout=dropout)
        waiting[self] = x, _version(x), dict(zip(self.layers[1:], others, strict=True))
        return first

    def _take(self, layer: MixedLinear, x: Tensor, waiting: Waiting) -> Tensor | None:
        if self not in waiting:
            return None
        source, version, outputs = waiting[self]
        if source is not x or version != _version(x) or layer not in outputs:
            return None
        y = outputs.pop(layer)
        if not outputs:
            del waiting[self]
        return y

    def _can_share(self, x: Tensor) -> bool:
        """Returns whether calling one layer is as good as calling all of them in turn."""
        layers = self.layers
        kinds = {(layer.bias is None, layer._drop_rate()) for layer in layers}
        return len(kinds) == 1 and all(
            len(layer.sapt_pool)
            and "forward" not in vars(layer)
            and not layer._forward_pre_hooks
            and _is_whole(layer, x)
            for layer in layers
        )


def _version(x: Tensor) -> int | None:
    """How often x was written to; None where torch does not count."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


def _is_whole(layer: MixedLinear, x: Tensor) -> bool:
    """Whether the weights are present; sharding and offloading load them when a layer is called."""
    own = [p for p in layer._parameters.values() if p is not None]
    whole = all(type(p) is nn.Parameter and p.device == x.device for p in own)
    return whole and layer.weight.shape == (layer.out_features, layer.in_features)


def is_torchao(weight: object) -> bool:
    """Returns whether the weight of an ordinary layer is torchao's, which multiplies by itself."""
    kind = type(weight)
    return kind not in (Tensor, nn.Parameter) and kind.__module__.startswith("torchao.")


class MixedConv1D(Mixed, Conv1D):
    """GPT-2's `Conv1D` plus the mixture of its pool."""

    def forward(self, x: Tensor) -> Tensor:
        return self._mixed(x, self.weight.t(), self.bias)


class MixedOther(Mixed, _Other):
    """Adds the mixture to the output of a layer of any class.

    Quantised layers and subclasses of `nn.Linear` and `Conv1D` become layers of this kind.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = super().forward(*args, **kwargs)
        pool = self.sapt_pool
        if not len(pool) or self.sapt_routing.merged is not None:
            return y
        x = args[0] if args else kwargs[_first_argument(base_kind(self))]
        if not isinstance(y, Tensor) or y.shape != (*x.shape[:-1], pool.b.width):
            raise RuntimeError(
                f"{base_kind(self).__name__}: its forward gave {_described(y)} for an input of "
                f"shape {tuple(x.shape)}, expected {[*x.shape[:-1], pool.b.width]}, to which a "
                "mixture can be added: leave the layer out of target_modules"
            )
        mixture = self.sapt_routing.mixture(x, pool, type(self).__name__)
        return self._plus_mixture(y, x, mixture)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By the class underneath: this one exists only where a model was patched."""
        reduced: Any = super().__reduce_ex__(2)
        _, _, *state = reduced
        return _unfilled, (base_kind(self),), *state


_MIXED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: MixedLinear, Conv1D: MixedConv1D}


def mixed_kind(layer: nn.Module) -> type[nn.Module] | None:
    """The class that a layer gets when it is patched; None if it is not a known linear layer."""
    kind: Any = type(layer)
    if kind in _MIXED:
        return _MIXED[kind]
    if isinstance(layer, Mixed):
        return None
    linear = isinstance(layer, (nn.Linear, Conv1D)) or packed_weight(layer) is not None
    return _mixed_other(kind) if linear else None


def runs_its_class(layer: nn.Module) -> bool:
    """Whether a layer runs its class's forward, if within accelerate's hook, and no other."""
    name = "_old_forward" if is_wrapped_by_accelerate(layer) else "forward"
    forward = vars(layer).get(name)  # a hook, once removed, leaves the class's own behind
    return forward is None or getattr(forward, "__func__", None) is type(layer).forward


def become(layer: Any, kind: type[nn.Module]) -> None:
    """Gives a layer another class; accelerate's hooks then run that one's forward."""
    own, before = vars(layer), type(layer).forward
    layer.__class__ = kind  # first: other threads may be running the layer
    if getattr(own.get("forward"), "__func__", None) is before:
        del own["forward"]
    if getattr(own.get("_old_forward"), "__func__", None) is before:
        own["_old_forward"] = kind.forward.__get__(layer)


def base_kind(layer: nn.Module) -> type[Any]:
    """Returns the class that a mixed layer had before."""
    return next(kind for kind in type(layer).__mro__ if not issubclass(kind, Mixed))


def packed_weight(layer: nn.Module) -> Tensor | None:
    """The tensor in which a quantised linear layer stores its weight; None for other layers.

    Such a layer has in_features, out_features and integers (or 8-bit floats) instead of a `weight`
    in floating point. Layers of bitsandbytes, GPTQ, AWQ, HQQ, AQLM and EETQ do.
    """
    if not all(isinstance(getattr(layer, n, None), int) for n in ("in_features", "out_features")):
        return None
    own: dict[str, Tensor | None] = {**layer._parameters, **layer._buffers}
    named = own.get("weight")
    candidates = own.values() if named is None else [named]
    return next((t for t in candidates if t is not None and _is_packed(t)), None)


def _is_packed(values: Tensor) -> bool:
    dtype = values.dtype
    if dtype.is_floating_point:
        return dtype.itemsize == 1
    return not dtype.is_complex and dtype != torch.bool


@cache
def _mixed_other(kind: type) -> type[nn.Module]:
    attributes = {"__module__": __name__, "__doc__": f"`{kind.__name__}` plus a mixture."}
    return type(f"Mixed{kind.__name__}", (MixedOther, kind), attributes)


def _unfilled(kind: type) -> nn.Module:
    made = _mixed_other(kind)
    return made.__new__(made)


def _first_argument(kind: type[Any]) -> str:
    """Returns the name of a forward's first argument."""
    return list(inspect.signature(kind.forward).parameters)[1]


def _described(output: object) -> str:
    if isinstance(output, Tensor):
        return f"shape {tuple(output.shape)}"
    return type(output).__name__
