"""How transformers' own saving and loading treats a patched model: nothing of it is lost unnoticed.

`model.save_pretrained(folder)`, which every Trainer calls, writes the base model as if it were not
patched, and the tasks beside it as `model.sapt.save_pretrained` does. `load_state_dict` with the
base model alone raises, since the tasks would keep the values that they have; but a Trainer that
resumes from such a folder gets the tasks of the folder.
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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sapt_fast.files.directories import require_replaceable
from sapt_fast.pools.sharding import is_sharded

if TYPE_CHECKING:
    from sapt_fast.handle import SaptHandle
    from sapt_fast.methods.peft.pool import PeftHandle

__all__ = ["PeftFiles", "PretrainedFiles", "is_ours"]

logger = logging.getLogger(__name__)

_PROBE = "sapt.router.down.weight"


def is_ours(name: str) -> bool:
    """Whether a key of a patched model's state_dict is of the adapters or the router."""
    return ".sapt_pool." in name or name.startswith("sapt.") or ".sapt." in name


class _StandIn:
    """A `save_pretrained` in place of a model's own, until `remove`."""

    def __init__(self) -> None:
        self._own: list[tuple[Any, Callable[..., Any] | None]] = []

    def _replace(self, model: Any, method: Callable[..., Any]) -> None:
        self._own.append((model, vars(model).get("save_pretrained")))
        vars(model)["save_pretrained"] = method

    def _own_of(self, model: Any) -> Callable[..., Any]:
        before = next(own for owner, own in self._own if owner is model)
        return type(model).save_pretrained.__get__(model) if before is None else before

    def remove(self) -> None:
        """Gives the models their own method back."""
        for model, own in self._own:
            if own is None:
                del vars(model)["save_pretrained"]
            else:
                vars(model)["save_pretrained"] = own
        self._own = []


