"""Extends transformers' saving and loading to the tasks of a patched model.

`model.save_pretrained(folder)`, which every Trainer calls, writes the base model as if it were not
patched, and also the tasks, as `model.sapt.save_pretrained` does. `load_state_dict` with only the
base model raises an error, because the tasks would keep their current values. If a Trainer resumes
from a saved folder, the tasks are restored from it too.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sapt_fast.files.directories import require_replaceable
from sapt_fast.pools.own import is_inside, own_paths
from sapt_fast.pools.sharding import is_sharded

__all__ = ["PeftFiles", "PretrainedFiles", "own_names"]

logger = logging.getLogger(__name__)


class Saved(Protocol):
    """The members of a method's handle that saving uses."""

    attribute: ClassVar[str]
    _model: Any

    @property
    def slot(self) -> str:
        """The attribute name of the method's modules in layers."""

    @property
    def config_file(self) -> str:
        """The file of a saved folder that describes the method."""

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks."""

    def require_unmerged(self) -> None:
        """Raises RuntimeError if a mixture is merged into the base weights."""

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        is_main_process: bool | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Saves the tasks into a folder."""

    def restore_values(self, directory: str | os.PathLike[str]) -> None:
        """Sets the tasks to the values in a saved folder."""


def own_names(module: nn.Module, handle: Saved | None = None) -> list[str]:
    """Returns the keys of a model's state_dict that belong to methods, not to the base model.

    Args:
        module: the model.
        handle: the handle of one method; None for all methods.
    """
    own = own_paths(module)
    if handle is not None:
        ends = (handle.attribute, handle.slot)
        own = frozenset(path for path in own if path.rpartition(".")[2] in ends)
    return [name for name in _names(module) if is_inside(name, own)]


class _StandIn:
    """Replaces the `save_pretrained` of models, until `remove`."""

    def __init__(self) -> None:
        self._own: list[tuple[Any, Callable[..., Any] | None]] = []

    def _replace(self, model: Any, method: Callable[..., Any]) -> None:
        self._own.append((model, vars(model).get("save_pretrained")))
        vars(model)["save_pretrained"] = method

    def _own_of(self, model: Any) -> Callable[..., Any]:
        before = next(own for owner, own in self._own if owner is model)
        return type(model).save_pretrained.__get__(model) if before is None else before

    def remove(self) -> None:
        """Restores the models' own method."""
        for model, own in self._own:
            if own is None:
                del vars(model)["save_pretrained"]
            else:
                vars(model)["save_pretrained"] = own
        self._own = []


