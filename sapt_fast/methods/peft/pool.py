"""The handle of PEFT models, whose LoRA adapters are computed as one pool."""

import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sapt_fast.devices import execution_device
from sapt_fast.methods.base import Handle
from sapt_fast.methods.config import MethodConfig
from sapt_fast.methods.peft.layers import OnePass
from sapt_fast.methods.peft.looks import Seen, Weighed, can_be_read, is_traced, version_of, weigh
from sapt_fast.methods.peft.placing import (
    can_mix,
    give_back,
    give_class,
    has_our_class,
    has_poolable,
    require_fitting,
    require_no_others,
    why_not,
)
from sapt_fast.methods.peft.pooled import Pooled
from sapt_fast.methods.peft.switched import (
    admit,
    choice,
    owners_of,
    require_mergeable,
    require_unmerged,
    switched_parts,
    why_switched,
)
from sapt_fast.methods.peft.wrappers import Chosen
from sapt_fast.routing.hooks import Routing, require_unrouted
from sapt_fast.sites.linear import runs_its_class
from sapt_fast.sites.merging import Merged, static_weights
from sapt_fast.sites.report import PatchReport
from sapt_fast.sites.towers import tower_notes
from sapt_fast.sites.warm import run_on_zeros
from sapt_fast.storage.pretrained_files import PeftFiles


@dataclass
class PeftPoolConfig(MethodConfig["PeftHandle"]):
    """The config of a patched PeftModel; it has no fields, its adapters keep their own configs."""

    @property
    def method(self) -> str:
        """The name of the method."""
        return "peft"


