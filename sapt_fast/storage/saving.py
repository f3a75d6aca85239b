"""Saving and loading a patched model's tasks: one PEFT adapter each, the router, the settings.

In a saved directory, `<task>/` is a folder that PEFT loads by itself, router.safetensors holds the
query projection, keys [K, D] and targets.<task> [k]. sapt_config.json holds the SaptConfig, the
tasks in learning order, what tells the base model from others and digests (see
`sapt_fast.storage.description`). modules.safetensors is there if tensors of the base model were
trained (`shared.<name>`) or tasks have modules of their own (`tasks.<index>.<name>`).
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sapt_fast.files.directories import atomic_write_text, read_directory, replace_directory
from sapt_fast.handle import SaptHandle
from sapt_fast.loading import adapted_layers, read_files, require_targets
from sapt_fast.methods.sapt_prompt import PromptHandle
from sapt_fast.pools.lora import RowStack
from sapt_fast.pools.sharding import is_sharded, whole
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
)
from sapt_fast.storage.lora import LORA_FILES, read_metadata, task_mark, write_lora
from sapt_fast.storage.prompt import write_prompt
from sapt_fast.storage.tensors import digest_of_file, write_tensors

logger = logging.getLogger(__name__)

_EXPORT_MARK = {"sapt_fast": "export_adapter"}


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
    `sapt_fast.files.directories.replace_directory`). sapt_config.json holds digests of all files.

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
    require_targets("targets", handle.targets, handle.tasks)
    router = _router_tensors(handle, state)
    for name, target in handle.targets.items():
        router[f"targets.{name}"] = target.float()
    adapters = _adapters(handle, state)
    modules = _modules(handle, state)
    shared = _beside(handle, modules)
    description = _description(model, handle, state)
    if not _writes(model, is_main_process):
        return
    with replace_directory(directory, _written) as folder:
        for index, (name, adapter) in enumerate(zip(handle.tasks, adapters, strict=True)):
            if isinstance(handle, PromptHandle):
                write_prompt(folder / name, model, adapter, task_mark(name))
                continue
            beside = {**shared, **_floats(with_prefix(modules, f"tasks.{index}."))}
            write_lora(folder / name, model, adapter, task_mark(name), beside)
        write_tensors(folder / ROUTER_FILE, router)
        if modules:
            write_tensors(folder / MODULES_FILE, modules)
        if strategy_state:
            write_tensors(folder / STRATEGY_FILE, strategy_state)
        _write_description(folder, description)


def renew_digests(directory: str | os.PathLike[str]) -> None:
    """Notes the digests of a saved folder's files anew, after they were edited on purpose.

    Args:
        directory: written by `save_pretrained`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: sapt_config.json is damaged.
    """
    description, files = read_directory(directory, CONFIG_FILE, read_files)
    if not is_sealed(description):
        raise ValueError(f"{files.folder}: an earlier version saved it, which has no digests")
    digests = {name: files.digests[name] for name in stated_files(description)}
    atomic_write_text(files.folder / CONFIG_FILE, seal(description, digests))


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
            cannot be replaced; or tasks have copies of a module that no static mixture is like
            (weights other than one 1 and zeros, and no plain linear layer).
        FileExistsError: a file that this function has not written is in the way, another adapter.
        OSError: it cannot be written; it is then as it was.
    """
    handle = _patched(model)
    weights = static_weights(weights, handle.tasks)
    shared = with_prefix(_modules(handle, None), "shared.")
    if isinstance(handle, PromptHandle):
        if shared or handle.task_modules.paths:
            raise ValueError(
                f"export_adapter: PEFT's prompt tuning cannot hold {[*shared][:3]} or modules of "
                "tasks, which were trained beside the prompts; use save_pretrained"
            )
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
    own = {name: whole(t) for name, t in handle.task_modules.mixed(weights).items()}
    beside = {**_beside(handle, _modules(handle, None)), **_floats(own)}
    if not _writes(model, is_main_process):
        return
    with replace_directory(directory, _exported) as folder:
        write_lora(folder, model, adapters, _EXPORT_MARK, beside)


def _patched(model: PreTrainedModel) -> SaptHandle:
    handle = getattr(model, "sapt", None)
    if not isinstance(handle, SaptHandle):
        raise ValueError("model: not patched by sapt_fast.patch")
    if not handle.tasks:
        raise ValueError("model: there is no task yet; call model.sapt.add_task(name) first")
    return handle


def _rows(path: str, stack: RowStack, state: Mapping[str, Tensor] | None) -> Tensor:
    """All rows of a stack, from the model's state_dict if there is one; gathers what is sharded."""
    if state is None:
        return stack.rows()
    return torch.cat([state[f"{path}.frozen"], state[f"{path}.trainable"]])


def _router_tensors(handle: SaptHandle, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The router's state_dict, with all keys [K, D] as one."""
    held = handle.router.state_dict(keep_vars=True)  # whole() asks whose they are
    if state is not None:
        held = {name: state[f"sapt.router.{name}"] for name in held}
    router = {n: whole(t) for n, t in held.items() if not n.startswith("keys.")}
    router["keys"] = _rows("sapt.router.keys", handle.router.keys, state)
    return router


def _modules(handle: SaptHandle, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """What modules.safetensors holds; gathers what is sharded."""
    held = state or {}
    tensors = {
        f"shared.{name}": held.get(name, tensor)
        for name, tensor in handle.trained_tensors().items()
    }
    for index in range(len(handle.tasks)):
        for name, tensor in handle.task_modules.tensors(index, state).items():
            tensors[f"tasks.{index}.{name}"] = tensor
    return {name: whole(tensor) for name, tensor in tensors.items()}


def _beside(handle: SaptHandle, modules: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The shared ones of modules.safetensors as PEFT takes them: whole modules, floats alone."""
    shared = with_prefix(modules, "shared.")
    paths, others = whole_modules(shared, handle.report.patched)
    if others:
        logger.warning(
            "%s: trained, and saved for sapt_fast.load_pretrained, but PEFT cannot keep it beside "
            "the adapters: a task's folder alone does not have it", ", ".join(others),
        )  # fmt: skip
    beside = {
        name: shared[name] if name in shared else whole(tensor)
        for name, tensor in module_tensors(handle._model, paths).items()
    }
    return _floats(beside)


def _floats(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


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
            end = start + pools[path].ranks[index]
            own[path] = a[start:end], b[start:end], pools[path].scaling[index]
        adapters.append(own)
    return adapters


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
    layers = adapted_layers(model, handle, handle.config, "")
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
