"""patch(model): find the layers, swap them, report; unpatch(model): put everything back."""

import logging
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from transformers import PreTrainedModel

from sapt_fast.devices import execution_device, require_supported_hooks
from sapt_fast.handle import SaptHandle
from sapt_fast.methods.sapt import SaptConfig
from sapt_fast.methods.sapt_prompt import PromptHandle
from sapt_fast.pools.lora import AdapterPool
from sapt_fast.pools.sharding import is_sharded
from sapt_fast.routing.hooks import Routing, require_unrouted
from sapt_fast.sites.find import all_linear, bypass, layer_features, linear_names, obstacle
from sapt_fast.sites.linear import (
    InputGroup,
    MixedLinear,
    base_kind,
    become,
    mixed_kind,
    packed_weight,
    runs_its_class,
)
from sapt_fast.sites.modules import find_modules, heads
from sapt_fast.sites.report import PatchReport
from sapt_fast.sites.towers import token_embedding, tower_notes

logger = logging.getLogger(__name__)

# Where all layers are such, unlike Longformer's some, whose first real batch raises.
_SEQUENCE_FIRST = ("fsmt", "xlnet")

# Layers of one parent that are called one after the other on one input, in models whose attention
# and feed-forward layers are known to do so.
_ONE_INPUT = (
    ("q", "k", "v"),
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wi_0", "wi_1"),
    ("gate_proj", "up_proj"),
)
_ONE_INPUT_MODELS = (
    *("bart", "bert", "gemma", "gemma2", "llama", "mbart", "mistral"),
    *("mt5", "qwen2", "qwen3", "roberta", "t5", "umt5"),
)
_CROSS_ATTENTION = ("EncDecAttention", "encoder_attn", "crossattention")


_Model = TypeVar("_Model", bound=nn.Module)  # a PreTrainedModel or a PeftModel


