"""Saves a patched model's tasks: one PEFT adapter each, the router and the settings.

A saved folder contains:

- `<task>/`: one folder per task, which PEFT can load alone.
- router.safetensors: the query projection, `keys` [K, D] and `targets.<task>` [k].
- sapt_config.json: the config, the tasks in learning order, a description of the base model, and
  digests (see `sapt_fast.storage.description`).
- modules.safetensors, if tensors of the base model were trained (`shared.<name>`) or tasks have
  their own modules (`tasks.<index>.<name>`).
- README.md, a model card without a digest, unless there is one of the user.
- strategy.safetensors, if the method or a continual strategy has further tensors.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sapt_fast.files.directories import atomic_write_text, read_directory, replace_directory
from sapt_fast.pools.rows import RowStack
from sapt_fast.pools.sharding import whole
from sapt_fast.sites.merging import static_weights
from sapt_fast.sites.modules import module_tensors, whole_modules, with_prefix
from sapt_fast.storage.base_model import describe_base
from sapt_fast.storage.description import (
    CONFIG_FILE,
    MODULES_FILE,
    ROUTER_FILE,
    STRATEGY_FILE,
    describe,
    is_sealed,
    read_description,
    seal,
    stated_files,
    write_sealed,
    writes,
)
from sapt_fast.storage.lora import LORA_FILES, read_metadata, task_mark
from sapt_fast.storage.model_card import own_card, write_card
from sapt_fast.storage.tasks import AdapterFiles, Expected, read_files, require_targets
from sapt_fast.storage.tensors import write_tensors

__all__ = ["export_mixture", "renew_digests", "save_tasks", "stacked_rows"]

logger = logging.getLogger(__name__)

_EXPORT_MARK = {"sapt_fast": "export_adapter"}


def save_tasks(
    handle: Any,
    directory: str | os.PathLike[str],
    *,
    is_main_process: bool | None = None,
    state: Mapping[str, Tensor] | None = None,
    strategy_state: Mapping[str, Tensor] | None = None,
) -> None:
    """Saves the tasks, the router and the settings of a patched model.

    All files are replaced together: if the process is killed, `load_pretrained` finds the old or
    the new content. Several processes take turns (see
    `sapt_fast.files.directories.replace_directory`). sapt_config.json contains digests of all
    files.

    Args:
        handle: a `sapt_fast.methods.tasks.TaskHandle` with at least one task.
        directory: the folder. The files of an earlier call are replaced; other files stay.
        is_main_process: whether this process writes. Only one process may write at a time. None:
            every process that calls writes; for a sharded model, all processes must call, and
            only rank 0 writes.
        state: the model's state_dict, whose values are saved instead of the current ones.
        strategy_state: further tensors of a continual strategy, which
            `sapt_fast.loading.read_strategy_state` returns.

    Raises:
        ValueError: if there is no task.
        ValueError: if the targets do not fit the tasks.
        ValueError: if the directory cannot be replaced, or contains a damaged sapt_config.json.
        FileExistsError: if a file with the name of a new one was not written by this function.
        RuntimeError: if a mixture is merged into the base weights, which identify the base model.
        TimeoutError: if another process keeps the folder locked.
        OSError: if the directory cannot be written; its content is then unchanged.
    """
    _require_task(handle)
    handle.routing.require_unmerged()
    model = handle._model
    require_targets("targets", handle.targets, handle.tasks)
    router = _router_tensors(handle, state)
    for name, target in handle.targets.items():
        router[f"targets.{name}"] = target.float()
    adapters = handle.adapters(state)
    remembered = {n: whole(t) for n, t in {**handle.state(state), **(strategy_state or {})}.items()}
    modules = _modules(handle, state)
    shared = _beside(handle, modules)
    description = _description(handle, adapters, state)
    if not writes(model, is_main_process):
        return
    kind: AdapterFiles = handle.adapter_files
    with replace_directory(directory, _written) as folder:
        for index, (name, adapter) in enumerate(zip(handle.tasks, adapters, strict=True)):
            beside = {**shared, **_floats(with_prefix(modules, f"tasks.{index}."))}
            kind.write(folder / name, model, adapter, handle.config, task_mark(name), beside)
        write_tensors(folder / ROUTER_FILE, router)
        if modules:
            write_tensors(folder / MODULES_FILE, modules)
        if remembered:
            write_tensors(folder / STRATEGY_FILE, remembered)
        write_sealed(folder, CONFIG_FILE, description)
        write_card(folder, directory, handle)


def renew_digests(directory: str | os.PathLike[str]) -> None:
    """Updates the digests of a saved folder after its files were edited on purpose.

    Args:
        directory: a folder that `save_pretrained` wrote.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if sapt_config.json is damaged, or is of an earlier version without digests.
    """
    description, files = read_directory(directory, CONFIG_FILE, read_files)
    if not is_sealed(description):
        raise ValueError(
            f"{files.folder}: has no digests to renew, because an earlier version saved it"
        )
    digests = {name: files.digests[name] for name in stated_files(description)}
    atomic_write_text(files.folder / CONFIG_FILE, seal(description, digests))


def export_mixture(
    handle: Any,
    weights: Tensor | Sequence[float],
    directory: str | os.PathLike[str],
    *,
    is_main_process: bool | None = None,
) -> None:
    """Saves a static mixture as one ordinary PEFT adapter.

    Args:
        handle: a handle with K tasks.
        weights: [K], finite; in learning order.
        directory: the folder. The files of an earlier call are replaced; other files stay.
        is_main_process: as in `save_tasks`.

    Raises:
        ValueError: if there is no task.
        ValueError: if the weights do not fit.
        ValueError: if the directory cannot be replaced.
        ValueError: if tasks have copies of a module that cannot be mixed statically: a module
            other than a plain linear layer, with weights other than one 1 and zeros.
        FileExistsError: if a file with the name of a new one was not written by this function.
        OSError: if the directory cannot be written; its content is then unchanged.
    """
    _require_task(handle)
    weights = static_weights(weights, handle.tasks)
    modules = _modules(handle, None)
    adapter = handle.mixed_adapter(weights, with_prefix(modules, "shared."))
    own = {name: whole(t) for name, t in handle.task_modules.mixed(weights).items()}
    beside = {**_beside(handle, modules), **_floats(own)}
    if not writes(handle._model, is_main_process):
        return
    kind: AdapterFiles = handle.adapter_files
    with replace_directory(directory, _exported) as folder:
        kind.write(folder, handle._model, adapter, handle.config, _EXPORT_MARK, beside)


def _require_task(handle: Any) -> None:
    if not handle.tasks:
        raise ValueError("model: got no task, expected one; call model.sapt.add_task(name) first")


def stacked_rows(path: str, stack: RowStack, state: Mapping[str, Tensor] | None) -> Tensor:
    """Returns all rows of a stack, from the state_dict if given; sharded tensors are gathered."""
    if state is None:
        return stack.rows()
    return torch.cat([state[f"{path}.frozen"], state[f"{path}.trainable"]])


def _router_tensors(handle: Any, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Returns the router's state_dict, with all keys [K, D] as one tensor."""
    held = handle.router.state_dict(keep_vars=True)  # whole() needs the parameters
    if state is not None:
        held = {name: state[f"{handle.attribute}.router.{name}"] for name in held}
    router = {n: whole(t) for n, t in held.items() if not n.startswith("keys.")}
    router["keys"] = stacked_rows(f"{handle.attribute}.router.keys", handle.router.keys, state)
    return router


