"""Saving and loading a patched model's tasks: one PEFT adapter each, the router, the settings.

In a saved directory, `<task>/` is a folder that PEFT loads by itself, router.safetensors holds the
query projection, keys [K, D] and targets.<task> [k], and sapt_config.json the SaptConfig, the tasks
in learning order, what tells the base model from others and digests (see `sapt_fast.description`).
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sapt_fast._base_model import describe_base, require_base, require_model_type
from sapt_fast._files import atomic_write_text, read_directory, replace_directory
from sapt_fast.adapter_config import require_lora_config, require_prompt_config
from sapt_fast.description import (
    CONFIG_FILE,
    ROUTER_FILE,
    STRATEGY_FILE,
    check_description,
    describe,
    is_sealed,
    per_layer,
    read_description,
    require_routed,
    require_sealed,
    seal,
    stated_files,
    strategy_of,
)
from sapt_fast.handle import Adapter, SaptHandle
from sapt_fast.merging import static_weights
from sapt_fast.methods.sapt import SaptConfig, SaptRouter
from sapt_fast.patching import find_layers, layer_features, patch, require_pretrained, unpatch
from sapt_fast.peft_format import (
    LORA_FILES,
    read_lora,
    read_metadata,
    require_shapes,
    task_mark,
    write_lora,
)
from sapt_fast.pool import RowStack
from sapt_fast.prompt_format import outer_layers, read_prompt, write_prompt
from sapt_fast.prompts.patching import PromptHandle
from sapt_fast.prompts.routing import prompt_place
from sapt_fast.sharding import is_sharded, whole
from sapt_fast.stored_files import (
    StoredFiles,
    digest_of_file,
    read_tensors,
    require_finite,
    write_tensors,
)

_EXPORT_MARK = {"sapt_fast": "export_adapter"}


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
    """

    source: str
    config: SaptConfig
    names: list[str]
    adapters: Sequence[dict[str, Adapter] | Tensor]
    keys: Tensor
    router: dict[str, Tensor]
    targets: dict[str, Tensor]


def save_pretrained(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    is_main_process: bool | None = None,
    state: Mapping[str, Tensor] | None = None,
    strategy_state: Mapping[str, Tensor] | None = None,
) -> None:
    """Saves the tasks, the router and the settings of a patched model.

    The folder is replaced as a whole: a kill at any point leaves the old or the new one, which
    `load_pretrained` finds, and several processes take turns (see
    `sapt_fast._files.replace_directory`). sapt_config.json holds digests of all files.

    Args:
        model: patched, with at least one task.
        directory: what an earlier call wrote there is replaced, other files stay.
        is_main_process: whether this process writes; only one may at a time. None: if it calls,
            but of a sharded model, for which all processes must call, rank 0 alone.
        state: the model's state_dict, whose values are saved in place of those that it has now.
        strategy_state: what a continual strategy remembers beside the adapters; for
            `read_strategy_state`.

    Raises:
        ValueError: the model is not patched, has no task, or its targets do not fit its tasks; the
            directory cannot be replaced, or holds a sapt_config.json that is damaged.
        FileExistsError: a file that this function has not written is in the way.
        RuntimeError: a mixture is merged into the base weights, by which the base model is known
            again.
        TimeoutError: another process keeps the folder locked.
        OSError: it cannot be written; it is then as it was.
    """
    handle = _patched(model)
    handle.routing.require_unmerged()
    _require_targets("targets", handle.targets, handle.tasks)
    router = _router_tensors(handle, state)
    for name, target in handle.targets.items():
        router[f"targets.{name}"] = target.float()
    adapters = _adapters(handle, state)
    description = _description(model, handle, state)
    if not _writes(model, is_main_process):
        return
    with replace_directory(directory, _written) as folder:
        write = write_prompt if isinstance(handle, PromptHandle) else write_lora
        for name, adapter in zip(handle.tasks, adapters, strict=True):
            write(folder / name, model, adapter, task_mark(name))
        write_tensors(folder / ROUTER_FILE, router)
        if strategy_state:
            write_tensors(folder / STRATEGY_FILE, strategy_state)
        _write_description(folder, description)


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
    description, files = read_directory(directory, CONFIG_FILE, _read_files)
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
    description, files = read_directory(directory, CONFIG_FILE, _read_files)
    stored = strategy_of(description, files.folder)
    if stored not in (None, strategy):
        raise ValueError(
            f"{files.folder}: holds the adapters of strategy {stored!r}, expected {strategy!r}"
        )
    _put_in(model, _checked(model, handle, description, files))
    model.sapt.strategy = strategy
    return model