def patch(model: _Model, config: SaptConfig | None = None, *, strict: bool = False) -> _Model:
    """Makes a transformers or PEFT model mix a pool of adapters, in place.

    The chosen linear layers keep their weights, their place and their state_dict keys; the model
    gains `model.sapt`, the handle with the tasks, the router and the losses. The base parameters
    are frozen. Until the first `model.sapt.add_task(name)` the model computes what it did before.

    With `SaptConfig(adapter="prompt")` no layer changes: each input's mixture of prompts is written
    before its embeddings, and masks, positions, labels and logits stay as long as its tokens.

    A PeftModel keeps its LoRA adapters: they are the pool, computed in one pass, and all that PEFT
    does with them works on. Its `model.sapt`, a `peft_models.patching.PeftHandle`, takes weights
    or a router; without either the active adapters are added up, as before. Its parameters stay
    where they are; its `unload` and `merge_and_unload` take our hooks off with the adapters.

    Args:
        model: a PreTrainedModel, or a PeftModel of one with LoRA adapters. Patching it again with
            an equal config (or none) changes nothing.
        config: None for `SaptConfig()`; a PeftModel takes none, its adapters have theirs.
        strict: raise if any layer that matches `target_modules` cannot be patched, or a name in
            it matches nothing.

    Returns:
        model.

    Raises:
        TypeError: model is neither of them, or config is no SaptConfig.
        ValueError: nothing matches, the model is patched with another config, its layers do not
            see the batch first, it has no table of token embeddings, it cannot take prompts, it is
            sharded, not initialised (LazyLinear), or accelerate's hooks would change adapters; a
            PeftModel has no LoRA adapters or is given a config; PEFT's layers are in a model that
            is no PeftModel; the hooks of an earlier patch are still there; and what `strict` adds.

    Example:
        >>> import sapt_fast, transformers
        >>> config = transformers.T5Config(
        ...     vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        >>> model = sapt_fast.patch(transformers.T5ForConditionalGeneration(config))
        >>> model.sapt.add_task("first")
        >>> model.sapt.tasks
        ['first']
    """
    given: Any = model
    if config is not None and not isinstance(config, SaptConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected a sapt_fast.SaptConfig")
    if not is_peft_model(model):
        return _patch_pretrained(given, config, strict)
    if config is not None:
        raise ValueError(
            "config: got one for a PeftModel, whose adapters have theirs; expected None"
        )
    require_pretrained(given.get_base_model())
    _require_placement(given)
    patch_peft, _ = _peft_functions(given)
    patch_peft(given, strict=strict)
    return model


def _patch_pretrained(model: Any, config: SaptConfig | None, strict: bool) -> Any:
    require_pretrained(model)
    handle = getattr(model, "sapt", None)
    if handle is None:
        require_unrouted(model)
        _refuse_adapters_inside(model)
    if isinstance(handle, SaptHandle):
        if config is not None and config != handle.config:
            raise ValueError(
                "config: the model is patched with another config; call sapt_fast.unpatch(model) "
                f"first (has {handle.config}, got {config})"
            )
        return model
    config = config or SaptConfig()
    frozen = [name for name, p in model.named_parameters() if p.requires_grad]
    if config.adapter == "prompt":
        _require_placement(model)
        handle = PromptHandle(model, config)
    else:
        handle = _mix_layers(model, config, strict)
    for _, parameter in model.named_parameters():
        parameter.requires_grad_(False)
    handle.unfrozen_before = frozen
    unsaved = [path for path in heads(model) if path not in (config.modules_to_save or ())]
    if unsaved:
        handle.report.notes.append(
            f"{', '.join(unsaved)} stays as it is: it is frozen now; to train a head and save it "
            f"with the tasks, name it in SaptConfig(modules_to_save={unsaved})"
        )
        logger.warning("%s: %s", type(model).__name__, handle.report.notes[-1])
    model.sapt = handle
    handle.install()
    logger.info("%s: %s", type(model).__name__, str(handle.report).splitlines()[0])
    return model


def _mix_layers(model: Any, config: SaptConfig, strict: bool) -> SaptHandle:
    """The handle of a model whose chosen layers mix their adapters from now on."""
    embedding_dtype = token_embedding(model).weight.dtype
    report = find_layers(model, config)
    named = f"{report}. Its linear layers are named: {linear_names(model)}"
    if strict and (report.skipped or report.unmatched):
        raise ValueError(f"strict: not everything can be patched. {named}")
    if not report.patched:
        raise ValueError(
            f"target_modules: {_targets(model, config)!r} leaves no layer to patch in "
            f"{type(model).__name__}. {named}"
        )
    handle = SaptHandle(model, config, report)
    for name in report.patched:
        layer: Any = model.get_submodule(name)
        _swap(layer, handle.routing, config, embedding_dtype)
        handle.routing.pools.append(layer.sapt_pool)
    _group_by_input(model, report.patched)
    if report.unmatched:
        logger.warning("target_modules: nothing in the model is named %s", report.unmatched)
    for note in report.notes:
        logger.warning("%s", note)
    return handle


def unpatch(model: _Model) -> _Model:
    """Undoes `patch`: classes, methods, hooks and requires_grad are as before; adapters are gone.

    Raises:
        ValueError: the model is not patched, it is sharded, or another library has replaced
            patched layers. Nothing has changed then.
        RuntimeError: a mixture is merged into the base weights; likewise.

    Example:
        >>> import sapt_fast
        >>> from sapt_fast.demo.backbone import load_backbone
        >>> model = sapt_fast.unpatch(sapt_fast.patch(load_backbone()))
        >>> hasattr(model, "sapt")
        False
    """
    given: Any = model
    handle: Any = getattr(given, "sapt", None)
    peft = handle is not None and is_peft_model(model)
    if not peft and not isinstance(handle, SaptHandle):
        raise ValueError("model: not patched by sapt_fast.patch")
    _require_placement(given)
    routing = getattr(handle, "routing", None)  # X-LoRA has none
    if routing is not None:
        routing.require_unmerged()
    if peft:
        _, unpatch_peft = _peft_functions(given)
        unpatch_peft(given)
        return model
    layers = handle.layers
    handle.remove()
    del given.sapt
    for layer in layers.values():
        _restore(layer)
    for name, parameter in given.named_parameters():
        parameter.requires_grad_(name in handle.unfrozen_before)
    return model


def _refuse_adapters_inside(model: PreTrainedModel) -> None:
    """Raises ValueError if PEFT's layers are in a model that no PeftModel wraps, as given here."""
    inside = (name for name, module in model.named_modules() if _is_adapted(module))
    first = next(inside, None)
    if first is None:
        return
    if getattr(model, "_hf_peft_config_loaded", False):
        adapters = list(getattr(model, "peft_config", ()))
        raise ValueError(
            f"model: transformers put adapters {adapters} inside this {type(model).__name__} "
            "(add_adapter or load_adapter); expected a PeftModel, which keeps them together. Save "
            "each: model.set_adapter(name); model.save_pretrained(folder). Then load the base "
            "model anew, load the first by model = peft.PeftModel.from_pretrained(base, folder, "
            "adapter_name=name) and others by model.load_adapter(folder, name), and patch that"
        )
    raise ValueError(
        f"model: {first} of this {type(model).__name__} is a layer of PEFT's; pass the PeftModel "
        "around it (what peft.get_peft_model or PeftModel.from_pretrained returned). Adapters that "
        "were injected without one have to be loaded into one by PeftModel.from_pretrained"
    )


def _is_adapted(module: nn.Module) -> bool:
    """Whether it is a layer or wrapper of PEFT's; PEFT is not loaded for that."""
    names = {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("peft.")}
    return not names.isdisjoint(("BaseTunerLayer", "AuxiliaryTrainingWrapper"))


def _require_placement(model: PreTrainedModel) -> None:
    require_supported_hooks(model)
    lazy = next((name for name, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise ValueError(
            f"model: {lazy} is not initialised yet; run the model once before sapt_fast.patch"
        )
    if is_sharded(model):
        raise ValueError(
            "model: its parameters are sharded (fully_shard or ZeRO-3); patch, load and add tasks "
            "before that. To take the adapters off, save them with model.sapt.save_pretrained and "
            "build the model anew"
        )


def _peft_functions(model: Any) -> tuple[Callable[..., None], Callable[..., None]]:
    """(patch, unpatch) for the kind of PeftModel."""
    from peft.tuners.xlora import XLoraModel

    if isinstance(model.base_model, XLoraModel):
        from sapt_fast.methods.peft.xlora import patch_xlora, unpatch_xlora

        return patch_xlora, unpatch_xlora
    from sapt_fast.methods.peft.pool import patch_peft, unpatch_peft

    return patch_peft, unpatch_peft


def is_peft_model(model: object) -> bool:
    """Whether model is PEFT's; PEFT is loaded only if it may be."""
    if not any(kind.__module__.startswith("peft.") for kind in type(model).__mro__):
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def require_pretrained(model: object) -> None:
    """Raises TypeError unless model is a PreTrainedModel."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: got {type(model).__name__}, expected a transformers PreTrainedModel or a "
            "PeftModel of one"
        )


def find_layers(model: PreTrainedModel, config: SaptConfig) -> PatchReport:
    """What `patch` would patch and skip; changes nothing. Raises as `patch` does."""
    _require_placement(model)
    kind = model.config.model_type
    if kind in _SEQUENCE_FIRST:
        raise ValueError(
            f"model: the layers of {kind!r} models see tokens first and samples second, so a batch "
            "as long as its texts would mix the wrong ones; expected another model type"
        )
    report, targets = PatchReport(), _targets(model, config)
    bypassed: dict[str, None] = {}
    for name, module in model.named_modules():
        if not _matches(name, targets):
            continue
        path, _, last = name.rpartition(".")
        parent = model.get_submodule(path)
        reason = _unpatchable(module, parent, last)
        if reason is not None:
            report.skipped[name] = reason
            continue
        report.patched.append(name)
        if reader := bypass(parent, last):
            bypassed[f"{reader}.{last}"] = None
    if not isinstance(targets, str):
        if not isinstance(targets, frozenset):
            found = [*report.patched, *report.skipped]
            report.unmatched = [t for t in targets if not any(_matches(n, [t]) for n in found)]
        report.notes += tower_notes(model, report.patched)
    if bypassed:
        report.notes.append(
            f"target_modules: the model also reads the weights of {', '.join(bypassed)} without "
            "calling these layers, in some cases; their adapters then do nothing"
        )
    return report


def _targets(model: PreTrainedModel, config: SaptConfig) -> Iterable[str] | str:
    """Names or a regular expression, or the whole paths of all linear layers as a frozenset."""
    targets = config.target_modules
    names = [targets] if isinstance(targets, str) else list(targets or ())
    if [name.lower() for name in names] == ["all-linear"]:
        saved = find_modules(model, config.modules_to_save or (), ())
        inside = tuple(f"{path}." for path in saved)
        return frozenset(n for n in all_linear(model) if not f"{n}.".startswith(inside))
    if targets is not None:
        return targets
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as defaults

    kind = model.config.model_type
    if kind not in defaults:
        raise ValueError(
            f"target_modules: no default for model type {kind!r}; name the linear layers to adapt "
            f"(this model has: {linear_names(model)})"
        )
    return defaults[kind]


def _matches(name: str, targets: Iterable[str] | str) -> bool:
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, name) is not None
        except re.error as error:
            raise ValueError(
                f"target_modules: {targets!r} is no regular expression: {error}"
            ) from None
    if isinstance(targets, frozenset):
        return name in targets
    return any(name == target or name.endswith("." + target) for target in targets)


def _unpatchable(module: nn.Module, parent: nn.Module, name: str) -> str | None:
    reason = obstacle(module, parent, name)
    if reason is None and not runs_its_class(module):
        return "its forward was replaced by another library"
    return reason


def _swap(module: Any, routing: Routing, config: SaptConfig, embedding_dtype: torch.dtype) -> None:
    packed = packed_weight(module)
    dtype = module.weight.dtype if packed is None else embedding_dtype
    module.sapt_pool = AdapterPool(
        *layer_features(module),
        reserve=config.reserve_tasks * config.r,
        device=execution_device(module),
        dtype=config.adapter_dtype(dtype),
    )
    module.sapt_routing = routing
    module.sapt_dropout = config.lora_dropout
    module.sapt_grad_through_frozen = config.grad_through_frozen
    kind = mixed_kind(module)
    assert kind is not None  # as `find_layers` saw
    become(module, kind)


def _group_by_input(model: PreTrainedModel, patched: Iterable[str]) -> None:
    """Lets layers with one input be computed together."""
    if model.config.model_type not in _ONE_INPUT_MODELS:
        return
    layers = set(patched)
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in layers):
        crosses = not set(parent.split(".")).isdisjoint(_CROSS_ATTENTION)
        for names in _ONE_INPUT:
            alike = names[1:] if crosses and len(names) == 3 else names  # queries see the decoder
            paths = [f"{parent}.{name}" for name in alike]
            members = [model.get_submodule(path) for path in paths if path in layers]
            linear = [member for member in members if isinstance(member, MixedLinear)]
            if len(linear) > 1:
                group = InputGroup(linear)
                for layer in linear:
                    layer.sapt_group = group


def _restore(module: Any) -> None:
    become(module, base_kind(module))
    for name in ("sapt_pool", "sapt_routing", "sapt_dropout", "sapt_grad_through_frozen"):
        delattr(module, name)
    vars(module).pop("sapt_group", None)
