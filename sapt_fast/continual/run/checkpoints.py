"""The checkpoint of a method after a task: its own files, and the state of the strategy.

A method with one adapter per task (`TaskHandle`) saves the state with them. Other methods save
their own two files; the state is then a file beside them, written first, so that a folder with the
method's files is complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sapt_fast.continual.run import processes
from sapt_fast.files.directories import atomic_write_bytes, whole_directory
from sapt_fast.loading import load_of_strategy, load_pretrained, read_strategy_state
from sapt_fast.methods.registry import handle_type
from sapt_fast.methods.tasks import TaskHandle
from sapt_fast.patching import patch
from sapt_fast.storage.description import CONFIG_FILE, STRATEGY_FILE
from sapt_fast.storage.method_files import config_file
from sapt_fast.storage.tensors import read_tensors, require_finite, tensor_bytes

__all__ = ["config_name", "load_checkpoint", "save_checkpoint"]


def config_name(model: Any, config: Any) -> str:
    """Returns the name of the file that every complete checkpoint of a method contains."""
    kind = handle_type(config.method, "config").of_model(model)
    return CONFIG_FILE if issubclass(kind, TaskHandle) else config_file(kind.attribute)


def save_checkpoint(handle: Any, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Saves what a handle has learned; of several processes, the first one writes.

    Args:
        handle: of the method.
        folder: the folder of the checkpoint.
        state: further tensors of the strategy, by name.
    """
    first = processes.is_first()
    if isinstance(handle, TaskHandle):
        handle.save_pretrained(folder, is_main_process=first, strategy_state=state)
        return
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(folder / STRATEGY_FILE, tensor_bytes(state))
    handle.save_pretrained(folder, is_main_process=first)


def load_checkpoint(model: Any, folder: Path, strategy: str, config: Any) -> dict[str, Tensor]:
    """Patches a model and loads a checkpoint into it.

    Args:
        model: not patched.
        folder: the folder of the checkpoint.
        strategy: the name of the strategy that trained it.
        config: the config with which the strategy patches a model.

    Returns:
        The strategy's tensors.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged, or does not fit the model, the strategy or the config.
    """
    if config_name(model, config) == CONFIG_FILE:
        load_of_strategy(model, folder, strategy, config)
        return read_strategy_state(folder)
    file = whole_directory(folder, config_name(model, config)) / STRATEGY_FILE
    state, _ = read_tensors(file)
    require_finite(str(file), state)
    patch(model, config)
    load_pretrained(model, folder)
    return state
