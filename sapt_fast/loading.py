"""Loading what `sapt_fast.storage.saving` saved: everything is checked before the model changes."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sapt_fast.files.directories import read_directory
from sapt_fast.handle import Adapter, SaptHandle
from sapt_fast.methods.sapt import SaptConfig, SaptRouter
from sapt_fast.methods.sapt_prompt import PromptHandle
from sapt_fast.patching import find_layers, layer_features, patch, require_pretrained, unpatch
from sapt_fast.sites.embeddings import prompt_place
from sapt_fast.sites.modules import (
    base_tensors,
    find_modules,
    module_tensors,
    require_present,
    whole_modules,
    with_prefix,
)
from sapt_fast.storage.adapter_config import require_lora_config, require_prompt_config
from sapt_fast.storage.base_model import require_base, require_model_type
from sapt_fast.storage.description import (
    CONFIG_FILE,
    MODULES_FILE,
    ROUTER_FILE,
    STRATEGY_FILE,
    check_description,
    is_sealed,
    per_layer,
    require_routed,
    require_sealed,
    stated_files,
    strategy_of,
)
from sapt_fast.storage.lora import LORA_FILES, owners, read_lora, require_shapes
from sapt_fast.storage.prompt import outer_layers, read_prompt
from sapt_fast.storage.tensors import (
    StoredFiles,
    read_tensors,
    require_finite,
)


@dataclass
class StoredTasks:
    """What a checkpoint holds, read and not yet in a model.

    Attributes:
        source: where it was read, for messages.
        names: of the K tasks, in learning order.
        adapters: of each task, by the path of each layer; or its prompt [P, D].
        keys: [K, D].
        router: the rest of the router's state_dict.
        targets: as `SaptHandle.targets`.
        trained: tensors of the base model, as `SaptHandle.trained_tensors`.
        modules: each task's copies of `config.modules_to_save`, with `config.modules_per_task`.
        files: the file that holds the router, the keys and the targets, for messages.
    """

    source: str
    config: SaptConfig
    names: list[str]
    adapters: Sequence[dict[str, Adapter] | Tensor]
    keys: Tensor
    router: dict[str, Tensor]
    targets: dict[str, Tensor]
    trained: dict[str, Tensor] = field(default_factory=dict)
    modules: Sequence[dict[str, Tensor]] = ()
    files: Mapping[str, str] = field(
        default_factory=lambda: dict.fromkeys(("router", "keys", "targets"), ROUTER_FILE)
    )

    def file(self, part: str) -> str:
        """The path of the file that holds "router", "keys" or "targets"."""
        return os.path.join(self.source, self.files[part])


def load_pretrained(model: PreTrainedModel, directory: str | os.PathLike[str]) -> PreTrainedModel:
    """Puts what `save_pretrained` saved into a model of the same base.

    The last task is then the trainable one, as after training it. Weights take the device
    of the model and the dtype that the stored config asks for on it. Everything is read and checked
    before the model changes.

    Args:
        model: not patched (it gets the stored config), or patched with the stored config and
            still without tasks.
        directory: written by `save_pretrained`, of `model.sapt` or of the model itself.

    Returns:
        model.

    Raises:
        TypeError: model is not a PreTrainedModel.
        FileNotFoundError: a file is missing.
        ValueError: the model has tasks or another config, is another base model; a file is
            damaged, hostile or not the one that was saved, does not fit the others, holds values
            that are not finite or a scaling above 2**30, or an adapter_config.json tells PEFT
            something else; or a continual strategy whose predictions are not those of SAPT's
            router trained the tasks.

    Example:
        >>> import sapt_fast, tempfile
        >>> from sapt_fast.demo.backbone import load_backbone
        >>> model = sapt_fast.patch(load_backbone())
        >>> model.sapt.add_task("first")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.sapt.save_pretrained(folder)
        ...     sapt_fast.load_pretrained(load_backbone(), folder).sapt.tasks
        ['first']
    """
    handle = _without_tasks(model)
    description, files = read_directory(directory, CONFIG_FILE, read_files)
    require_routed(strategy_of(description, files.folder), files.folder)
    return _put_in(model, _checked(model, handle, description, files))


def load_of_strategy(
    model: PreTrainedModel, directory: str | os.PathLike[str], strategy: str
) -> PreTrainedModel:
    """`load_pretrained` for the continual strategy that trained the tasks.

    Raises:
        ValueError: as `load_pretrained`, or another strategy trained them.
    """
    handle = _without_tasks(model)
    description, files = read_directory(directory, CONFIG_FILE, read_files)
    stored = strategy_of(description, files.folder)
    if stored not in (None, strategy):
        raise ValueError(
            f"{files.folder}: holds the adapters of strategy {stored!r}, expected {strategy!r}"
        )
    loaded: Any = _put_in(model, _checked(model, handle, description, files))
    loaded.sapt.strategy = strategy
    return model


def read_strategy_state(directory: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The `strategy_state` of a saved folder; empty if there is none.

    Raises:
        FileNotFoundError, ValueError: as `load_pretrained`.
    """
    description, files = read_directory(directory, CONFIG_FILE, read_files)
    if STRATEGY_FILE in files.digests:
        require_sealed(description, files)
        return files.tensors(STRATEGY_FILE)[0]
    if not is_sealed(description) and (files.folder / STRATEGY_FILE).is_file():
        return read_tensors(files.folder / STRATEGY_FILE)[0]
    return {}