class PretrainedFiles(_StandIn):
    """Replaces `save_pretrained` of a patched model, and checks `load_state_dict`.

    Args:
        handle: the handle of a method on the model.
    """

    def __init__(self, handle: Saved) -> None:
        super().__init__()
        self._handle = handle
        self._hook: Any = None
        self._loaded_since: set[str] = set()

    def install(self) -> None:
        """Replaces the model's methods; `remove` restores them."""
        model = self._handle._model
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                own = self._save if module is model else partial(self._save_part, module)
                self._replace(module, own)
        self._hook = model.register_load_state_dict_post_hook(self._after_load)

    def remove(self) -> None:
        """Restores the model's methods."""
        super().remove()
        if self._hook is not None:
            self._hook.remove()

    # --- saving ---

    def _save(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Saves the base model as transformers' `save_pretrained` does, and the tasks with it.

        Raises:
            RuntimeError: if a mixture is merged into the base weights.
            ValueError: if the folder cannot be replaced.
            ValueError: if `distributed_checkpoint` is set.
            ValueError: if `state_dict` contains some of the adapters and the router, but not all.
        """
        handle = self._handle
        model = handle._model
        handle.require_unmerged()
        if kwargs.get("distributed_checkpoint"):
            raise ValueError(
                "distributed_checkpoint: not supported for a model that sapt_fast has patched; "
                "omit it, and call save_pretrained on all processes"
            )
        given = self._given(state_dict)
        if handle.tasks:
            require_replaceable(save_directory)
        names = list(inspect.signature(self._own_of(model)).parameters)[4:]
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        self._save_base(model, save_directory, is_main_process, state_dict, **kwargs)
        if handle.tasks:
            self._save_tasks(save_directory, is_main_process, given)
        elif is_main_process and Path(save_directory, handle.config_file).exists():
            logger.warning(
                "%s: contains the tasks of an earlier save, but this model has none",
                save_directory,
            )
        if push_to_hub and is_main_process:
            # As in model.push_to_hub, which saves and uploads everything.
            name = Path(save_directory).name
            model.push_to_hub(kwargs.pop("repo_id", name), **_hub_options(kwargs))

    def _given(self, state_dict: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
        """Returns the state_dict if it contains the adapters and the router, else None."""
        if state_dict is None or not self._handle.tasks:
            return None
        own = own_names(self._handle._model, self._handle)
        missing = [name for name in own if name not in state_dict]
        if not missing:
            return state_dict
        if len(missing) < len(own):
            raise ValueError(
                f"state_dict: got some tensors of the adapters and router, but not {missing[0]} "
                f"(and {len(missing) - 1} more); expected all or none of them"
            )
        if is_sharded(self._handle._model):
            raise ValueError(
                "state_dict: got no tensors of the adapters and the router, which a sharded model "
                "needs: pass the whole state_dict, or none on all processes"
            )
        return None

    def _save_tasks(
        self,
        directory: str | os.PathLike[str],
        is_main_process: bool,
        state: Mapping[str, Tensor] | None,
    ) -> None:
        model, writes = self._handle._model, bool(is_main_process)
        if is_sharded(model) and state is None:  # all processes call
            writes = writes and torch.distributed.get_rank() == 0
        self._handle.save(directory, is_main_process=writes, state=state)
        if writes:
            kind = type(model).__name__.removeprefix("FSDP")
            logger.warning(
                "%s: saved the base model and the tasks %s. from_pretrained alone loads the base "
                "model without the tasks; to load both, call "
                "sapt_fast.load_pretrained(%s.from_pretrained(%r), %r)",
                directory, self._handle.tasks, kind, str(directory), str(directory),
            )  # fmt: skip

    def _save_part(
        self,
        part: Any,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves a model inside the patched one, without its adapters."""
        self._handle.require_unmerged()
        self._save_base(part, save_directory, is_main_process, state_dict, **kwargs)
        if is_main_process and self._handle.tasks:
            logger.warning(
                "%s: saved a part of the base model without the tasks; save them with "
                "model.%s.save_pretrained, or save the whole model",
                save_directory, self._handle.attribute,
            )  # fmt: skip

    def _save_base(
        self,
        model: Any,
        directory: str | os.PathLike[str],
        is_main_process: bool,
        state_dict: Mapping[str, Tensor] | None,
        **kwargs: Any,
    ) -> None:
        """Calls the model's own `save_pretrained`, without our tensors."""
        own, paths = self._own_of(model), own_paths(model)
        # Another method's, which is below, takes its own tensors from there.
        if state_dict is not None and not isinstance(_owner(own), PretrainedFiles):
            state_dict = {n: x for n, x in state_dict.items() if not is_inside(n, paths)}
        # A quantised model ignores the given state_dict and creates its own.
        before = vars(model).get("_keys_to_ignore_on_save", ...)
        ignored = model._keys_to_ignore_on_save or ()
        model._keys_to_ignore_on_save = [*ignored, *own_names(model)]
        try:
            own(directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
        finally:
            if before is ...:
                del model._keys_to_ignore_on_save
            else:
                model._keys_to_ignore_on_save = before

    # --- loading ---

    def _after_load(self, module: nn.Module, keys: Any) -> None:
        """Detects a `load_state_dict` that does not change the tasks.

        Raises:
            RuntimeError: if the whole base model was loaded, but no tensor of the adapters.
        """
        handle = self._handle
        missing = set(keys.missing_keys)
        own = own_names(module, handle)
        # Their keys have a prefix if a module that contains the model was loaded.
        prefix = next((n.removesuffix(own[0]) for n in missing if own and n.endswith(own[0])), None)
        folder = _checkpoint_being_resumed()
        resumed = folder is not None and (folder / handle.config_file).is_file()
        if prefix is None or not (handle.tasks or resumed):
            self._loaded_since.clear()
            return
        own = [prefix + name for name in own]
        if not missing.issuperset(own):
            self._loaded_since.clear()
            return
        if folder is not None and resumed:
            handle.restore_values(folder)
            restored = set(own)
            keys.missing_keys[:] = [name for name in keys.missing_keys if name not in restored]
            return
        self._refuse_base_alone({name.removeprefix(prefix) for name in missing}, module)

    def _refuse_base_alone(self, missing: set[str], module: nn.Module) -> None:
        advice = (
            f"the tasks {self._handle.tasks} keep their current adapters. Load the base model "
            "before sapt_fast.patch. To load tasks that were saved with it, call "
            "sapt_fast.load_pretrained(model, folder) on a model without tasks. "
            "sapt_fast.SaptTrainer and transformers' Trainer resume from their checkpoints"
        )
        places: dict[int, set[str]] = {}  # names by tensor; tied weights have several
        paths = own_paths(module)
        for name, tensor in _names(module).items():
            if not is_inside(name, paths):
                places.setdefault(id(tensor), set()).add(name)
        loaded = {name for names in places.values() for name in names if name not in missing}
        self._loaded_since |= loaded
        if not all(names & self._loaded_since for names in places.values()):
            return  # only a part, perhaps one of several files
        in_parts = not all(names & loaded for names in places.values())
        self._loaded_since.clear()
        if in_parts:
            logger.warning("load_state_dict: all of the base model was loaded, but %s", advice)
        else:
            raise RuntimeError(f"load_state_dict: got only the base model, so {advice}")


class PeftFiles(_StandIn):
    """Logs a warning if PEFT saves a patched PeftModel whose router it does not save."""

    def __init__(self, handle: Any) -> None:
        super().__init__()
        self._handle = handle

    def install(self) -> None:
        """Replaces the model's method; `remove` restores it."""
        self._replace(self._handle._model, self._save)

    def _save(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        self._own_of(self._handle._model)(save_directory, *args, **kwargs)
        router = self._handle.router
        if router is not None and router.state_dict():
            logger.warning(
                "%s: PEFT saves the adapters, but not model.sapt.router (%s); save and load its "
                "state_dict yourself", save_directory, type(router).__name__,
            )  # fmt: skip


def _owner(method: Any) -> Any:
    return getattr(method, "__self__", None)


def _names(module: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors of a module by their keys in its state_dict, sharded or not."""
    kept = {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules(remove_duplicate=False)
        for name in part._non_persistent_buffers_set
    }
    named = chain(
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
    )
    return {name: tensor for name, tensor in named if name not in kept}


def _hub_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    known = ("commit_message", "private", "token", "create_pr", "revision", "tags")
    return {
        name: kwargs[name] for name in (*known, "max_shard_size") if kwargs.get(name) is not None
    }


def _checkpoint_being_resumed() -> Path | None:
    """Returns the folder that a running transformers Trainer is loading, or None.

    The Trainer passes only tensors to the model, so the folder is read from the Trainer's stack
    frame. If no frame is found, loading raises an error.
    """
    trainers = sys.modules.get("transformers.trainer")
    frame = sys._getframe()
    while trainers is not None and frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name not in ("_load_from_checkpoint", "_load_best_model"):
            continue
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, trainers.Trainer):
            folder = frame.f_locals.get("resume_from_checkpoint")
            folder = folder or trainer.state.best_model_checkpoint
            return None if folder is None else Path(folder)
    return None
