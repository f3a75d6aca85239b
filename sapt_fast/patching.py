"""patch(model) finds the layers, swaps their classes and reports; unpatch(model) undoes it."""

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

    The selected linear layers keep their weights, paths and state_dict keys. The model gets a
    handle, `model.sapt`, with the tasks, the router and the losses. The base parameters are frozen.
    Until the first `model.sapt.add_task(name)`, the model's output is unchanged.

    With `SaptConfig(adapter="prompt")` no layer changes: each input's mixture of prompts is
    inserted before its embeddings. Masks, positions, labels and logits keep their lengths.

    The config of another method patches the model with that method, which has its own handle. One
    model supports several methods if they do not change the same place.

    A PeftModel keeps its LoRA adapters: they become the pool, computed in one pass, and PEFT's own
    functions keep working. Its `model.sapt` (a `methods.peft.pool.PeftHandle`) accepts weights or a
    router; without either, the active adapters are summed, as in PEFT. Parameters are not replaced.
    `unload` and `merge_and_unload` remove our hooks together with the adapters.

    Args:
        model: a PreTrainedModel, or a PeftModel of one with LoRA adapters. Patching it again with
            an equal config (or none) changes nothing.
        config: the method's config. Defaults to `SaptConfig()`; must be None for a PeftModel, whose
            adapters keep their own PEFT configs.
        strict: whether to raise if a layer that matches `target_modules` cannot be patched, or if a
            name in `target_modules` matches no layer.

    Returns:
        model.

    Raises:
        TypeError: if model or config has another type.
        ValueError: if no layer matches.
        ValueError: if the model is patched with another config.
        ValueError: if it is patched with a method that changes the same place, or that also mixes
            by weights of the forward.
        ValueError: if the first dimension of its layers' inputs is not the batch.
        ValueError: if it has no table of token embeddings, or does not support prompts.
        ValueError: if it is sharded, not initialised (LazyLinear), or has hooks of accelerate that
            would change adapters.
        ValueError: if a PeftModel has no LoRA adapters, or config is not None for it.
        ValueError: if the model contains PEFT's layers but is not a PeftModel, or has hooks of an
            earlier patch.
        ValueError: with `strict`, if a layer cannot be patched or a name matches no layer.

    Nothing has changed after an error.

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
    _require_config(config)
    if is_peft_model(model):
        if config is not None and config.method != "sapt":
            raise ValueError(
                f"config: got {type(config).__name__} for a PeftModel, which this method cannot "
                "patch: call model.merge_and_unload() and patch the model that it returns"
            )
        if config is not None:
            raise ValueError(
                "config must be None for a PeftModel: its adapters keep their own PEFT configs"
            )
        require_pretrained(given.get_base_model())
        kind = handle_type(_peft_method(given), "model")
    else:
        require_pretrained(model)
        kind = handle_type("sapt" if config is None else config.method, "config").of_model(model)
    config = config if config is None else kind.settled(model, config)
    present = given._modules.get(kind.attribute)
    if isinstance(present, Handle):
        if config is not None and config != present.config:
            raise ValueError(
                "config: the model is patched with another config; call sapt_fast.unpatch(model) "
                f"first (got {config}, expected {present.config})"
            )
        return model
    _put_on(given, kind, kind.Config() if config is None else config, strict)
    return model


def _require_config(config: object) -> None:
    if config is not None and not isinstance(config, MethodConfig):
        raise TypeError(
            f"config: got {type(config).__name__}, expected a sapt_fast.SaptConfig or the config "
            "of another method"
        )


def handle(model: nn.Module, config: type[MethodConfig[_Handle]]) -> _Handle:
    """Returns the handle of a method on a model, `model.<attribute>`, with its type.

    Args:
        model: a patched model.
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
    """Undoes `patch`: restores classes, methods, hooks and requires_grad, and deletes adapters.

    Args:
        model: a patched model.
        method: the attribute name of the handle to remove (`model.<method>`); None for all.

    Returns:
        model.

    Raises:
        ValueError: if the model is not patched (with this method).
        ValueError: if it is sharded.
        ValueError: if another library has replaced patched layers.
        RuntimeError: if a mixture is merged into the base weights.

    Nothing has changed after an error.

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
    """Patches a model with a method that it does not have; undoes everything on an error."""
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
        logger.warning("target_modules: no module of the model is named %s", described.unmatched)
    for note in described.notes:
        logger.warning("%s: %s", type(model).__name__, note)
    logger.info("%s: %s", type(model).__name__, str(described).splitlines()[0])


def _take_off(model: Any, leaving: Handle) -> None:
    """Removes one method; reinstalls the hooks of methods that were patched after it."""
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
    """Raises ValueError if another method of the same kind changes the same place."""
    for other in others:
        shared = [p for p in report.places if p in set(other.report.places)]
        if other.site == kind.site and shared:
            raise ValueError(
                f"config: {kind.method!r} cannot be added, because it would change {shared[0]} "
                f"({kind.site}; {len(shared)} places in all), which {other.method!r} has patched "
                f"already; exclude them, or call sapt_fast.unpatch(model, {other.attribute!r}) "
                "first"
            )


def _refuse_second_routing(method: Handle, others: list[Handle]) -> None:
    """Raises ValueError if two methods would compute mixture weights for one forward.

    Caches, encoder outputs and `mixture=` support the weights of one method.
    """
    routed = next((other for other in others if other.routing is not None), None)
    if method.routing is not None and routed is not None:
        raise ValueError(
            f"config: {method.method!r} cannot be added, because it computes mixture weights of "
            f"the forward and so does {routed.method!r}, with which the model is patched; a model "
            "supports one such method: call "
            f"sapt_fast.unpatch(model, {routed.attribute!r}) first"
        )


def _refuse_adapters_inside(model: PreTrainedModel) -> None:
    """Raises ValueError if a model that is not a PeftModel contains PEFT's layers."""
    inside = (name for name, module in model.named_modules() if _is_adapted(module))
    first = next(inside, None)
    if first is None:
        return
    if getattr(model, "_hf_peft_config_loaded", False):
        adapters = list(getattr(model, "peft_config", ()))
        raise ValueError(
            f"model: transformers put adapters {adapters} inside this {type(model).__name__} "
            "(add_adapter or load_adapter); expected a PeftModel. Save each adapter: "
            "model.set_adapter(name); model.save_pretrained(folder). Then load the base model "
            "again, load the first adapter with model = peft.PeftModel.from_pretrained(base, "
            "folder, adapter_name=name) and the others with model.load_adapter(folder, name), and "
            "patch that model"
        )
    raise ValueError(
        f"model: {first} of this {type(model).__name__} is a PEFT layer; pass the PeftModel that "
        "contains it (returned by peft.get_peft_model or PeftModel.from_pretrained). If adapters "
        "were injected without a PeftModel, load them with PeftModel.from_pretrained"
    )


def _is_adapted(module: nn.Module) -> bool:
    """Returns whether a module is a PEFT layer or wrapper, without importing PEFT."""
    names = {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("peft.")}
    return not names.isdisjoint(("BaseTunerLayer", "AuxiliaryTrainingWrapper"))


def _peft_method(model: Any) -> str:
    """Returns the name of the method for a kind of PeftModel."""
    from peft.tuners.xlora import XLoraModel

    return "xlora" if isinstance(model.base_model, XLoraModel) else "peft"


def is_peft_model(model: object) -> bool:
    """Returns whether model is a PeftModel; imports PEFT only if it may be."""
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
