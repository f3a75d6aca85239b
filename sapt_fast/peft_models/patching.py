"""patch and unpatch for PEFT models: their LoRA adapters become one pool."""

import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sapt_fast.devices import is_offloaded
from sapt_fast.layers import become, runs_its_class
from sapt_fast.merging import Merged, static_weights
from sapt_fast.peft_models.layers import Pooled, addend, is_plain, mixes_by_arrow, pooled_kind
from sapt_fast.report import PatchReport
from sapt_fast.routing import Routing, require_unrouted
from sapt_fast.towers import tower_notes

logger = logging.getLogger(__name__)


class PeftHandle(nn.Module):
    """model.sapt of a PEFT model: which weights its LoRA adapters are mixed by.

    By default the active adapters are added up, as PEFT does. `fixed`, the argument `mixture=` of
    the model's forward and `generate`, or a router give weights for all adapters instead, whether
    active or not. Adapters that PEFT adds, loads, swaps or deletes join and leave by themselves.

    Attributes:
        router: a module or function that gives the weights; None for the sum of the active
            adapters. A function is kept inside a module; anything else raises TypeError.
            `router(input_ids=, inputs_embeds=, attention_mask=, labels=)` returns [1, K], [B, K]
            or, per token, [B, T, K].
        routing: the running weights.

    Example:
        >>> import peft, sapt_fast, torch
        >>> from sapt_fast.demo.backbone import load_backbone
        >>> config = peft.LoraConfig(r=4, target_modules=["q", "v"])
        >>> model = peft.get_peft_model(load_backbone(), config, adapter_name="first")
        >>> model.add_adapter("second", config)
        >>> model = sapt_fast.patch(model)
        >>> model.sapt.tasks
        ['first', 'second']
        >>> ids = torch.tensor([[4, 5, 6], [9, 8, 7]])
        >>> each_its_own = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
        >>> model.generate(input_ids=ids, mixture=each_its_own, max_new_tokens=3).shape[0]
        2
    """

    _model: Any
    router: nn.Module | None

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        object.__setattr__(self, "_model", model)
        inner = model.get_base_model()
        self.routing = Routing(inner, self._route, self._has_router, self._count)
        self.routing.pools.append(self)
        self._configs: list[Any] = []
        self.register_module("router", None)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "router" and not (value is None or isinstance(value, nn.Module)):
            if not callable(value):
                raise TypeError(
                    f"router: got {type(value).__name__}, expected a module or a function that "
                    "returns weights, or None"
                )
            value = _FunctionRouter(value)
        super().__setattr__(name, value)

    @property
    def tasks(self) -> list[str]:
        """Names of the LoRA adapters, in the order of the weights."""
        configs = self._model.peft_config.items()
        return [name for name, config in configs if config.peft_type == PeftType.LORA]

    @property
    def report(self) -> PatchReport:
        """The layers that mix now, and those left to PEFT and why."""
        report = PatchReport()
        for path, layer in self._model.named_modules():
            if not isinstance(layer, BaseTunerLayer):
                continue
            if isinstance(layer, Pooled) and _can_mix(layer):
                report.patched.append(path)
            else:
                report.skipped[path] = _why_not(layer)
        bases = _bases(self._model)
        inner = self._model.get_base_model()
        prefix = f"{_path_of(inner, self._model)}."
        report.notes += tower_notes(inner, [p.removeprefix(prefix) for p in report.patched])
        if len(bases) > 1:
            report.notes.append(f"the adapters name several base models: {bases}")
        return report

    @property
    def attention(self) -> Tensor | None:
        """Weights of this thread's last forward, detached; None if it had none."""
        weights = self.routing.weights
        return None if weights is None else weights.detach()

    def fixed(self, weights: Tensor) -> Any:
        """A context in which these weights stand in for the router's, in this thread.

        Args:
            weights: [K] or [1, K] for every input, [B, K] per sample or [B, T, K] per token.

        Raises:
            ValueError: the shape does not fit, or weights are not finite.
        """
        return self.routing.pin(self.routing.checked(weights))

    def merge(self, weights: Tensor | Sequence[float]) -> None:
        """Adds the static mixture of all LoRA adapters to the base weights, until `unmerge`.

        The model then computes what its base model does, at its cost. The weights that were there
        are kept on the CPU. (PEFT's `merge_adapter` adds the active adapters, and what its
        `unmerge_adapter` leaves differs by rounding.)

        Args:
            weights: [K], finite, one for each of `tasks`.

        Raises:
            ValueError: the weights do not fit, a layer's adapters cannot be mixed, or its weight
                is quantised, sharded, not here or shared; nothing has changed then.
            RuntimeError: adapters are merged already, by this or by PEFT.
        """
        self.routing.require_unmerged()
        weights = static_weights(weights, self.tasks)
        self.realign()
        report, addends = self.report, {}
        if report.skipped:
            raise ValueError(f"not all layers can be mixed, so none is merged. {report}")
        for path in report.patched:
            layer: Any = self._model.get_submodule(path)
            if not is_plain(layer):
                raise ValueError(f"{path}: Arrow weighs its adapters per token: nothing is merged")
            if layer.merged:
                raise RuntimeError(
                    f"{path}: adapters {layer.merged_adapters} are merged into the base weights: "
                    "call model.unmerge_adapter() first"
                )
            addends[path] = addend(layer, self.tasks, weights)
        self.routing.merged = Merged(addends, self._model)

    def unmerge(self) -> None:
        """Gives the base weights the bits that they had before `merge`; without it, does nothing.

        Raises:
            ValueError: the model was converted to another dtype since; nothing has changed then.
        """
        self.routing.unmerge()

    def realign(self) -> None:
        """Lets the layers mix that PEFT made since: adapters may come with layers of their own.

        Raises:
            RuntimeError: a mixture is merged, and adapters have come that would act beside it.
        """
        configs = list(self._model.peft_config.values())
        if len(configs) == len(self._configs) and not any(
            map(operator.is_not, configs, self._configs)
        ):
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "adapters have come since the last forward, maybe in layers that are not patched "
                "yet: run the model once without torch.compile"
            )
        if self.routing.merged is not None:
            _require_no_others(self._model)
        for layer in list(self._model.modules()):
            if pooled_kind(type(layer)) is not None and runs_its_class(layer):
                _swap(layer, self)
        self._configs = configs

    def names(self) -> tuple[str, ...]:
        """`tasks` as a tuple."""
        return tuple(self.tasks)

    def forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """Stands in for PEFT's `_enable_peft_forward_hooks`, whose hooks outlive an error inside.

        Raises:
            ValueError: adapter_names as well as weights.
            RuntimeError: adapter_names while a mixture is merged.
        """
        named = kwargs.get("adapter_names") is not None
        if named:
            self.routing.require_unmerged()
            if kwargs.get("mixture") is not None or self.routing.pinned is not None:
                raise ValueError(
                    "adapter_names: got names as well as weights (mixture= or fixed), expected one "
                    "of them"
                )
        tuner = self._model.base_model
        hooks: AbstractContextManager[None] = type(tuner)._enable_peft_forward_hooks(
            tuner, *args, **kwargs
        )
        return _closed(hooks) if named else hooks

    def _unload(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's `unload`, unless a mixture is merged, which would stay in the base weights."""
        self.routing.require_unmerged()
        tuner = self._model.base_model
        return type(tuner).unload(tuner, *args, **kwargs)

    def _merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's `merge_and_unload`, unless a mixture is merged: then nothing changes."""
        self.routing.require_unmerged()
        tuner = self._model.base_model
        return type(tuner).merge_and_unload(tuner, *args, **kwargs)

    def stand_ins(self) -> dict[str, Callable[..., Any]]:
        """By name, the methods that the model's tuner has in place of its own."""
        return {
            "_enable_peft_forward_hooks": self.forward_hooks,
            "unload": self._unload,
            "merge_and_unload": self._merge_and_unload,
        }

    def _route(self, **inputs: Tensor | None) -> Tensor:
        assert self.router is not None
        weights = self.router(**inputs)
        if not isinstance(weights, Tensor):
            raise TypeError(f"router: got {type(weights).__name__}, expected a tensor of weights")
        try:
            return self.routing.checked(weights)
        except ValueError as error:
            raise ValueError(f"router: {error}") from None

    def _has_router(self) -> bool:
        return self.router is not None

    def _count(self) -> int:
        return len(self.tasks)

    def extra_repr(self) -> str:
        return f"tasks={self.tasks}"


class _FunctionRouter(nn.Module):
    """A router that is a plain function."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, **inputs: Tensor | None) -> Tensor:
        return self.function(**inputs)


def patch_peft(model: PeftModel, *, strict: bool) -> None:
    """`patch` of a PEFT model; see there."""
    present = getattr(model, "sapt", None)
    if isinstance(present, PeftHandle):
        return
    if present is not None:
        raise ValueError(
            "model: the model inside the PeftModel is patched already; call sapt_fast.unpatch on it"
        )
    require_unrouted(model.get_base_model())
    handle = PeftHandle(model)
    if not handle.tasks:
        kinds = sorted({str(config.peft_type) for config in model.peft_config.values()})
        raise ValueError(f"model: got a PeftModel with adapters {kinds}, expected LoRA among them")
    report = handle.report
    plain = [
        layer
        for layer in model.modules()
        if pooled_kind(type(layer)) and runs_its_class(layer) and _can_mix(layer)
    ]
    _require_fitting(model)
    refused = {path: why for path, why in report.skipped.items() if why != _UNPATCHED}
    if not plain:
        raise ValueError(f"model: no LoRA layer can be computed in one pass: {refused}")
    if strict and refused:
        raise ValueError(f"strict: not everything can be patched: {refused}")
    handle.realign()
    for note in handle.report.notes:
        logger.warning("%s", note)
    model.sapt = handle
    vars(model.base_model).update(handle.stand_ins())
    handle.routing.install()


def _require_fitting(model: PeftModel) -> None:
    """Raises ValueError if an adapter's matrices do not fit its layer's inputs and outputs."""
    for path, layer in model.named_modules():
        if pooled_kind(type(layer)) is None:
            continue
        inputs, outputs = layer.in_features, layer.out_features
        for name in layer.lora_A:
            if any(
                stack[name].weight.is_meta and not is_offloaded(stack[name])
                for stack in (layer.lora_A, layer.lora_B)
            ) and is_offloaded(layer.get_base_layer()):
                raise ValueError(
                    f"{path}: adapter {name!r} has no values: PEFT made it on the meta device, "
                    "where the weights of an offloaded base model are. Load it with "
                    "PeftModel.from_pretrained, or let accelerate dispatch the PeftModel"
                )
            a, b = (stack[name].weight.shape for stack in (layer.lora_A, layer.lora_B))
            if a[1:] != (inputs,) or b != (outputs, a[0]):
                raise ValueError(
                    f"{path}: adapter {name!r} has A {tuple(a)} and B {tuple(b)}, expected "
                    f"[r, {inputs}] and [{outputs}, r]: it belongs to another base model"
                )


def unpatch_peft(model: PeftModel) -> None:
    """`unpatch` of a PEFT model; see there."""
    handle = model.sapt
    for path, layer in model.named_modules():
        if "sapt_routing" in vars(layer) and not _is_ours(layer):
            kind = type(layer)
            raise ValueError(
                f"{path}: got {kind.__module__}.{kind.__name__}, expected the layer that patch put "
                "there; undo first what another library did to the model since"
            )
    handle.routing.remove()
    for name in handle.stand_ins():
        del vars(model.base_model)[name]
    del model.sapt
    for layer in model.modules():
        if isinstance(layer, Pooled):
            _restore(layer)


@contextmanager
def _closed(context: AbstractContextManager[None]) -> Iterator[None]:
    """A context that ends as without an error even after one: PEFT's hooks go only then."""
    context.__enter__()
    try:
        yield
    finally:
        context.__exit__(None, None, None)


def _require_no_others(model: PeftModel) -> None:
    """Raises RuntimeError if layers that cannot be pooled have adapters: these act when merged."""
    for path, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or isinstance(layer, Pooled):
            continue
        if pooled_kind(type(layer)) is None and any(
            len(getattr(layer, name, ())) for name in layer.adapter_layer_names
        ):
            raise RuntimeError(
                f"{path}: {_why_not(layer)}, and has got adapters while a mixture is merged into "
                "the base weights, beside which they would act: call model.sapt.unmerge() first, "
                "or delete these adapters"
            )


_UNPATCHED = "not patched yet"


def _bases(model: PeftModel) -> list[str]:
    """The base models that the LoRA adapters say they belong to; folders count by their names."""
    named = {config.base_model_name_or_path for config in model.peft_config.values()}
    return sorted({str(name).rstrip("/").rpartition("/")[2] for name in named if name})


def _path_of(module: nn.Module, model: nn.Module) -> str:
    return next(path for path, found in model.named_modules() if found is module)


def _can_mix(layer: Any) -> bool:
    return is_plain(layer) or mixes_by_arrow(layer)


def _is_ours(layer: Any) -> bool:
    """Whether the layer is as `_swap` left it, and another library has not swapped it again."""
    kinds = [kind for kind in type(layer).__bases__ if kind is not Pooled]
    return isinstance(layer, Pooled) and pooled_kind(kinds[0]) is type(layer)


def _swap(layer: Any, handle: PeftHandle) -> None:
    layer.sapt_routing = handle.routing
    layer.sapt_names = handle.names
    kind = pooled_kind(type(layer))
    assert kind is not None
    become(layer, kind)  # last: other threads may be running the layer


def _restore(layer: Any) -> None:
    become(layer, next(k for k in type(layer).__bases__ if k is not Pooled))
    del layer.sapt_names, layer.sapt_routing


def _why_not(layer: Any) -> str:
    kind = type(layer)
    if not (issubclass(kind, Pooled) or pooled_kind(kind)):
        return f"{kind.__module__}.{kind.__name__} is not PEFT's LoRA layer over a linear one"
    if not runs_its_class(layer):
        return "its forward was replaced by another library"
    if _can_mix(layer):
        return _UNPATCHED
    if layer.lora_variant:
        return f"adapters with variants ({sorted(layer.lora_variant)}) are left to PEFT"
    if any(layer.lora_bias.values()):
        return "adapters with a bias are left to PEFT"
    return "its adapters have several dtypes"