def restore_values(handle: SaptHandle, directory: str | os.PathLike[str]) -> None:
    """Gives the tasks that a patched model has the values that they have in a saved folder.

    Args:
        handle: with the tasks and the config of the folder.
        directory: written by `save_pretrained`.

    Raises:
        FileNotFoundError, ValueError: as `load_pretrained`, or it holds other tasks.
    """
    model = handle._model
    description, files = read_directory(directory, CONFIG_FILE, read_files)
    stored = _checked(model, handle, description, files)
    if stored.names != handle.tasks:
        raise ValueError(
            f"{files.folder}: holds the tasks {stored.names}, but the model has {handle.tasks}"
        )
    with torch.no_grad():
        for k, adapters in enumerate(stored.adapters):
            if isinstance(adapters, Tensor):
                assert isinstance(handle, PromptHandle)
                handle.prompts.prompt(k).copy_(adapters)
                continue
            for path, pool in handle.pools.items():
                for own, value in zip(pool.adapter(k), adapters[path][:2], strict=True):
                    own.copy_(value)
        for k, modules in enumerate(stored.modules):
            for name, own in handle.task_modules.tensors(k).items():
                own.copy_(modules[name])
        handle.restore_trained(stored.trained)
        handle.router.keys.rows().copy_(stored.keys)
        handle.router.load_state_dict(stored.router, strict=False)
    handle.targets.clear()
    handle.targets.update({name: target.clone() for name, target in stored.targets.items()})


def read_files(folder: Path) -> tuple[dict[str, Any], StoredFiles]:
    files = StoredFiles(folder)
    files.take(CONFIG_FILE)
    description = check_description(files.json(CONFIG_FILE), folder / CONFIG_FILE)
    for name in stated_files(description):
        files.take(name)
    return description, files


def _checked(
    model: PreTrainedModel,
    handle: SaptHandle | None,
    description: dict[str, Any],
    files: StoredFiles,
) -> StoredTasks:
    """The content of a saved folder, parsed and checked by itself and against the model."""
    folder, source = files.folder, files.folder / CONFIG_FILE
    require_model_type(model, description["base_model"], source)
    try:
        config = SaptConfig.from_dict(description["config"])
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: config: {error}") from error
    layers = adapted_layers(model, handle, config, source)
    trained, modules = _read_modules(files, len(description["tasks"]))
    require_base(model, layers, description["base_model"], source, trained)

    names = [task["name"] for task in description["tasks"]]
    beside = _beside(model, config, layers, trained)
    adapters: list[dict[str, Adapter] | Tensor] = []
    for task in description["tasks"]:
        if config.adapter == "prompt":
            length, width = config.prompt_length, _width(model)
            adapters.append(read_prompt(files, task["name"], length, width))
            continue
        where = f"{source}: task {task['name']!r}"
        ranks = per_layer(task, "rank", layers, where)
        scaling = per_layer(task, "scaling", layers, where)
        shapes = {path: (ranks[path], *layers[path]) for path in layers}
        weights = read_lora(files, task["name"], shapes, beside)
        adapters.append({path: (*weights[path], float(scaling[path])) for path in layers})
    router, _ = files.tensors(ROUTER_FILE)
    targets = {n.removeprefix("targets."): t for n, t in router.items() if n.startswith("targets.")}
    router = {n: t for n, t in router.items() if not n.startswith("targets.")}
    keys = router.pop("keys", torch.empty(0))
    stored = StoredTasks(
        str(folder), config, names, adapters, keys, router, targets, trained, modules
    )
    _require_fits(model, handle, stored)
    _require_same_in_peft(model, stored, files, beside, is_sealed(description))
    require_sealed(description, files)
    return stored


