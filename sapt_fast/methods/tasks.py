"""A pool with one adapter for each task: what SAPT and its relatives have in common."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sapt_fast.files.directories import read_directory
from sapt_fast.files.names import require_folder_name
from sapt_fast.methods.base import Handle, follow, handles, require_held
from sapt_fast.ops import transforms
from sapt_fast.routing.hooks import Routing
from sapt_fast.sites.modules import (
    Changes,
    TaskModules,
    base_tensors,
    find_modules,
    heads,
    require_present,
    trained_tensors,
)
from sapt_fast.sites.report import PatchReport
from sapt_fast.storage.description import CONFIG_FILE, STRATEGY_FILE, is_sealed, method_of
from sapt_fast.storage.task_saving import export_mixture, save_tasks
from sapt_fast.storage.tasks import (
    AdapterFiles,
    Expected,
    StoredTasks,
    read_files,
    read_tasks,
    require_same_config,
)

__all__ = ["TaskHandle", "pool_of", "task_handle"]


class TaskHandle(Handle):
    """The tasks of a model, each with an adapter, and the weights by which they are mixed.

    A subclass says what the adapters are (`pools`, `put_task`, `adapters` and what begins with an
    underscore) and gives their weights (`signal`).

    Attributes:
        tasks: names in learning order, oldest first.
        targets: by task name, the mean weights [k] over that task's inputs once it was learned
            (k = 1 + its index; learning order). Filled by whoever trains; saved and loaded with
            the adapters.
        task_modules: each task's own copies of `config.modules_to_save`, with
            `config.modules_per_task`.
        strategy: the continual strategy that trains the tasks; None outside of a run.
        routing: the running weights.
        router: any module with `add_key`, `keys` and a state_dict, as `SaptRouter`.
        adapter_files: how an adapter lies on disk.
    """

    adapter_files: ClassVar[AdapterFiles]
    targets: dict[str, Tensor]
    routing: Routing
    router: Any

    def __init__(self, model: Any, config: Any, report: PatchReport) -> None:
        super().__init__(model, config, report)
        self.targets = {}
        self.strategy: str | None = None
        saved = find_modules(model, config.modules_to_save or (), report.patched)
        self.task_modules = TaskModules(model, saved if config.modules_per_task else ())
        unsaved = [path for path in heads(model) if path not in (config.modules_to_save or ())]
        if unsaved:
            report.notes.append(
                f"{', '.join(unsaved)} stays as it is: it is frozen now; to train a head and save "
                f"it with the tasks, name it in modules_to_save={unsaved} of the config"
            )
        self._in_place = [] if config.modules_per_task else saved
        # Parameters of the base model that train beside the adapters.
        self._beside = [
            p for path in self._in_place for p in model.get_submodule(path).parameters()
        ]
        self._changes = Changes(model)
        self._hooks: list[Any] = []

    # --- what the adapters are ---

    def put_task(
        self,
        name: str,
        adapters: Any,
        key: Tensor,
        modules: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`restore_task` whatever the name, since earlier versions took some that it refuses."""
        raise NotImplementedError

    def adapters(self, state: Mapping[str, Tensor] | None = None) -> list[Any]:
        """What each task's adapter is stored as; gathers what is sharded.

        Args:
            state: the model's state_dict, whose values are taken in place of those now.
        """
        raise NotImplementedError

    def set_adapter(self, index: int, adapter: Any) -> None:
        """Copies the values of a stored adapter into the task's own."""
        raise NotImplementedError

    def mixed_adapter(self, weights: Tensor, shared: Mapping[str, Tensor]) -> Any:
        """One adapter that computes the static mixture `weights` [K].

        Args:
            shared: tensors of the base model that were trained beside the adapters.
        """
        raise NotImplementedError

    def state(self, held: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What the method remembers beside adapters, router and targets, by name.

        Args:
            held: the model's state_dict, whose values are taken in place of those now.
        """
        return {}

    def restore_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave, checked by `require_state`; other names are left alone."""

    @classmethod
    def require_state(
        cls, model: Any, config: Any, state: Mapping[str, Tensor], tasks: int, source: Path
    ) -> None:
        """Raises ValueError unless a state of `tasks` tasks has what `restore_state` needs."""

    @classmethod
    def expected(cls, model: Any, config: Any, report: PatchReport) -> Expected:
        """What a folder of this method with this config must hold."""
        raise NotImplementedError

    def _add_adapters(self) -> None:
        """A new adapter everywhere, which changes nothing yet."""
        raise NotImplementedError

    def _add_key(self) -> None:
        """What a new task needs besides adapter and modules."""

    def _growing(self) -> Iterator[nn.Parameter]:
        """The parameters that `add_task` replaces by new ones."""
        raise NotImplementedError

    # --- tasks ---

    def add_task(self, name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Adds an adapter to every patched layer and a key; they train, the earlier ones freeze.

        Args:
            name: unique; used as a folder name by `save_pretrained`.
            optimizer: if given, the new parameters take the place of those they follow in its
                parameter groups, with fresh state.

        Raises:
            ValueError: if name is taken or cannot be a folder on every file system (it is empty,
                too long, differs from another in case alone, ...); if the optimizer has none of
                the parameters to follow; or if a layer is no longer ours. Nothing has changed then.
        """
        self._require_new(name)
        before = list(self._growing())
        if optimizer is not None:
            require_held(optimizer, before)
        self._add_adapters()
        self._add_key()
        self.task_modules.add()
        self._task_added(name)
        if optimizer is not None:
            follow(optimizer, before, list(self._growing()))

    def grow(self, name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """`add_task`, by the name that all methods have for it."""
        self.add_task(name, optimizer)

    def restore_task(
        self,
        name: str,
        adapters: Any,
        key: Tensor,
        modules: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`add_task` with weights that exist already, as a checkpoint has them.

        Args:
            name: as in `add_task`.
            adapters: by the path of each patched layer, A [r, in_features], B [r, out_features]
                and the scaling; copied, ranks may differ. With `adapter="prompt"` the prompt
                [P, D].
            key: [D].
            modules: the task's copies of `modules_to_save`, by their names in the base model; None
                for the base model's own.

        Raises:
            ValueError: as `add_task`; or if adapters lacks a layer, names another, or has a matrix
                of another shape; or key has another shape. Nothing has changed then.
        """
        self._require_new(name)
        self.put_task(name, adapters, key, modules)

    @property
    def attention(self) -> Tensor | None:
        """Weights [B, K] of this thread's last forward, detached; None before the first
        and after one inside a transform of torch.func.

        In generation with beams or several returned sequences B counts these, and where samples
        have C choices [B, C, T] it counts all B * C choices. Of packed rows, in which several texts
        follow each other, the weights are those of every token, [B, T, K].
        """
        weights = self.routing.weights
        return None if weights is None else weights.detach()

    def fixed(self, weights: Tensor) -> AbstractContextManager[None]:
        """A context in which these weights stand in for the router's, in this thread.

        Args:
            weights: [K] or [1, K] for every input, [B, K] per sample or (of LoRAs) [B, T, K] per
                token. Where samples have choices [B, C, T], [B, K] is for all choices of a sample;
                of packed rows, [S, K] is for their S texts. A forward whose batch is another than
                B raises RuntimeError.

        Raises:
            ValueError: if the shape does not fit, or weights are not finite.
        """
        weights = self.routing.checked(weights)
        known = transforms.values(weights)
        if known is not None and not torch.isfinite(known).all():
            raise ValueError("weights: got non-finite values, expected finite floats")
        return self.routing.pin(weights.to(self._device))

    @property
    def _device(self) -> torch.device:
        """Where weights are computed."""
        raise NotImplementedError

    # --- what is trained of the base model ---

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """What training a task updates.

        The newest adapter, its key, the query projection and `config.modules_to_save`.
        """
        return (p for p in self._model.parameters() if p.requires_grad)

    def trained_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of the base model itself, by name.

        The modules that all tasks train, and whatever else of the base model requires a gradient or
        changed since `patch`.
        """
        return trained_tensors(self._model, self._in_place, self._changes)

    def restore_trained(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies trained tensors into the base model, whose parameters among them train again.

        Args:
            tensors: as `trained_tensors` returned them.

        Raises:
            ValueError: if the model has no such tensor, or one of another shape; nothing has
                changed then.
        """
        require_present("tensors", tensors, self._model)
        own = base_tensors(self._model)
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
        for name in tensors:
            parameter = own[name]
            if isinstance(parameter, nn.Parameter):
                self._beside.append(parameter.requires_grad_(True))

    # --- saving ---

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        is_main_process: bool | None = None,
        strategy_state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Saves one PEFT adapter folder per task, router.safetensors and sapt_config.json; atomic.

        Args:
            directory: what an earlier call wrote there is replaced, other files stay.
            is_main_process: whether this process writes; only one may at a time. None if it calls;
                of a sharded model, for which all processes must call, rank 0 alone.
            strategy_state: what a continual strategy remembers beside the adapters.

        Raises:
            ValueError: if there is no task, the targets do not fit the tasks, or the directory
                cannot be replaced or holds a damaged sapt_config.json.
            FileExistsError: if a file that this method has not written is in the way.
            RuntimeError: if a mixture is merged into the base weights.
            OSError: if it cannot be written; it is then as it was.
        """
        save_tasks(self, directory, is_main_process=is_main_process, strategy_state=strategy_state)

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        is_main_process: bool | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`save_pretrained`, with values from a state_dict of the model if one is given."""
        save_tasks(self, directory, is_main_process=is_main_process, state=state)

    def export_adapter(
        self,
        weights: Tensor | Sequence[float],
        directory: str | os.PathLike[str],
        *,
        is_main_process: bool | None = None,
    ) -> None:
        """Saves the static mixture `weights` [K] as one ordinary PEFT LoRA (or prompt); atomic.

        The rank of the LoRA is the total rank R of all tasks: A is stacked, the columns of B are
        multiplied by weight and scaling, and the adapter's own scaling is 1.

        Args:
            weights: [K], finite; in learning order.
            directory: what an earlier call wrote there is replaced, other files stay.
            is_main_process: as in `save_pretrained`.

        Raises:
            ValueError: if there is no task, the weights do not fit, the directory cannot be
                replaced, or tasks have copies of a module that no static mixture is like (weights
                other than one 1 and zeros, and no plain linear layer).
            FileExistsError: if another adapter is in the way.
            OSError: if it cannot be written; it is then as it was.
        """
        export_mixture(self, weights, directory, is_main_process=is_main_process)

    @property
    def slot(self) -> str:
        """The name of a patched layer's pool."""
        return "sapt_pool"

    @property
    def config_file(self) -> str:
        """The file of a saved folder that describes the tasks."""
        return CONFIG_FILE

    def restore_tasks(self, stored: StoredTasks) -> None:
        """Takes over checked tasks, into a handle without any."""
        own = stored.modules if stored.config.modules_per_task else [None] * len(stored.names)
        parts = zip(stored.names, stored.adapters, stored.keys, own, strict=True)
        for name, adapters, key, modules in parts:
            self.put_task(name, adapters, key, modules)
        self.router.load_state_dict(stored.router, strict=False)
        self.targets.update({name: target.clone() for name, target in stored.targets.items()})
        self.restore_trained(stored.trained)
        self.restore_state(stored.state)

    def set_values(self, stored: StoredTasks) -> None:
        """Gives the tasks that there are the values that they have in a checked folder."""
        with torch.no_grad():
            for k, adapter in enumerate(stored.adapters):
                self.set_adapter(k, adapter)
            for k, modules in enumerate(stored.modules):
                for name, own in self.task_modules.tensors(k).items():
                    own.copy_(modules[name])
            self.restore_trained(stored.trained)
            self.router.keys.rows().copy_(stored.keys)
            self.router.load_state_dict(stored.router, strict=False)
        self.restore_state(stored.state)
        self.targets.clear()
        self.targets.update({name: target.clone() for name, target in stored.targets.items()})

    def restore_values(self, directory: str | os.PathLike[str]) -> None:
        """Gives the tasks that the model has the values that they have in a saved folder.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: as `sapt_fast.load_pretrained`, or if the folder holds other tasks.
        """
        description, files = read_directory(directory, CONFIG_FILE, read_files)
        method = method_of(description)
        if is_sealed(description) and method != self.method:
            raise ValueError(f"{files.folder}: method is {method!r}, expected {self.method!r}")
        require_same_config(self.config, description["config"], files.folder / CONFIG_FILE)
        expected = self.expected(self._model, self.config, self.report)
        stored = read_tasks(self._model, expected, description, files)
        if stored.names != self.tasks:
            raise ValueError(
                f"{files.folder}: holds the tasks {stored.names}, but the model has {self.tasks}"
            )
        source = files.folder / STRATEGY_FILE
        self.require_state(self._model, self.config, stored.state, len(stored.names), source)
        self.set_values(stored)

    # --- hooks ---

    def install(self) -> None:
        """Adds the hooks and lets the shared `modules_to_save` train; called by `patch`."""
        self.routing.install()
        super().install()
        self.task_modules.install(self.routing)
        if self.task_modules.paths and self.task_modules not in self.routing.pools:
            self.routing.pools.append(self.task_modules)
        for parameter in self._beside:
            parameter.requires_grad_(True)
        self._hooks = [
            self._model.register_load_state_dict_pre_hook(self._before_load),
            self._model.register_load_state_dict_post_hook(self._after_load),
        ]

    def remove(self) -> None:
        """Takes the hooks away; called by `unpatch`."""
        self.routing.remove()
        super().remove()
        self.task_modules.remove()
        for parameter in self._beside:
            parameter.requires_grad_(False)
        for hook in self._hooks:
            hook.remove()

    # What a state_dict brings is as the base model was, not trained here.

    def _before_load(self, *args: Any) -> None:
        self._changes.settle(self._model)

    def _after_load(self, *args: Any) -> None:
        self._changes.restart(self._model)

    def _has_tasks(self) -> bool:
        return bool(self.tasks)

    def _count(self) -> int:
        return len(self.tasks)

    def _require_task(self) -> None:
        if not self.tasks:
            raise RuntimeError(
                f"there is no task yet: call model.{self.attribute}.add_task(name) first"
            )

    def _require_new(self, name: str) -> None:
        self.routing.require_unmerged()
        require_folder_name("name: got", name, self.tasks)

    def _task_added(self, name: str) -> None:
        self._tasks.append(name)
        self.routing.weights = None


def task_handle(model: nn.Module) -> TaskHandle | None:
    """The handle of a model's pool of tasks; None if it has none."""
    return next((one for one in handles(model) if isinstance(one, TaskHandle)), None)


def pool_of(model: nn.Module) -> Any:
    """The handle of a model's pool of tasks.

    Raises:
        ValueError: if it has none.
    """
    handle = task_handle(model)
    if handle is None:
        raise ValueError("model: not patched by sapt_fast.patch")
    return handle
