"""load_pretrained(model, folder) patches a base model with the methods of a saved folder."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sapt_fast.files.directories import read_directory, whole_directory
from sapt_fast.methods.base import Handle, handles
from sapt_fast.methods.registry import handle_type
from sapt_fast.methods.tasks import TaskHandle, pool_of
from sapt_fast.patching import patch, require_pretrained, unpatch
from sapt_fast.sites.modules import with_prefix
from sapt_fast.sites.report import PatchReport
from sapt_fast.storage.description import (
    CONFIG_FILE,
    STRATEGY_FILE,
    is_sealed,
    method_of,
    require_own_strategy,
    require_sealed,
    stored_as_sapt,
    strategy_of,
)
from sapt_fast.storage.hub import downloaded, is_hub_id
from sapt_fast.storage.method_files import StoredMethod, config_file, methods_in, read_method
from sapt_fast.storage.tasks import (
    Expected,
    StoredTasks,
    read_files,
    read_state,
    read_tasks,
    require_fits,
    require_same_config,
)
from sapt_fast.storage.tensors import StoredFiles

__all__ = ["install", "load_of_strategy", "load_pretrained", "read_strategy_state"]


def load_pretrained(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> PreTrainedModel:
    """Loads what `save_pretrained` or `push_to_hub` saved into a model of the same base.

    The last task is trainable, as after training it. Weights have the model's device and the dtype
    that the stored config specifies for the model. Everything is read and checked before the model
    changes. If a folder contains several methods, all are loaded.

    Args:
        model: not patched (it gets the stored config), or patched with the stored config and
            without tasks.
        directory: written by `save_pretrained` of a handle or of the model itself. If there is no
            such folder, the name `owner/name` of a repository on the Hugging Face Hub.
        revision, token, cache_dir, local_files_only: for a repository, as in
            `huggingface_hub.snapshot_download`. Downloaded files are kept in the cache, from which
            they are read without a connection (also with the variable HF_HUB_OFFLINE=1).

    Returns:
        model.

    Raises:
        TypeError: if model is not a PreTrainedModel.
        FileNotFoundError: if a file is missing, or there is neither a folder nor a repository.
        ValueError: if a revision is given for a folder.
        ValueError: if the model has tasks, another config, or another base model.
        ValueError: if a file is damaged, unsafe, or not the one that was saved.
        ValueError: if the files do not fit each other.
        ValueError: if a file contains non-finite values or a scaling above 2**30.
        ValueError: if PEFT would read something else from an adapter_config.json.
        ValueError: if the folder's method is unknown.
        ValueError: if an earlier version wrote the folder for a continual strategy that does not
            predict with SAPT's router.

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
    require_pretrained(model)
    if is_hub_id(directory) and not Path(directory).exists() and not _has_tasks(directory):
        directory = downloaded(
            str(directory),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    elif revision is not None:
        raise ValueError(f"revision: got {revision!r}, expected None for the folder {directory}")
    folder = Path(directory)
    found = methods_in(folder) if folder.is_dir() else {}
    tasks = None
    if not found or _has_tasks(directory):
        description, files = read_directory(directory, CONFIG_FILE, read_files)
        require_own_strategy(description, files.folder)
        tasks = _read(model, method_of(description), description["config"], description, files)
    stored = _others(model, directory, found, () if tasks is None else tasks.trained)
    with _unpatched_on_error(model):
        for method, config in stored:
            _restore(model, method, config)
        if tasks is not None:  # last: of them all has been checked
            _put_in(model, tasks)
    return model


def load_of_strategy(
    model: PreTrainedModel, directory: str | os.PathLike[str], strategy: str, config: Any
) -> PreTrainedModel:
    """Loads a folder as `load_pretrained` does, for the continual strategy that trained it.

    Args:
        model, directory: as in `load_pretrained`.
        strategy: the strategy's name.
        config: the config with which the strategy patches a model. Earlier versions stored the
            tasks of every strategy as SAPT's; they are read as those of this config's method.

    Raises:
        TypeError, FileNotFoundError, ValueError: as `load_pretrained`.
        ValueError: if another strategy trained the tasks.
    """
    require_pretrained(model)
    description, files = read_directory(directory, CONFIG_FILE, read_files)
    stored = strategy_of(description, files.folder)
    if stored not in (None, strategy):
        raise ValueError(
            f"{files.folder}: got adapters of strategy {stored!r}, expected {strategy!r}"
        )
    method, values = method_of(description), description["config"]
    if method != config.method:
        if is_sealed(description) and stored_as_sapt(description, files.folder) is None:
            raise ValueError(
                f"{files.folder}: method is {method!r}, expected {config.method!r}, by which the "
                f"strategy {strategy!r} predicts"
            )
        method, values = config.method, {**config.to_dict(), **values}
    tasks = _read(model, method, values, description, files)
    with _unpatched_on_error(model):
        _put_in(model, tasks)
    pool_of(model).strategy = strategy
    return model


def read_strategy_state(directory: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads the `strategy_state` of a saved folder; empty if it has none.

    Raises:
        FileNotFoundError, ValueError: as `load_pretrained`.
    """
    description, files = read_directory(directory, CONFIG_FILE, read_files)
    require_sealed(description, files)
    return read_state(description, files)


def install(model: Any, stored: StoredTasks) -> PreTrainedModel:
    """Checks the names and shapes of stored tasks against a model, and adds them to it.

    Args:
        model: not patched, or patched with the stored config and without tasks.
        stored: the tasks.

    Returns:
        model, patched.

    Raises:
        TypeError, ValueError: as `load_pretrained`; the model is then unchanged.
    """
    require_pretrained(model)
    kind = _task_method(stored.config.method, stored.source)
    expected = _expected(model, kind, stored.config, stored.source)
    require_fits(model, expected, stored)
    with _unpatched_on_error(model):
        return _put_in(model, stored)


@contextmanager
def _unpatched_on_error(model: Any) -> Iterator[None]:
    """A context after whose error the model has no method that it did not have before."""
    before = handles(model)
    try:
        yield
    except BaseException:
        for one in reversed(handles(model)):
            if one not in before:
                unpatch(model, one.attribute)
        raise


# --- methods with tasks ---


def _read(
    model: Any, method: str, values: Any, description: dict[str, Any], files: StoredFiles
) -> StoredTasks:
    """Reads a saved folder, and checks it alone and against the model."""
    source = files.folder / CONFIG_FILE
    kind = _task_method(method, source)
    try:
        config = kind.Config.from_dict(values)
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: config: {error}") from error
    if config.method != method:
        raise ValueError(
            f"{source}: method: got {method!r}, expected {config.method!r}, the config's"
        )
    stored = read_tasks(model, _expected(model, kind, config, source), description, files)
    count = len(stored.names)
    kind.require_state(model, config, stored.state, count, files.folder / STRATEGY_FILE)
    return stored


def _task_method(method: str, source: str | os.PathLike[str]) -> type[TaskHandle]:
    kind = handle_type(method, source)
    if not issubclass(kind, TaskHandle):
        raise ValueError(f"{source}: method: got {method!r}, expected a method with tasks")
    return kind


def _expected(
    model: Any, kind: type[TaskHandle], config: Any, source: str | os.PathLike[str]
) -> Expected:
    """Returns what the folder must contain for this model."""
    handle = _without_tasks(model, kind)
    if handle is not None:
        if type(handle.config) is not type(config):
            raise ValueError(
                f"model: patched with {handle.method!r}, but {source} is of {config.method!r}; "
                "call sapt_fast.unpatch(model) first"
            )
        require_same_config(handle.config, config.to_dict(), source)
    report: PatchReport = kind.sites(model, config) if handle is None else handle.report
    return kind.expected(model, config, report)


def _put_in(model: Any, stored: StoredTasks) -> PreTrainedModel:
    """Patches the model with the stored config, unless it is patched, and adds the tasks."""
    kind = _task_method(stored.config.method, stored.source)
    if _without_tasks(model, kind) is None:
        patch(model, stored.config)
    with torch.no_grad():
        _without_tasks(model, kind).restore_tasks(stored)
    return model


def _without_tasks(model: Any, kind: type[Handle]) -> Any:
    """Returns the model's handle of a method, without tasks; None if it is not patched.

    The handle of a method that does not grow has the values that will be replaced.
    """
    handle = model._modules.get(kind.attribute)
    if not isinstance(handle, Handle):
        return None
    if handle.tasks and kind.grows:
        raise ValueError(
            f"model: got one with tasks {handle.tasks}, expected none; call "
            "sapt_fast.unpatch(model) first"
        )
    return handle


# --- other methods ---


def _has_tasks(directory: str | os.PathLike[str]) -> bool:
    try:
        whole_directory(directory, CONFIG_FILE)
    except FileNotFoundError:
        return False
    return True


def _others(
    model: Any,
    directory: str | os.PathLike[str],
    found: Mapping[str, str],
    trained: Collection[str],
) -> list[tuple[StoredMethod, Any]]:
    """Reads the methods with their own files, checked against the model, and their configs.

    Args:
        found: of `methods_in`.
        trained: names of tensors of the base model that the tasks beside them bring.
    """
    folder, checked = Path(directory), []
    for attribute, method in found.items():
        kind = handle_type(method, folder / config_file(attribute))
        read = partial(read_method, attribute=attribute)
        stored = read_directory(directory, config_file(attribute), read)
        try:
            config = kind.Config.from_dict(stored.config)
        except (OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{stored.source}: config: {error}") from error
        stored.require_model(model, {*trained, *with_prefix(stored.tensors, "trained.")})
        handle = _without_tasks(model, kind)
        if handle is not None:
            require_same_config(handle.config, config.to_dict(), stored.source)
        checked.append((stored, config))
    return checked


def _restore(model: Any, stored: StoredMethod, config: Any) -> None:
    """Patches the model with a stored method, unless it is patched, and restores its values."""
    kind = handle_type(stored.method, stored.source)
    if _without_tasks(model, kind) is None:
        patch(model, config)
    handle = _without_tasks(model, kind)
    handle.restore(stored.tensors, stored.values)
    handle.restore_files(stored.source.parent, stored.values)