def _read_modules(
    files: StoredFiles, count: int
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The trained tensors of the base model, and those of the modules of each of `count` tasks."""
    if MODULES_FILE not in files.digests:
        return {}, [{} for _ in range(count)]
    tensors, _ = files.tensors(MODULES_FILE)
    shared = with_prefix(tensors, "shared.")
    own = [with_prefix(tensors, f"tasks.{index}.") for index in range(count)]
    if len(shared) + sum(map(len, own)) != len(tensors):
        raise ValueError(
            f"{files.folder / MODULES_FILE}: holds {len(tensors)} tensors, of which "
            f"{len(shared) + sum(map(len, own))} are of {count} tasks and of what they share"
        )
    return shared, own


def _beside(
    model: Any, config: SaptConfig, layers: Collection[str], trained: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """The shapes of what a task's folder holds beside its LoRA, for PEFT."""
    if config.adapter == "prompt":
        return {}
    paths, _ = whole_modules(trained, layers)
    paths += _own_paths(model, config, layers)
    try:
        tensors = module_tensors(model, paths)
    except AttributeError as error:
        raise ValueError(f"model: has not the module that the tasks came with: {error}") from None
    return {name: tuple(t.shape) for name, t in tensors.items() if t.is_floating_point()}


def _own_paths(model: Any, config: SaptConfig, layers: Collection[str]) -> list[str]:
    """The modules of which each task has a copy."""
    if not config.modules_per_task:
        return []
    patched = [] if config.adapter == "prompt" else list(layers)
    return find_modules(model, config.modules_to_save or (), patched)


def _require_modules(model: Any, layers: Collection[str], stored: StoredTasks) -> None:
    source = f"{stored.source}, {MODULES_FILE}"
    require_present(source, stored.trained, model)
    _require_finite_here(source, stored.trained, base_tensors(model))
    own = module_tensors(model, _own_paths(model, stored.config, layers))
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    for name, tensors in zip(stored.names, stored.modules, strict=False):
        found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        if found != shapes:
            raise ValueError(
                f"{source}: task {name!r} has modules of shapes {found}, expected {shapes}"
            )
        _require_finite_here(f"{source}, task {name!r}", tensors, own)


def _require_finite_here(
    source: str, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> None:
    """Raises ValueError if a value is not finite in the dtype that the model has for it."""
    require_finite(source, {name: tensor.to(own[name].dtype) for name, tensor in tensors.items()})


def _require_same_in_peft(
    model: PreTrainedModel,
    stored: StoredTasks,
    files: StoredFiles,
    beside: Collection[str],
    sealed: bool,
) -> None:
    """Raises ValueError if PEFT would compute something else from a task's folder."""
    modules = [n for n, _ in model.named_modules() if not n.startswith("sapt.")]
    modules = [name for name in modules if ".sapt_pool" not in name]
    for name, adapters in zip(stored.names, stored.adapters, strict=True):
        config = files.folder / name / LORA_FILES[0]
        values = files.json(f"{name}/{LORA_FILES[0]}")
        if isinstance(adapters, Tensor):
            length, width = adapters.shape
            require_prompt_config(config, values, length, width, sealed=sealed)
            continue
        present = {
            layer: (len(a), scaling) for layer, (a, _, scaling) in adapters.items() if len(a)
        }
        require_lora_config(
            config,
            values,
            present,
            modules,
            transposed=any(isinstance(model.get_submodule(layer), Conv1D) for layer in present),
            dropout=stored.config.lora_dropout,
            expected={"modules_to_save": owners(beside)},
            sealed=sealed,
        )


def install(model: Any, stored: StoredTasks) -> PreTrainedModel:
    """Checks the names and shapes of stored tasks against a model and puts them in.

    Args:
        model: not patched, or patched with the stored config and without tasks.

    Returns:
        model, patched.

    Raises:
        TypeError, ValueError: as `load_pretrained`; the model is then unchanged.
    """
    _require_fits(model, _without_tasks(model), stored)
    return _put_in(model, stored)


def _require_fits(model: Any, handle: SaptHandle | None, stored: StoredTasks) -> None:
    layers = adapted_layers(model, handle, stored.config, stored.source)
    for name, adapters in zip(stored.names, stored.adapters, strict=True):
        tensors: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        if isinstance(adapters, Tensor):
            shapes = {"prompt": (stored.config.prompt_length, _width(model))}
            require_shapes(f"{stored.source}, task {name!r}", {"prompt": adapters}, shapes)
            continue
        if odd := sorted(set(adapters) ^ set(layers)):
            raise ValueError(
                f"{stored.source}: task {name!r} has adapters for other layers than those that "
                f"the config chooses: {odd[0]} and {len(odd) - 1} more are in one but not in both"
            )
        for path, (inputs, outputs) in layers.items():
            a, b, _ = adapters[path]
            tensors |= {f"{path} A": a, f"{path} B": b}
            shapes |= {f"{path} A": (len(a), inputs), f"{path} B": (len(a), outputs)}
        require_shapes(f"{stored.source}, task {name!r}", tensors, shapes)
    width = _width(model)
    empty = SaptRouter(width, stored.config, device=torch.device("meta"))
    expected = (handle.router if handle else empty).state_dict()
    shapes = {n: tuple(t.shape) for n, t in expected.items() if not n.startswith("keys.")}
    require_shapes(f"{stored.file('router')}, router", stored.router, shapes)
    keys = {"keys": (len(stored.names), width)}
    require_shapes(f"{stored.file('keys')}, router", {"keys": stored.keys}, keys)
    require_targets(f"{stored.file('targets')}, targets", stored.targets, stored.names)
    _require_modules(model, layers, stored)
    _require_values(model, stored)


def _require_values(model: Any, stored: StoredTasks) -> None:
    """Raises ValueError if a value is not finite, in the dtype that it will have."""
    dtype = stored.config.adapter_dtype(model.get_input_embeddings().weight.dtype)
    for name, adapters in zip(stored.names, stored.adapters, strict=True):
        source = f"{stored.source}, task {name!r}"
        if isinstance(adapters, Tensor):
            require_finite(source, {"prompt": adapters.to(dtype)})
            continue
        for path, (a, b, _) in adapters.items():
            require_finite(source, {f"{path} A": a.to(dtype), f"{path} B": b.to(dtype)})
    parts = {"router": stored.router, "keys": {"keys": stored.keys}, "targets": stored.targets}
    for part, tensors in parts.items():
        cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        require_finite(f"{stored.file(part)}, {part}", cast)


def _put_in(model: Any, stored: StoredTasks) -> PreTrainedModel:
    handle = _without_tasks(model)
    if handle is None:
        patch(model, stored.config)
    try:
        with torch.no_grad():
            _fill(model.sapt, stored)
    except BaseException:
        if handle is None:
            unpatch(model)
        raise
    return model


def _fill(handle: SaptHandle, stored: StoredTasks) -> None:
    own = stored.modules if stored.config.modules_per_task else [None] * len(stored.names)
    parts = zip(stored.names, stored.adapters, stored.keys, own, strict=True)
    for name, adapters, key, modules in parts:
        handle.put_task(name, adapters, key, modules)
    handle.router.load_state_dict(stored.router, strict=False)
    handle.targets.update({name: target.clone() for name, target in stored.targets.items()})
    handle.restore_trained(stored.trained)


def _without_tasks(model: Any) -> SaptHandle | None:
    require_pretrained(model)
    handle = getattr(model, "sapt", None)
    if not isinstance(handle, SaptHandle):
        return None
    if handle.tasks:
        raise ValueError(
            f"model: already has the tasks {handle.tasks}; call sapt_fast.unpatch(model) first"
        )
    return handle


def adapted_layers(
    model: PreTrainedModel,
    handle: SaptHandle | None,
    config: SaptConfig,
    source: str | os.PathLike[str],
) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of each layer that is patched, or would be with this config.

    With prompts none is; then of the layers that tell one base model from another.
    """
    if handle is not None:
        own, new = _jsonable(handle.config), _jsonable(config)
        differing = sorted(name for name in own if own[name] != new[name])
        if differing:
            raise ValueError(
                f"model: patched with another config than {source}, they differ in "
                + ", ".join(f"{n} ({own[n]!r} here, {new[n]!r} there)" for n in differing)
                + "; call sapt_fast.unpatch(model) first"
            )
    if config.adapter == "prompt":
        prompt_place(model)
        paths = outer_layers(model)
    else:
        report = find_layers(model, config) if handle is None else handle.report
        paths = report.patched
    return {path: layer_features(model.get_submodule(path)) for path in paths}


def _width(model: Any) -> int:
    """D, of the input embeddings."""
    return model.get_input_embeddings().weight.shape[1]


def _jsonable(config: SaptConfig) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_dict(), default=sorted))


def require_targets(source: str, targets: Mapping[str, Tensor], names: list[str]) -> None:
    for name, target in targets.items():
        if name not in names:
            raise ValueError(f"{source}: got one for {name!r}, expected tasks among {names}")
        shape = (names.index(name) + 1,)
        if tuple(target.shape) != shape or not target.is_floating_point():
            raise ValueError(
                f"{source}: {name!r} has {target.dtype} of shape {tuple(target.shape)}, expected "
                f"floats of shape {shape}"
            )