class PeftHandle(Handle):
    """`model.sapt` of a PEFT model: sets the weights that mix its LoRA adapters.

    By default the active adapters are summed, as in PEFT. Weights for all adapters, active or not,
    come from `fixed`, from the argument `mixture=` of the model's forward and `generate`, or from a
    router. Adapters that PEFT adds, loads, swaps or deletes are recognised automatically.

    Attributes:
        router: a module or function that returns the weights; None for the sum of the active
            adapters. A function is wrapped in a module; anything else raises TypeError.
            `router(input_ids=, inputs_embeds=, attention_mask=, labels=)` returns [1, K], [B, K]
            or, per token, [B, T, K]. For packed rows it is called with texts of equal length
            together, one text per row, without a mask.
        routing: the weights of the running forward.

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
        self._seen = Seen()
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
        """Returns PEFT's layers and wrappers whose class will be replaced by ours.

        Raises:
            ValueError: if the model inside is patched already, has no LoRA adapters, or has
                adapters that do not fit it.
        """
        if getattr(model, "sapt", None) is not None:
            raise ValueError(
                "model: the model inside the PeftModel is patched already; call sapt_fast.unpatch "
                "on it first"
            )
        require_unrouted(model.get_base_model())
        if not _lora_names(model):
            kinds = sorted({str(config.peft_type) for config in model.peft_config.values()})
            raise ValueError(
                f"model: got a PeftModel with adapters {kinds}, expected at least one of LoRA"
            )
        require_fitting(model)
        return PatchReport(patched=[path for path, _ in switched_parts(model)])

    def attach(self, path: str) -> None:
        """Swaps the class of a PEFT layer or wrapper for ours."""
        part = self._model.get_submodule(path)
        if runs_its_class(part):
            give_class(part, self)

    def detach(self, path: str) -> None:
        """Restores the class of a PEFT layer or wrapper."""
        give_back(self._model.get_submodule(path))

    def places(self) -> list[str]:
        """Returns the paths of all modules with a class of ours, including later ones."""
        modules = self._model.named_modules()
        return [path for path, part in modules if isinstance(part, (Pooled, Chosen))]

    def require_own(self) -> None:
        """Raises ValueError if another library has replaced a patched layer."""
        for path, layer in self._model.base_model.named_modules():
            if "sapt_routing" in vars(layer) and not has_our_class(layer):
                kind = type(layer)
                raise ValueError(
                    f"{path}: got {kind.__module__}.{kind.__name__}, expected the layer that patch "
                    "created; first undo what another library changed after patch"
                )

    def install(self) -> None:
        """Adds the hooks and replaces some of PEFT's methods.

        Raises:
            ValueError: if no layer can be computed in one pass.
        """
        self.realign()
        if not any(has_poolable(part) for _, part in self._parts):
            raise ValueError(
                f"model: no LoRA layer can be computed in one pass: {self.report.skipped}"
            )
        vars(self._model.base_model).update(self.stand_ins())
        self.routing.install()
        self.files.install()

    def run_layers(self, samples: int, tokens: int) -> None:
        """Runs the linear layers that one pass computes, with equal weights for all adapters."""
        count, train = len(self.tasks), torch.is_grad_enabled()
        parts: list[Any] = [part for _, part in self._parts if isinstance(part, OnePass)]
        for part in parts:
            if can_mix(part):
                like = [part.base_layer.weight, *part.lora_A.parameters()]
                device = execution_device(part.base_layer)
                weights = torch.full((samples, count), 1 / count, device=device)
                weights.requires_grad_(train)
                size = tokens, part.in_features
                run_on_zeros([part], self.routing, weights, size, like)

    def remove(self) -> None:
        """Removes the hooks and restores PEFT's methods."""
        self.routing.remove()
        self.files.remove()
        for name in self.stand_ins():
            vars(self._model.base_model).pop(name, None)

    def save_pretrained(self, directory: Any, *, is_main_process: bool | None = None) -> None:
        """Raises ValueError: use `save_pretrained` of the PeftModel, which saves its adapters."""
        raise ValueError(
            "model.sapt of a PeftModel cannot save, because PEFT stores the adapters: call "
            "model.save_pretrained"
        )

    @property
    def tasks(self) -> list[str]:
        """The names of the LoRA adapters, in the order of the weights."""
        return _lora_names(self._model)

    @property
    def report(self) -> PatchReport:
        """The layers that mix their adapters, and those that run through PEFT, with the reasons."""
        report = PatchReport()
        for path, part in switched_parts(self._model):
            if isinstance(part, Pooled) and can_mix(part):
                report.patched.append(path)
            elif isinstance(part, BaseTunerLayer) or owners_of(part):
                report.skipped[path] = why_not(part)
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

        The shape is [B, K], or [B, T, K] per token and for packed rows. For samples with choices
        [B, C, T], the first dimension is B * C.
        """
        weights = self.routing.weights
        return None if weights is None else weights.detach()

    def fixed(self, weights: Tensor) -> Any:
        """Returns a context in which these weights replace the router's, in this thread.

        Args:
            weights: [K] or [1, K] for every input, [B, K] per sample, or [B, T, K] per token. For
                samples with choices [B, C, T], [B, K] applies to all choices of a sample. For
                packed rows, [S, K] applies to their S texts.

        Raises:
            ValueError: if the shape does not fit.
            ValueError: if weights are not finite.
        """
        return self.routing.pin(self.routing.checked(weights))

    def merge(self, weights: Tensor | Sequence[float]) -> None:
        """Adds a static mixture of all LoRA adapters to the base weights, until `unmerge`.

        The merged model runs at the cost of the base model. The original base weights are kept on
        the CPU, so `unmerge` is exact. (PEFT's `merge_adapter` merges the active adapters, and its
        `unmerge_adapter` restores the base weights only up to rounding.)

        Args:
            weights: [K], finite, one for each of `tasks`.

        Raises:
            ValueError: if the weights do not fit.
            ValueError: if an adapter with weight has parts that cannot be merged (another variant,
                `modules_to_save`); nothing has changed then.
            ValueError: if a layer's base weight is quantised, sharded, not in memory, or shared
                with another module; nothing has changed then.
            RuntimeError: if adapters are merged already, by this method or by PEFT.
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
        """Restores the base weights of before `merge` bit for bit; does nothing if not merged.

        Raises:
            ValueError: if the model was converted to another dtype after `merge`; nothing has
                changed then.
        """
        self.routing.unmerge()

    def realign(self) -> None:
        """Patches the LoRA layers that PEFT created after `patch`; new adapters may add layers.

        Raises:
            RuntimeError: if torch.compile traces the model while the adapters have changed.
            RuntimeError: if a mixture is merged and new adapters would act in addition to it.
        """
        configs = list(self._model.peft_config.values())
        if len(configs) == len(self._configs) and not any(
            map(operator.is_not, configs, self._configs)
        ):
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "the adapters have changed since the last forward, so that some layers may not be "
                "patched yet: run the model once without torch.compile"
            )
        if self.routing.merged is not None:
            require_no_others(self._model)
        self._parts = switched_parts(self._model)
        for _, part in self._parts:
            if runs_its_class(part):
                give_class(part, self)
        self._configs = configs

    def names(self) -> tuple[str, ...]:
        """Returns `tasks` as a tuple."""
        return tuple(self.tasks)

    def weighed(self, weights: Tensor) -> Weighed:
        """Returns the adapters that have weight, and their columns.

        Returns all adapters if reading the weights would wait for a device.

        Args:
            weights: those of the running forward, [.., K].
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
        """Returns which adapter's copy of a wrapped module runs, for each sample or once for all.

        Args:
            part: the wrapper.

        Returns:
            A list of names (None for the module without adapters); None without weights, when PEFT
            decides.

        Raises:
            RuntimeError: if the weights do not determine one copy.
        """
        if self.routing.merged is not None:
            return [None]
        weights = None if self._seen.named else self.routing.running
        if weights is None:
            return None
        trains = weights.requires_grad and torch.is_grad_enabled()
        owners = None if trains else choice(part, weights, self.names())
        if owners is None:
            raise RuntimeError(
                f"mixture weights for a module that cannot be mixed: {why_switched(part)}"
            )
        return owners

    def _admit(self, weights: Tensor) -> None:
        """Raises RuntimeError, before a forward, if its weights cannot be applied everywhere."""
        seen = self._seen
        seen.weights = seen.at = seen.weighed = None  # their values may have changed in place
        if seen.named:  # names override a router
            return
        self._any_obstacle = admit(self._parts, weights, self.names())
        weighed = self.weighed(weights)
        seen.weights, seen.weighed = weights, weighed._replace(admitted=not self._any_obstacle)

    def forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """Replaces PEFT's `_enable_peft_forward_hooks`, which keeps its hooks after an error.

        Raises:
            ValueError: if a call has adapter_names as well as weights.
            RuntimeError: if it has adapter_names while a mixture is merged.
        """
        named = kwargs.get("adapter_names") is not None
        if named:
            self.routing.require_unmerged()
            if kwargs.get("mixture") is not None or self.routing.pinned is not None:
                raise ValueError(
                    "adapter_names: got names as well as weights (mixture= or fixed), expected "
                    "only one of them"
                )
        tuner = self._model.base_model
        hooks: AbstractContextManager[None] = type(tuner)._enable_peft_forward_hooks(
            tuner, *args, **kwargs
        )
        return self._seen.by_name(hooks) if named else hooks

    def _unload(self, *args: Any, **kwargs: Any) -> Any:
        """Calls PEFT's `unload`, then removes our hooks and classes.

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
        """Calls PEFT's `merge_and_unload`, then removes our hooks and classes.

        Raises:
            RuntimeError: if a mixture is merged; nothing has changed then.
            ValueError: if another library has replaced a method that patch put on the model;
                nothing has changed then.
        """
        self.routing.require_unmerged()
        self.routing.require_removable()
        tuner = self._model.base_model
        model = type(tuner).merge_and_unload(tuner, *args, **kwargs)
        self.leave()
        return model

    def stand_ins(self) -> dict[str, Callable[..., Any]]:
        """Returns the methods that replace those of the model's tuner, by name."""
        return {
            "_enable_peft_forward_hooks": self.forward_hooks,
            "unload": self._unload,
            "merge_and_unload": self._merge_and_unload,
        }

    def signal(self, **inputs: Tensor | None) -> Tensor:
        """Returns the router's weights [1, K], [B, K] or [B, T, K].

        Raises:
            TypeError: if the router returns something other than a tensor.
            ValueError: if the weights have another shape.
        """
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
    """A module around a router that is a plain function."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, **inputs: Tensor | None) -> Tensor:
        return self.function(**inputs)


def _lora_names(model: Any) -> list[str]:
    configs = model.peft_config.items()
    return [name for name, config in configs if config.peft_type == PeftType.LORA]


def _bases(model: PeftModel) -> list[str]:
    """Returns the base models named by the adapters' configs; of paths, the last part."""
    named = {config.base_model_name_or_path for config in model.peft_config.values()}
    return sorted({str(name).rstrip("/").rpartition("/")[2] for name in named if name})


def _path_of(module: nn.Module, model: nn.Module) -> str:
    return next(path for path, found in model.named_modules() if found is module)