def _modules(handle: Any, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Returns the content of modules.safetensors; sharded tensors are gathered."""
    held, prefix = state or {}, f"{handle.attribute}.task_modules."
    tensors = {
        f"shared.{name}": held.get(name, tensor)
        for name, tensor in handle.trained_tensors().items()
    }
    for index in range(len(handle.tasks)):
        for name, tensor in handle.task_modules.tensors(index, state, prefix).items():
            tensors[f"tasks.{index}.{name}"] = tensor
    return {name: whole(tensor) for name, tensor in tensors.items()}


def _beside(handle: Any, modules: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the shared tensors in the form that PEFT supports: whole modules, only floats."""
    shared = with_prefix(modules, "shared.")
    paths, others = whole_modules(shared, handle.report.patched)
    if others:
        logger.warning(
            "%s: trained, and saved for sapt_fast.load_pretrained, but not in the task folders: "
            "PEFT cannot store it with the adapters", ", ".join(others),
        )  # fmt: skip
    beside = {
        name: shared[name] if name in shared else whole(tensor)
        for name, tensor in module_tensors(handle._model, paths).items()
    }
    return _floats(beside)


def _floats(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


# --- sapt_config.json ---


def _description(
    handle: Any, adapters: Sequence[Any], state: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    tasks = [
        {"name": name, **handle.adapter_files.described(adapter)}
        for name, adapter in zip(handle.tasks, adapters, strict=True)
    ]
    expected: Expected = handle.expected(handle._model, handle.config, handle.report)
    base = describe_base(handle._model, expected.features(handle._model), state)
    return describe(handle.method, handle.config.to_dict(), tasks, base, handle.strategy)


# --- which files are ours ---


def _written(folder: Path) -> list[str]:
    """Returns the files of this folder that `save_pretrained` wrote."""
    if not (folder / CONFIG_FILE).is_file():
        return own_card(folder)  # of another method
    stated = stated_files(read_description(folder / CONFIG_FILE))
    return [CONFIG_FILE, *stated, *own_card(folder)]


def _exported(folder: Path) -> list[str]:
    """Returns the files of this folder that `export_adapter` wrote."""
    metadata = read_metadata(folder / LORA_FILES[1])
    return list(LORA_FILES) if metadata.items() >= _EXPORT_MARK.items() else []
