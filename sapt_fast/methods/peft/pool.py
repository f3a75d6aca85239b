"""patch and unpatch for PEFT models: their LoRA adapters become one pool."""

import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sapt_fast.devices import is_offloaded
from sapt_fast.methods.base import Handle
from sapt_fast.methods.config import MethodConfig
from sapt_fast.methods.peft.layers import OnePass, mixes_by_arrow, pooled_kind
from sapt_fast.methods.peft.looks import Weighed, can_be_read, is_traced, version_of, weigh
from sapt_fast.methods.peft.parts import why_not_plain
from sapt_fast.methods.peft.pooled import Pooled, pefts_kind
from sapt_fast.methods.peft.switched import (
    admit,
    choice,
    owners_of,
    require_mergeable,
    require_unmerged,
    switched_parts,
    why_switched,
)
from sapt_fast.methods.peft.wrappers import CHOSEN_KINDS, Chosen, wrapped_kind
from sapt_fast.routing.hooks import Routing, require_unrouted
from sapt_fast.sites.linear import become, runs_its_class
from sapt_fast.sites.merging import Merged, static_weights
from sapt_fast.sites.report import PatchReport
from sapt_fast.sites.towers import tower_notes
from sapt_fast.storage.pretrained_files import PeftFiles


@dataclass
class PeftPoolConfig(MethodConfig["PeftHandle"]):
    """The config of a patched PeftModel: none, its adapters have their own."""

    @property
    def method(self) -> str:
        """The name of the method."""
        return "peft"