class PretrainedFiles(_StandIn):
    """What a patched model does where transformers saves and loads it.

    Args:
        handle: of the model.
    """

    def __init__(self, handle: SaptHandle) -> None:
        super().__init__()
        self._handle = handle
        self._hook: Any = None
        self._loaded_since: set[str] = set()

    def install(self) -> None:
        """Replaces the model's methods; `remove` takes them away again."""
        model = self._handle._model
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                own = self._save if module is model else partial(self._save_part, module)
                self._replace(module, own)
        self._hook = model.register_load_state_dict_post_hook(self._after_load)

    def remove(self) -> None:
        """Gives the model its own methods back."""
        super().remove()
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
        """transformers' `save_pretrained` of the base model, and the tasks beside it.

        Raises:
            RuntimeError: a mixture is merged into the base weights.
            ValueError: the folder cannot be replaced, `distributed_checkpoint` is asked for, or
                `state_dict` holds some of the adapters and the router but not all of them.
        """
        handle = self._handle
        model = handle._model
        handle.routing.require_unmerged()
        if kwargs.get("distributed_checkpoint"):
            raise ValueError(
                "distributed_checkpoint: not supported for a model that sapt_fast has patched; "
                "leave it out, all processes still have to call save_pretrained"
            )
        given = self._given(state_dict)
        if handle.tasks:
            require_replaceable(save_directory)
        names = list(inspect.signature(self._own_of(model)).parameters)[4:]
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        self._save_base(model, save_directory, is_main_process, state_dict, **kwargs)
        if handle.tasks:
            self._save_tasks(save_directory, is_main_process, given)
        elif is_main_process and Path(save_directory, "sapt_config.json").exists():
            logger.warning(
                "%s: holds the tasks of an earlier save, and this model has none", save_directory
            )
        if push_to_hub and is_main_process:
            # As model.push_to_hub does, which saves and uploads all of it.
            name = Path(save_directory).name
            model.push_to_hub(kwargs.pop("repo_id", name), **_hub_options(kwargs))

    def _given(self, state_dict: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
        """The state_dict, if it holds the adapters and the router."""
        if state_dict is None or not self._handle.tasks:
            return None
        own = [name for name in _names(self._handle._model) if is_ours(name)]
        missing = [name for name in own if name not in state_dict]
        if not missing:
            return state_dict
        if len(missing) < len(own):
            raise ValueError(
                f"state_dict: has no {missing[0]} (and {len(missing) - 1} more), but others of the "
                "adapters and the router; expected all or none of them"
            )
        if is_sharded(self._handle._model):
            raise ValueError(
                "state_dict: has nothing of the adapters and the router, and the model is sharded: "
                "pass the whole state_dict, or none on all processes"
            )
        return None

    def _save_tasks(
        self,
        directory: str | os.PathLike[str],
        is_main_process: bool,
        state: Mapping[str, Tensor] | None,
    ) -> None:
        from sapt_fast.storage.saving import save_pretrained

        model, writes = self._handle._model, bool(is_main_process)
        if is_sharded(model) and state is None:  # all processes call
            writes = writes and torch.distributed.get_rank() == 0
        save_pretrained(model, directory, is_main_process=writes, state=state)
        if writes:
            kind = type(model).__name__.removeprefix("FSDP")
            logger.warning(
                "%s: the base model and, beside it, the tasks %s were saved. "
                "from_pretrained alone loads the base model without them; to load both call "
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
        """`save_pretrained` of a model inside the patched one, whose adapters are left out."""
        self._handle.routing.require_unmerged()
        self._save_base(part, save_directory, is_main_process, state_dict, **kwargs)
        if is_main_process and self._handle.tasks:
            logger.warning(
                "%s: holds a part of the base model and nothing of the tasks; save them with "
                "model.sapt.save_pretrained, or save the whole model", save_directory,
            )  # fmt: skip

    def _save_base(
        self,
        model: Any,
        directory: str | os.PathLike[str],
        is_main_process: bool,
        state_dict: Mapping[str, Tensor] | None,
        **kwargs: Any,
    ) -> None:
        """The model's own `save_pretrained`, without what is ours."""
        own = self._own_of(model)
        if state_dict is not None:
            state_dict = {name: x for name, x in state_dict.items() if not is_ours(name)}
        # A quantised model's state_dict is made inside, whatever is passed.
        before = vars(model).get("_keys_to_ignore_on_save", ...)
        ignored = model._keys_to_ignore_on_save or ()
        model._keys_to_ignore_on_save = [*ignored, *filter(is_ours, _names(model))]
        try:
            own(directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
        finally:
            if before is ...:
                del model._keys_to_ignore_on_save
            else:
                model._keys_to_ignore_on_save = before

    # --- loading ---

    def _after_load(self, module: nn.Module, keys: Any) -> None:
        """Notices a `load_state_dict` that leaves all tasks as they were.

        Raises:
            RuntimeError: the whole base model was loaded, and nothing of the adapters.
        """
        handle = self._handle
        missing = set(keys.missing_keys)
        probe = next((name for name in missing if name.endswith(_PROBE)), None)
        if not handle.tasks or probe is None:
            self._loaded_since.clear()
            return
        prefix = probe.removesuffix(_PROBE)
        own = [prefix + name for name in _names(module) if is_ours(name)]
        if not missing.issuperset(own):
            self._loaded_since.clear()
            return
        folder = _checkpoint_being_resumed()
        if folder is not None and (folder / "sapt_config.json").is_file():
            from sapt_fast.loading import restore_values

            restore_values(handle, folder)
            restored = set(own)
            keys.missing_keys[:] = [name for name in keys.missing_keys if name not in restored]
            return
        self._refuse_base_alone({name.removeprefix(prefix) for name in missing}, module)

    def _refuse_base_alone(self, missing: set[str], module: nn.Module) -> None:
        advice = (
            f"the tasks {self._handle.tasks} keep the adapters that they have. Load the base model "
            "before sapt_fast.patch; to load tasks that were saved beside it call "
            "sapt_fast.load_pretrained(model, folder) on a model without tasks. "
            "sapt_fast.SaptTrainer and transformers' Trainer resume from their checkpoints"
        )
        places: dict[int, set[str]] = {}  # of one tensor, where a weight is tied
        for name, tensor in _names(module).items():
            if not is_ours(name):
                places.setdefault(id(tensor), set()).add(name)
        loaded = {name for names in places.values() for name in names if name not in missing}
        self._loaded_since |= loaded
        if not all(names & self._loaded_since for names in places.values()):
            return  # a part: one of several files, maybe
        in_parts = not all(names & loaded for names in places.values())
        self._loaded_since.clear()
        if in_parts:
            logger.warning("load_state_dict: all of the base model was loaded, but %s", advice)
        else:
            raise RuntimeError(f"load_state_dict: got the base model alone, but {advice}")


class PeftFiles(_StandIn):
    """Says, where PEFT saves a patched PeftModel, that a router of ours is not in its files."""

    def __init__(self, handle: PeftHandle) -> None:
        super().__init__()
        self._handle = handle

    def install(self) -> None:
        """Replaces the model's method; `remove` takes it away again."""
        self._replace(self._handle._model, self._save)

    def _save(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        self._own_of(self._handle._model)(save_directory, *args, **kwargs)
        router = self._handle.router
        if router is not None and router.state_dict():
            logger.warning(
                "%s: PEFT saves the adapters, but not model.sapt.router (%s): save and load its "
                "state_dict yourself", save_directory, type(router).__name__,
            )  # fmt: skip


def _names(module: nn.Module) -> dict[str, Tensor]:
    """The keys of a module's state_dict and what they stand for, sharded or not."""
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
    """The folder that a transformers Trainer is loading just now.

    It hands the model nothing but tensors, so only its own running method knows where they are
    from. Where it is not found, loading raises.
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
