"""patch(model): find the layers, swap them, report; unpatch(model): put everything back."""

from __future__ import annotations

import logging
from typing import Any, TypeVar, cast

from torch import nn
from transformers import PreTrainedModel

from sapt_fast.methods.base import Handle, handles
from sapt_fast.methods.config import MethodConfig
from sapt_fast.methods.registry import handle_type
from sapt_fast.pools.own import is_inside, own_paths
from sapt_fast.routing.hooks import require_unrouted
from sapt_fast.sites.find import linear_names, require_placement
from sapt_fast.sites.report import PatchReport

logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=nn.Module)  # a PreTrainedModel or a PeftModel
_Handle = TypeVar("_Handle", bound=Handle)


def patch(
    model: _Model, config: MethodConfig[Any] | None = None, *, strict: bool = False
) -> _Model:
    """Patches a transformers or PEFT model in place so that it mixes a pool of adapters.

    The chosen linear layers keep their weights, their place and their state_dict keys; the model
    gains `model.sapt`, the handle with the tasks, the router and the losses. The base parameters
    are frozen. Until the first `model.sapt.add_task(name)` the model's output is unchanged.

    With `SaptConfig(adapter="prompt")` no layer changes: each input's mixture of prompts is written
    before its embeddings, and masks, positions, labels and logits stay as long as its tokens.

    The config of another method puts that method on the model, with a handle of its own. Several
    methods may be on one model if they do not touch it in the same place.

    A PeftModel keeps its LoRA adapters: they are the pool, computed in one pass, and all that PEFT
    does with them works on. Its `model.sapt`, a `methods.peft.pool.PeftHandle`, takes weights or a
    router; without either the active adapters are added up, as before. Its parameters stay where
    they are; its `unload` and `merge_and_unload` take our hooks off with the adapters.

    Args:
        model: a PreTrainedModel, or a PeftModel of one with LoRA adapters. Patching it again with
            an equal config (or none) changes nothing.
        config: of the method. Defaults to `SaptConfig()`; must be None for a PeftModel, whose
            adapters keep their own PEFT configs.
        strict: raise if any layer that matches `target_modules` cannot be patched, or a name in
            it matches nothing.

    Returns:
        model.

    Raises:
        TypeError: if model is neither of them, or config is not the config of a method.
        ValueError: if nothing matches; if the model is patched with another config, or with a
            method that this one would clash with; if its layers do not see the batch first; if it
            has no table of token embeddings, cannot take prompts, is sharded or not initialised
            (LazyLinear); if accelerate's hooks would change adapters; if a PeftModel has no LoRA
            adapters or comes with a config; if PEFT's layers are in a model that is no PeftModel;
            if the hooks of an earlier patch are still there; and for what `strict` adds. Nothing
            has changed then.

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
    if config is not None and not isinstance(config, MethodConfig):
        raise TypeError(
            f"config: got {type(config).__name__}, expected a sapt_fast.SaptConfig or the config "
            "of another method"
        )
    if is_peft_model(model):
        if config is not None:
            raise ValueError(
                "config must be None for a PeftModel: its adapters keep their own PEFT configs"
            )
        require_pretrained(given.get_base_model())
        kind = handle_type(_peft_method(given), "model")
    else:
        require_pretrained(model)
        kind = handle_type("sapt" if config is None else config.method, "config")
    present = given._modules.get(kind.attribute)
    if isinstance(present, Handle):
        if config is not None and config != present.config:
            raise ValueError(
                "config: the model is patched with another config; call sapt_fast.unpatch(model) "
                f"first (has {present.config}, got {config})"
            )
        return model
    _put_on(given, kind, kind.Config() if config is None else config, strict)
    return model


def handle(model: nn.Module, config: type[MethodConfig[_Handle]]) -> _Handle:
    """The handle of a method on a model: `model.<attribute>`, with its type.

    Args:
        model: patched.
        config: the class of the method's config.

    Raises:
        ValueError: if the model is not patched with this method.

    Example:
        >>> import sapt_fast
        >>> from sapt_fast.demo.backbone import load_backbone
        >>> model = sapt_fast.patch(load_backbone())
        >>> sapt_fast.handle(model, sapt_fast.SaptConfig) is model.sapt
        True
    """
    for found in handles(model):
        if type(found.config) is config:
            return cast(_Handle, found)
    here = [type(found.config).__name__ for found in handles(model)]
    raise ValueError(
        f"model: not patched with {config.__name__} (it is patched with {', '.join(here) or 'none'}"
        "); call sapt_fast.patch(model, config) first"
    )


def unpatch(model: _Model, method: str | None = None) -> _Model:
    """Undoes `patch`: classes, methods, hooks and requires_grad are as before; adapters are gone.

    Args:
        model: patched.
        method: takes off the one whose handle is `model.<method>`; None for all of them.

    Raises:
        ValueError: if the model is not patched (with this method), it is sharded, or another
            library has replaced patched layers. Nothing has changed then.
        RuntimeError: if a mixture is merged into the base weights; nothing has changed then.

    Example:
        >>> import sapt_fast
        >>> from sapt_fast.demo.backbone import load_backbone
        >>> model = sapt_fast.unpatch(sapt_fast.patch(load_backbone()))
        >>> hasattr(model, "sapt")
        False
    """
    given: Any = model
    present = handles(model)
    leaving = [one for one in present if method in (None, one.attribute)]
    if not leaving:
        named = "" if method is None else f" with {method!r}"
        here = ", ".join(one.attribute for one in present)
        raise ValueError(
            f"model: not patched{named} by sapt_fast.patch" + (f" (it has {here})" if here else "")
        )
    require_placement(given)
    for one in leaving:
        one.require_unmerged()
        one.require_own()
    for one in present[present.index(leaving[0]) :]:  # whose hooks are taken off
        one.require_removable()
    for one in reversed(leaving):
        _take_off(given, one)
    return model


def _put_on(model: Any, kind: type[Handle], config: Any, strict: bool) -> None:
    """Patches a model with a method that it does not have; it is as before if that fails."""
    others = handles(model)
    if not others and kind.freezes:
        require_unrouted(model)
        _refuse_adapters_inside(model)
    require_placement(model)
    report = kind.sites(model, config)
    if hasattr(model, kind.attribute):
        raise ValueError(
            f"model: this {type(model).__name__} has an attribute {kind.attribute!r} of its own, "
            f"where the handle of {kind.method!r} would be; rename it"
        )
    _refuse_clash(kind, report, others)
    _require_all(model, report, strict)
    method = kind(model, config, report)
    _refuse_second_routing(method, others)
    attached: list[str] = []
    frozen: list[nn.Parameter] = []
    installing = False
    try:
        for path in list(report.patched):
            method.attach(path)
            attached.append(path)
        _require_all(model, method.report, strict)
        if kind.freezes and not others:
            own = own_paths(model)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and not is_inside(name, own):
                    method.unfrozen_before.append(name)
                    frozen.append(parameter.requires_grad_(False))
        setattr(model, kind.attribute, method)
        installing = True
        method.install()
    except BaseException:
        if installing:
            method.remove()
        model._modules.pop(kind.attribute, None)
        for parameter in frozen:
            parameter.requires_grad_(True)
        for path in attached:
            method.detach(path)
        raise
    described = method.report
    if described.unmatched:
        logger.warning("target_modules: nothing in the model is named %s", described.unmatched)
    for note in described.notes:
        logger.warning("%s: %s", type(model).__name__, note)
    logger.info("%s: %s", type(model).__name__, str(described).splitlines()[0])


def _take_off(model: Any, leaving: Handle) -> None:
    """Takes one method off; hooks of methods that were patched later are laid anew without it."""
    present = handles(model)
    later = present[present.index(leaving) + 1 :]
    for one in reversed(later):
        one.remove()
    leaving.leave()
    remaining = handles(model)
    if leaving.freezes:
        own = own_paths(model)
        before = set() if remaining else set(leaving.unfrozen_before)
        if leaving.unfrozen_before or not remaining:
            for name, parameter in model.named_parameters():
                if not is_inside(name, own):
                    parameter.requires_grad_(name in before)
        if remaining:
            remaining[0].unfrozen_before += leaving.unfrozen_before
    for one in later:
        one.install()


def _require_all(model: nn.Module, report: PatchReport, strict: bool) -> None:
    if strict and (report.skipped or report.unmatched):
        raise ValueError(
            f"strict: not everything can be patched. {report}. Its linear layers are named: "
            f"{linear_names(model)}"
        )


def _refuse_clash(kind: type[Handle], report: PatchReport, others: list[Handle]) -> None:
    """Raises ValueError if another method touches the model in the same place and way."""
    for other in others:
        shared = [p for p in report.places if p in set(other.report.places)]
        if other.site == kind.site and shared:
            raise ValueError(
                f"config: {kind.method!r} and {other.method!r}, which the model is patched with, "
                f"would both act at {shared[0]} ({kind.site}; {len(shared)} places in all); leave "
                f"these out, or call sapt_fast.unpatch(model, {other.attribute!r}) first"
            )


def _refuse_second_routing(method: Handle, others: list[Handle]) -> None:
    """Raises ValueError if weights of two methods would travel with one forward.

    Caches and encoder outputs carry one method's weights, and so does `mixture=`.
    """
    routed = next((other for other in others if other.routing is not None), None)
    if method.routing is not None and routed is not None:
        raise ValueError(
            f"config: {method.method!r} and {routed.method!r}, which the model is patched with, "
            "both mix by weights that travel with the forward; one model can have one such method: "
            f"call sapt_fast.unpatch(model, {routed.attribute!r}) first"
        )


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


def _peft_method(model: Any) -> str:
    """The name of the method for the kind of PeftModel."""
    from peft.tuners.xlora import XLoraModel

    return "xlora" if isinstance(model.base_model, XLoraModel) else "peft"


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