def read_strategy_state(directory: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The `strategy_state` of a saved folder; empty if there is none.

    Raises:
        FileNotFoundError, ValueError: as `load_pretrained`.
    """
    description, files = read_directory(directory, CONFIG_FILE, _read_files)
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
    description, files = read_directory(directory, CONFIG_FILE, _read_files)
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
        handle.router.keys.rows().copy_(stored.keys)
        handle.router.load_state_dict(stored.router, strict=False)
    handle.targets.clear()
    handle.targets.update({name: target.clone() for name, target in stored.targets.items()})


def renew_digests(directory: str | os.PathLike[str]) -> None:
    """Notes the digests of a saved folder's files anew, after they were edited on purpose.

    Args:
        directory: written by `save_pretrained`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: sapt_config.json is damaged.
    """
    description, files = read_directory(directory, CONFIG_FILE, _read_files)
    if not is_sealed(description):
        raise ValueError(f"{files.folder}: an earlier version saved it, which has no digests")
    digests = {name: files.digests[name] for name in stated_files(description)}
    atomic_write_text(files.folder / CONFIG_FILE, seal(description, digests))


def _read_files(folder: Path) -> tuple[dict[str, Any], StoredFiles]:
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
    layers = _layers(model, handle, config, source)
    require_base(model, layers, description["base_model"], source)

    names = [task["name"] for task in description["tasks"]]
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
        weights = read_lora(files, task["name"], shapes)
        adapters.append({path: (*weights[path], float(scaling[path])) for path in layers})
    router, _ = files.tensors(ROUTER_FILE)
    targets = {n.removeprefix("targets."): t for n, t in router.items() if n.startswith("targets.")}
    router = {n: t for n, t in router.items() if not n.startswith("targets.")}
    keys = router.pop("keys", torch.empty(0))
    stored = StoredTasks(str(folder), config, names, adapters, keys, router, targets)
    _require_fits(model, handle, stored)
    _require_same_in_peft(model, stored, files, is_sealed(description))
    require_sealed(description, files)
    return stored


def _require_same_in_peft(
    model: PreTrainedModel, stored: StoredTasks, files: StoredFiles, sealed: bool
) -> None:
    """Raises ValueError if PEFT would compute something else from a task's folder."""
    modules = [n for n, _ in model.named_modules() if not n.startswith("sapt.")]
    modules = [name for name in modules if ".sapt_pool" not in name]
    for name, adapters in zip(stored.names, stored.adapters, strict=True):
        path = files.folder / name / LORA_FILES[0]
        values = files.json(f"{name}/{LORA_FILES[0]}")
        if isinstance(adapters, Tensor):
            length, width = adapters.shape
            require_prompt_config(path, values, length, width, sealed=sealed)
            continue
        present = {layer: (len(a), scaling) for layer, (a, _, scaling) in adapters.items() if len(a)}
        require_lora_config(
            path,
            values,
            present,
            modules,
            transposed=any(isinstance(model.get_submodule(layer), Conv1D) for layer in present),
            dropout=stored.config.lora_dropout,
            sealed=sealed,
        )


def export_adapter(
    model: PreTrainedModel,
    weights: Tensor | Sequence[float],
    directory: str | os.PathLike[str],
    *,
    is_main_process: bool | None = None,
) -> None:
    """Saves the static mixture `weights` as one ordinary PEFT LoRA, for anything that loads LoRA.

    Its rank is the total rank R of all tasks; A is stacked, the columns of B carry weight times
    scaling, and the adapter's own scaling is 1. Of prompts, the mixture is one for PEFT's prompt
    tuning. The folder is replaced as a whole.

    Args:
        model: patched, with K tasks.
        weights: [K], finite; in learning order.
        directory: what an earlier call wrote there is replaced, other files stay.
        is_main_process: as in `save_pretrained`.

    Raises:
        ValueError: the model is not patched, has no task, or the weights do not fit; the directory
            cannot be replaced.
        FileExistsError: a file that this function has not written is in the way, another adapter.
        OSError: it cannot be written; it is then as it was.
    """
    handle = _patched(model)
    weights = static_weights(weights, handle.tasks)
    if isinstance(handle, PromptHandle):
        prompts = torch.stack([handle.prompts.prompt(k) for k in range(len(weights))]).to("cpu")
        mixed = torch.einsum("k,kpd->pd", weights.double(), prompts.double()).to(prompts.dtype)
        if not _writes(model, is_main_process):
            return
        with replace_directory(directory, _exported) as folder:
            write_prompt(folder, model, mixed, _EXPORT_MARK)
        return
    adapters = {}
    for path, pool in handle.pools.items():
        a, b = pool.scaled(weights)
        adapters[path] = (a, b, 1.0)
    if not _writes(model, is_main_process):
        return
    with replace_directory(directory, _exported) as folder:
        write_lora(folder, model, adapters, _EXPORT_MARK)


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
    layers = _layers(model, handle, stored.config, stored.source)
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
    shapes |= {"keys": (len(stored.names), width)}
    require_shapes(f"{stored.source}, router", {**stored.router, "keys": stored.keys}, shapes)
    _require_targets(f"{stored.source}, targets", stored.targets, stored.names)
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
    tensors = {**stored.router, "keys": stored.keys, **stored.targets}
    require_finite(f"{stored.source}, router", {n: t.to(dtype) for n, t in tensors.items()})


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
    for name, adapters, key in zip(stored.names, stored.adapters, stored.keys, strict=True):
        handle.put_task(name, adapters, key)
    handle.router.load_state_dict(stored.router, strict=False)
    handle.targets.update({name: target.clone() for name, target in stored.targets.items()})


def _patched(model: PreTrainedModel) -> SaptHandle:
    handle = getattr(model, "sapt", None)
    if not isinstance(handle, SaptHandle):
        raise ValueError("model: not patched by sapt_fast.patch")
    if not handle.tasks:
        raise ValueError("model: there is no task yet; call model.sapt.add_task(name) first")
    return handle


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


def _rows(path: str, stack: RowStack, state: Mapping[str, Tensor] | None) -> Tensor:
    """All rows of a stack, from the model's state_dict if there is one; gathers what is sharded."""
    if state is None:
        return stack.rows()
    return torch.cat([state[f"{path}.frozen"], state[f"{path}.trainable"]])


def _router_tensors(
    handle: SaptHandle, state: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The router's state_dict, with all keys [K, D] as one."""
    held = handle.router.state_dict(keep_vars=True)  # whole() asks whose they are
    if state is not None:
        held = {name: state[f"sapt.router.{name}"] for name in held}
    router = {n: whole(t) for n, t in held.items() if not n.startswith("keys.")}
    router["keys"] = _rows("sapt.router.keys", handle.router.keys, state)
    return router


def _writes(model: PreTrainedModel, is_main_process: bool | None) -> bool:
    if is_main_process is None:
        return not is_sharded(model) or torch.distributed.get_rank() == 0
    return is_main_process


def _adapters(handle: SaptHandle, state: Mapping[str, Tensor] | None) -> list[Any]:
    """What each task's adapter is written from."""
    count = len(handle.tasks)
    if isinstance(handle, PromptHandle):
        rows = _rows("sapt.prompts.rows", handle.prompts.rows, state)
        return list(rows.reshape(count, -1, rows.shape[1]))
    pools = handle.pools
    stacks = {
        path: tuple(_rows(f"{path}.sapt_pool.{side}", getattr(pool, side), state) for side in "ab")
        for path, pool in pools.items()
    }
    adapters = []
    for index in range(count):
        own = {}
        for path, (a, b) in stacks.items():
            start = sum(pools[path].ranks[:index])
            rows = slice(start, start + pools[path].ranks[index])
            own[path] = a[rows], b[rows], pools[path].scaling[index]
        adapters.append(own)
    return adapters


def _layers(
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


def _require_targets(source: str, targets: Mapping[str, Tensor], names: list[str]) -> None:
    for name, target in targets.items():
        if name not in names:
            raise ValueError(f"{source}: got one for {name!r}, expected tasks among {names}")
        shape = (names.index(name) + 1,)
        if tuple(target.shape) != shape or not target.is_floating_point():
            raise ValueError(
                f"{source}: {name!r} has {target.dtype} of shape {tuple(target.shape)}, expected "
                f"floats of shape {shape}"
            )


# --- sapt_config.json ---


def _description(
    model: PreTrainedModel, handle: SaptHandle, state: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    tasks: list[dict[str, Any]] = []
    for index, name in enumerate(handle.tasks):
        if isinstance(handle, PromptHandle):
            tasks.append({"name": name})
            continue
        ranks = {path: pool.ranks[index] for path, pool in handle.pools.items()}
        scaling = {path: pool.scaling[index] for path, pool in handle.pools.items()}
        tasks.append({"name": name, "rank": _uniform(ranks), "scaling": _uniform(scaling)})
    layers = _layers(model, handle, handle.config, "")
    base = describe_base(model, layers, state)
    return describe(handle.config.to_dict(), tasks, base, handle.strategy)


def _uniform(values: dict[str, Any]) -> Any:
    return next(iter(values.values())) if len(set(values.values())) == 1 else values


def _write_description(folder: Path, description: Mapping[str, Any]) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    digests = {path.relative_to(folder).as_posix(): digest_of_file(path) for path in files}
    (folder / CONFIG_FILE).write_text(seal(description, digests), encoding="utf-8")


# --- which files are ours ---


def _written(folder: Path) -> list[str]:
    """The files of this folder that `save_pretrained` wrote."""
    if not (folder / CONFIG_FILE).is_file():
        return []
    return [CONFIG_FILE, *stated_files(read_description(folder / CONFIG_FILE))]


def _exported(folder: Path) -> list[str]:
    """The files of this folder that `export_adapter` wrote."""
    metadata = read_metadata(folder / LORA_FILES[1])
    return list(LORA_FILES) if metadata.items() >= _EXPORT_MARK.items() else []