class PeftHandle(Handle):
    """model.sapt of a PEFT model: which weights its LoRA adapters are mixed by.

    By default the active adapters are added up, as PEFT does. `fixed`, the argument `mixture=` of
    the model's forward and `generate`, or a router give weights for all adapters instead, whether
    active or not. Adapters that PEFT adds, loads, swaps or deletes join and leave by themselves.

    Attributes:
        router: a module or function that gives the weights; None for the sum of the active
            adapters. A function is kept inside a module; anything else raises TypeError.
            `router(input_ids=, inputs_embeds=, attention_mask=, labels=)` returns [1, K], [B, K]
            or, per token, [B, T, K]. Of packed rows it is given texts of equal length together,
            each in a row of its own, without a mask.
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

    Config = PeftPoolConfig
    method = "peft"
    attribute = "sapt"
    site = "linear"
    freezes = False
    router: nn.Module | None
    routing: Routing

    def __init__(self, model: Any, config: Any, report: PatchReport) -> None:
        super().__init__(model, config, report)
        inner = model.get_base_model()
        self.routing = Routing(inner, self.signal, self._has_router, self._count)
        self.routing.pools.append(self)
        self.routing.admit = self._admit
        self.files = PeftFiles(self)
        self._configs: list[Any] = []
        self._parts: list[tuple[str, Any]] = []
        self._any_obstacle = False
        self._seen = _Seen()
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

    # --- where the adapters are: in PEFT's layers ---

    @classmethod
    def sites(cls, model: Any, config: Any) -> PatchReport:
        """PEFT's layers and wrappers that get a class of ours."""
        if getattr(model, "sapt", None) is not None:
            raise ValueError(
                "model: the model inside the PeftModel is patched already; call sapt_fast.unpatch "
                "on it"
            )
        require_unrouted(model.get_base_model())
        if not _lora_names(model):
            kinds = sorted({str(config.peft_type) for config in model.peft_config.values()})
            raise ValueError(
                f"model: got a PeftModel with adapters {kinds}, expected LoRA among them"
            )
        _require_fitting(model)
        return PatchReport(patched=[path for path, _ in switched_parts(model)])

    def attach(self, path: str) -> None:
        """Gives a layer or wrapper of PEFT's its class."""
        part = self._model.get_submodule(path)
        if runs_its_class(part):
            _swap(part, self)

    def detach(self, path: str) -> None:
        """Gives a layer or wrapper PEFT's class back."""
        _restore(self._model.get_submodule(path))

    def places(self) -> list[str]:
        """The paths of all parts that have a class of ours; PEFT may have added some since."""
        modules = self._model.named_modules()
        return [path for path, part in modules if isinstance(part, (Pooled, Chosen))]

    def require_own(self) -> None:
        """Raises ValueError if another library has replaced a patched layer."""
        for path, layer in self._model.base_model.named_modules():
            if "sapt_routing" in vars(layer) and not _is_ours(layer):
                kind = type(layer)
                raise ValueError(
                    f"{path}: got {kind.__module__}.{kind.__name__}, expected the layer that patch "
                    "put there; undo first what another library did to the model since"
                )

    def install(self) -> None:
        """Adds the hooks and stands in for some of PEFT's methods.

        Raises:
            ValueError: if no layer can be computed in one pass.
        """
        self.realign()
        if not any(_has_poolable(part) for _, part in self._parts):
            raise ValueError(
                f"model: no LoRA layer can be computed in one pass: {self.report.skipped}"
            )
        vars(self._model.base_model).update(self.stand_ins())
        self.routing.install()
        self.files.install()

    def remove(self) -> None:
        """Takes hooks and stand-ins away."""
        self.routing.remove()
        self.files.remove()
        for name in self.stand_ins():
            vars(self._model.base_model).pop(name, None)

    def save_pretrained(self, directory: Any, *, is_main_process: bool | None = None) -> None:
        """Not possible: PEFT saves its adapters, by `save_pretrained` of the PeftModel.

        Raises:
            ValueError: always.
        """
        raise ValueError("model.sapt of a PeftModel: save the adapters by model.save_pretrained")

    @property
    def tasks(self) -> list[str]:
        """Names of the LoRA adapters, in the order of the weights."""
        return _lora_names(self._model)

    @property
    def report(self) -> PatchReport:
        """The layers that mix now, and what of the adapters is left to PEFT and why."""
        report = PatchReport()
        for path, part in switched_parts(self._model):
            if isinstance(part, Pooled) and _can_mix(part):
                report.patched.append(path)
            elif isinstance(part, BaseTunerLayer) or owners_of(part):
                report.skipped[path] = _why_not(part)
        bases = _bases(self._model)
        inner = self._model.get_base_model()
        prefix = f"{_path_of(inner, self._model)}."
        report.notes += tower_notes(inner, [p.removeprefix(prefix) for p in report.patched])
        if len(bases) > 1:
            report.notes.append(f"the adapters name several base models: {bases}")
        return report

    @property
    def attention(self) -> Tensor | None:
        """Weights of this thread's last forward, detached; None if it had none.

        [B, K], or per token [B, T, K], as for packed rows; samples with choices count C times.
        """
        weights = self.routing.weights
        return None if weights is None else weights.detach()

    def fixed(self, weights: Tensor) -> Any:
        """A context in which these weights stand in for the router's, in this thread.

        Args:
            weights: [K] or [1, K] for every input, [B, K] per sample or [B, T, K] per token. Where
                samples have choices [B, C, T], [B, K] is for all choices of a sample; of packed
                rows, [S, K] is for their S texts.

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
            ValueError: the weights do not fit; an adapter with weight has parts that cannot be
                merged (another variant, `modules_to_save`); or a layer's weight is quantised,
                sharded, not here or shared; nothing has changed then.
            RuntimeError: adapters are merged already, by this or by PEFT.
        """
        self.routing.require_unmerged()
        weights = static_weights(weights, self.tasks)
        self.realign()
        adapters, kept, _ = weigh(weights, self.names())
        require_mergeable(self._parts, set(adapters))
        addends = {}
        for path, layer in self._parts:
            require_unmerged(path, layer)
            held = layer.sapt_adapters() if isinstance(layer, Pooled) else {}
            if any(name in held for name in adapters):
                try:
                    addends[path] = layer.sapt_addend(adapters, kept)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}; nothing is merged") from None
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
        self._parts = switched_parts(self._model)
        for _, part in self._parts:
            if runs_its_class(part):
                _swap(part, self)
        self._configs = configs

    def names(self) -> tuple[str, ...]:
        """`tasks` as a tuple."""
        return tuple(self.tasks)

    def weighed(self, weights: Tensor) -> Weighed:
        """The adapters with any weight and their columns; all of them where a look would wait.

        Args:
            weights: the running ones, [.., K].
        """
        seen = self._seen
        if seen.weights is weights and seen.weighed is not None and self.routing.is_running:
            return seen.weighed
        names, version = self.names(), version_of(weights)
        if seen.weights is weights and seen.at == (version, names) and seen.weighed is not None:
            return seen.weighed._replace(admitted=False)
        train = weights.requires_grad and torch.is_grad_enabled()
        waits = self._any_obstacle and not train and not is_traced(weights)
        if not can_be_read(weights) and not waits:
            return Weighed(names, weights)
        weighed = weigh(weights, names)
        if version is not None:
            seen.weights, seen.at, seen.weighed = weights, (version, names), weighed
        return weighed

    @torch.compiler.disable(reason="the values of the weights decide whose copy runs")
    def owners(self, part: Any) -> list[str | None] | None:
        """Whose copy of a wrapped module runs: one entry for each sample, or one for all.

        None without weights, when PEFT decides.
        """
        if self.routing.merged is not None:
            return [None]
        weights = None if self._seen.named else self.routing.running
        if weights is None:
            return None
        trains = weights.requires_grad and torch.is_grad_enabled()
        owners = None if trains else choice(part, weights, self.names())
        if owners is None:
            raise RuntimeError(f"mixture weights for a module that has none: {why_switched(part)}")
        return owners

    def _admit(self, weights: Tensor) -> None:
        """Before a forward: raises RuntimeError if its weights do not reach all that they must."""
        seen = self._seen
        seen.weights = seen.at = seen.weighed = None  # their values may have changed in place
        if seen.named:  # names go before a router
            return
        self._any_obstacle = admit(self._parts, weights, self.names())
        weighed = self.weighed(weights)
        seen.weights, seen.weighed = weights, weighed._replace(admitted=not self._any_obstacle)

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
        return self._seen.by_name(hooks) if named else hooks

    def _unload(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's `unload`, after which nothing of ours is left.

        Raises:
            RuntimeError: if a mixture is merged, which would stay in the base weights.
            ValueError: if another library has replaced a method that patch put on the model.
        """
        self.routing.require_unmerged()
        self.routing.require_removable()
        tuner = self._model.base_model
        model = type(tuner).unload(tuner, *args, **kwargs)
        self.leave()
        return model

    def _merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's `merge_and_unload`, after which nothing of ours is left.

        Raises:
            RuntimeError: if a mixture is merged; nothing has changed then.
            ValueError: if another library has replaced a method that patch put on the model;
                likewise.
        """
        self.routing.require_unmerged()
        self.routing.require_removable()
        tuner = self._model.base_model
        model = type(tuner).merge_and_unload(tuner, *args, **kwargs)
        self.leave()
        return model

    def stand_ins(self) -> dict[str, Callable[..., Any]]:
        """By name, the methods that the model's tuner has in place of its own."""
        return {
            "_enable_peft_forward_hooks": self.forward_hooks,
            "unload": self._unload,
            "merge_and_unload": self._merge_and_unload,
        }

    def signal(self, **inputs: Tensor | None) -> Tensor:
        """The router's weights [1, K], [B, K] or [B, T, K]."""
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


def _lora_names(model: Any) -> list[str]:
    configs = model.peft_config.items()
    return [name for name, config in configs if config.peft_type == PeftType.LORA]


def _require_fitting(model: PeftModel) -> None:
    """Raises ValueError if a plain adapter's matrices do not fit its layer over a linear one."""
    for path, layer in switched_parts(model):
        if not issubclass(pooled_kind(type(layer)) or object, OnePass):
            continue
        inputs, outputs = layer.in_features, layer.out_features
        for name in layer.lora_A:
            if why_not_plain(layer, [name]) is not None:
                continue  # PEFT's own: block-diagonal matrices, say, have other shapes
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


class _Seen(threading.local):
    """What this thread's forward found in its weights.

    Attributes:
        weights: those looked at. at: their version and the adapters then. weighed: the adapters
            that have any.
        named: whether `adapter_names` run, which go before a router.
    """

    def __init__(self) -> None:
        # Present from the start: a compiled forward is compiled again where one appears.
        self.weights: Tensor | None = None
        self.at: tuple[int, tuple[str, ...]] | None = None
        self.weighed: Weighed | None = None
        self.named = False

    @contextmanager
    def by_name(self, hooks: AbstractContextManager[None]) -> Iterator[None]:
        """PEFT's hooks for `adapter_names`, which are taken off even after an error."""
        hooks.__enter__()
        before, self.named = self.named, True
        try:
            yield
        finally:
            self.named = before
            hooks.__exit__(None, None, None)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


def _require_no_others(model: PeftModel) -> None:
    """Raises RuntimeError if layers that cannot be pooled have adapters: these act when merged."""
    for path, layer in switched_parts(model):
        owned = isinstance(layer, (Pooled, Chosen)) or _own_kind(type(layer)) is not None
        if not owned and owners_of(layer):
            raise RuntimeError(
                f"{path}: {_why_not(layer)}, and has got adapters while a mixture is merged into "
                "the base weights, beside which they would act: call model.sapt.unmerge() first, "
                "or delete these adapters"
            )


_UNPATCHED = "not patched yet"
_REPLACED = "its forward was replaced by another library"


def _bases(model: PeftModel) -> list[str]:
    """The base models that the LoRA adapters say they belong to; folders count by their names."""
    named = {config.base_model_name_or_path for config in model.peft_config.values()}
    return sorted({str(name).rstrip("/").rpartition("/")[2] for name in named if name})


def _path_of(module: nn.Module, model: nn.Module) -> str:
    return next(path for path, found in model.named_modules() if found is module)


def _can_mix(layer: Any) -> bool:
    return layer.sapt_why_not() is None or _by_arrow(layer)


def _by_arrow(layer: Any) -> bool:
    return isinstance(layer, OnePass) and mixes_by_arrow(layer)


def _has_poolable(part: Any) -> bool:
    """Whether it is a pooled layer, and some of its adapters can be computed in one pass."""
    if not isinstance(part, Pooled):
        return False
    return _by_arrow(part) or any(
        part.sapt_why_not([name]) is None for name in part.sapt_adapters()
    )


def _own_kind(kind: type) -> type | None:
    """The class that a layer or wrapper of PEFT's class `kind` gets; None if it keeps that."""
    return pooled_kind(kind) or CHOSEN_KINDS.get(kind)


def _before(kind: type) -> type:
    return wrapped_kind(kind) if issubclass(kind, Chosen) else pefts_kind(kind)


def _is_ours(part: Any) -> bool:
    """Whether it is as `_swap` left it, and another library has not swapped it again."""
    kind = type(part)
    return isinstance(part, (Pooled, Chosen)) and _own_kind(_before(kind)) is kind


def _swap(part: Any, handle: PeftHandle) -> None:
    """Gives a layer or wrapper its class; one of ours that PEFT has copied, this model's handle."""
    kind = type(part) if isinstance(part, (Pooled, Chosen)) else _own_kind(type(part))
    if kind is None:
        return
    part.sapt_routing = handle.routing
    if issubclass(kind, Chosen):
        part.sapt_owners = handle.owners
    else:
        part.sapt_weighed = handle.weighed
    become(part, kind)  # last: other threads may be running the layer


def _restore(part: Any) -> None:
    become(part, _before(type(part)))
    for name in ("sapt_routing", "sapt_owners", "sapt_weighed"):
        vars(part).pop(name, None)


def _why_not(part: Any) -> str:
    if not isinstance(part, (Pooled, Chosen)) and _own_kind(type(part)) is not None:
        return _UNPATCHED if runs_its_class(part) else _REPLACED
    if not isinstance(part, Pooled):
        return why_switched(part)
    return part.sapt_why_not() or _REPLACED
