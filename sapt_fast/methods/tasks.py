"""The handle of methods with one adapter per task: SAPT and methods built on it."""

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
from sapt_fast.methods.base import follow, handles, require_held
from sapt_fast.methods.task_order import OrderedTasks, reordered_targets
from sapt_fast.ops import transforms
from sapt_fast.pools.rows import RowStack
from sapt_fast.routing.hooks import Routing
from sapt_fast.sites.modules import TaskModules
from sapt_fast.sites.report import PatchReport
from sapt_fast.sites.trained import Trained, saved_modules
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

__all__ = ["TaskHandle", "learner_of", "pool_of", "task_handle"]


class TaskHandle(OrderedTasks):
    """The tasks of a model, each with an adapter, and the weights that mix the adapters.

    A subclass defines the adapters (`pools`, `put_task`, `adapters` and the methods that begin with
    an underscore) and computes their weights (`signal`).

    Attributes:
        tasks: names in learning order, oldest first.
        targets: by task name, the mean weights [k] over the task's inputs when it had been learned
            (k = 1 + its index; learning order). The training code fills it; it is saved and loaded
            with the adapters.
        task_modules: each task's own copies of `config.modules_to_save`, with
            `config.modules_per_task`.
        strategy: the continual strategy that trains the tasks; None outside of a run.
        routing: the weights of the running forward.
        router: a module with `add_key`, `keys` and a state_dict, such as `SaptRouter`.
        adapter_files: the file format of an adapter.
        weights_sum_to_one: whether the weights of an input sum to 1.
    """

    adapter_files: ClassVar[AdapterFiles]
    weights_sum_to_one: ClassVar[bool] = True
    targets: dict[str, Tensor]
    routing: Routing
    router: Any

    def __init__(self, model: Any, config: Any, report: PatchReport) -> None:
        super().__init__(model, config, report)
        self.targets = {}
        self.strategy: str | None = None
        saved = saved_modules(model, config, report, "the tasks")
        self.task_modules = TaskModules(model, saved if config.modules_per_task else ())
        self._trained = Trained(model, [] if config.modules_per_task else saved)

    # --- what the adapters are ---

    def put_task(
        self,
        name: str,
        adapters: Any,
        key: Tensor,
        modules: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Adds a task as `restore_task` does, without checking the name.

        Earlier versions allowed some names that `restore_task` refuses.
        """
        raise NotImplementedError

    def adapters(self, state: Mapping[str, Tensor] | None = None) -> list[Any]:
        """Returns each task's adapter as it is stored; sharded tensors are gathered.

        Args:
            state: the model's state_dict, whose values are used instead of the current ones.
        """
        raise NotImplementedError

    def set_adapter(self, index: int, adapter: Any) -> None:
        """Copies the values of a stored adapter into that of task `index`."""
        raise NotImplementedError

    def mixed_adapter(self, weights: Tensor, shared: Mapping[str, Tensor]) -> Any:
        """Returns one adapter that computes a static mixture.

        Args:
            weights: [K], in learning order.
            shared: tensors of the base model that were trained with the adapters, by name.
        """
        raise NotImplementedError

    def state(self, held: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Returns the method's further tensors, besides adapters, router and targets, by name.

        Args:
            held: the model's state_dict, whose values are used instead of the current ones.
        """
        return {}

    def restore_state(self, state: Mapping[str, Tensor]) -> None:
        """Sets what `state` returned, after `require_state` has checked it; ignores other names."""

    @classmethod
    def require_state(
        cls, model: Any, config: Any, state: Mapping[str, Tensor], tasks: int, source: Path
    ) -> None:
        """Raises ValueError unless a state of `tasks` tasks has what `restore_state` needs."""

    @classmethod
    def expected(cls, model: Any, config: Any, report: PatchReport) -> Expected:
        """Returns what a saved folder of this method with this config must contain."""
        raise NotImplementedError

    def _add_adapters(self) -> None:
        """Adds a new adapter everywhere, which does not change the output yet."""
        raise NotImplementedError

    def _add_key(self) -> None:
        """Adds what a new task needs besides adapter and modules."""

    # --- tasks ---

    def add_task(self, name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Adds a task: an adapter in every patched layer and a key, which train from now on.

        The adapters and keys of earlier tasks freeze.

        Args:
            name: the task's name, unique; `save_pretrained` uses it as a folder name.
            optimizer: in its parameter groups, the new parameters replace those of the previous
                task, with fresh state. None changes no optimizer.

        Raises:
            ValueError: if another task has the name.
            ValueError: if name cannot be a folder on every file system: it is empty, too long,
                differs from another only in case, ...
            ValueError: if the optimizer contains none of the previous task's parameters.
            ValueError: if another library has replaced a patched layer.
            RuntimeError: if a mixture is merged into the base weights.

        Nothing has changed after an error.
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
        """Calls `add_task`; all methods have `grow`."""
        self.add_task(name, optimizer)

    def _rows(self) -> Iterator[tuple[RowStack, Sequence[int]]]:
        """Yields each pool's rows, with the number of rows of each task."""
        yield self.router.keys, [1] * len(self.tasks)

    def _selected(self, order: Sequence[int], *, same: bool) -> None:
        """Selects the copies of modules and the targets."""
        self.task_modules.select(order, same=same)
        targets = reordered_targets(self.targets, self.tasks, order, self.weights_sum_to_one)
        self.targets.clear()
        self.targets.update(targets)

    def _renamed(self, old: str, new: str) -> None:
        """Renames the target."""
        if old in self.targets:
            self.targets[new] = self.targets.pop(old)

    def restore_task(
        self,
        name: str,
        adapters: Any,
        key: Tensor,
        modules: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Adds a task with given weights, for example those of a checkpoint.

        Args:
            name: as in `add_task`.
            adapters: by the path of each patched layer, (A [r, in_features], B [r, out_features],
                scaling). They are copied; ranks may differ. With `adapter="prompt"`, the prompt
                [P, D].
            key: [D].
            modules: the task's copies of `modules_to_save`, by their names in the base model; None
                for the base model's own.

        Raises:
            ValueError: as `add_task`.
            ValueError: if adapters lacks a layer, contains an unknown one, or has a matrix of
                another shape.
            ValueError: if key has another shape.
            RuntimeError: as `add_task`.

        Nothing has changed after an error.
        """
        self._require_new(name)
        self.put_task(name, adapters, key, modules)

    @property
    def attention(self) -> Tensor | None:
        """Weights [B, K] of this thread's last forward, detached.

        None before the first forward, and after a forward inside a transform of torch.func.

        - In generation, B counts beams and returned sequences.
        - For samples with choices [B, C, T], the first dimension is B * C.
        - For packed rows (several texts in one row), the weights are per token, [B, T, K].
        """
        weights = self.routing.weights
        return None if weights is None else weights.detach()

    def fixed(self, weights: Tensor) -> AbstractContextManager[None]:
        """Returns a context in which these weights replace the router's, in this thread.

        Args:
            weights: [K] or [1, K] for every input, [B, K] per sample, or (LoRA only) [B, T, K] per
                token. For samples with choices [B, C, T], [B, K] applies to all choices of a
                sample. For packed rows, [S, K] applies to their S texts. Inside the context, a
                forward with another batch size than B raises RuntimeError.

        Raises:
            ValueError: if the shape does not fit.
            ValueError: if weights are not finite.
        """
        weights = self.routing.checked(weights)
        known = transforms.values(weights)
        if known is not None and not torch.isfinite(known).all():
            raise ValueError("weights: got non-finite values, expected finite floats")
        return self.routing.pin(weights.to(self._device))

    @property
    def _device(self) -> torch.device:
        """The device on which weights are computed."""
        raise NotImplementedError

    # --- what is trained of the base model ---

    def trained_tensors(self) -> dict[str, Tensor]:
        """Returns the base model's tensors that a checkpoint must contain, by name.

        They are those of the modules that all tasks train, and all others that require a gradient
        or have changed since `patch`.
        """
        return self._trained.tensors()

    def restore_trained(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies trained tensors into the base model; its parameters among them then train.

        Args:
            tensors: the return value of `trained_tensors`.

        Raises:
            ValueError: if the model lacks a tensor, or has one of another shape; nothing has
                changed then.
        """
        self._trained.restore(tensors)

    # --- saving ---

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        is_main_process: bool | None = None,
        strategy_state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Saves one PEFT adapter folder per task, router.safetensors and sapt_config.json.

        The save is atomic: after an interruption, the folder has the old or the new content.

        Args:
            directory: the folder. The files of an earlier call are replaced; other files stay.
            is_main_process: whether this process writes. Only one process may write at a time.
                None: every process that calls writes; for a sharded model, all processes must
                call, and only rank 0 writes.
            strategy_state: further tensors of a continual strategy, by name.

        Raises:
            ValueError: if there is no task.
            ValueError: if the targets do not fit the tasks.
            ValueError: if the directory cannot be replaced, or contains a damaged
                sapt_config.json.
            FileExistsError: if a file with the name of a new one was not written by this method.
            RuntimeError: if a mixture is merged into the base weights.
            OSError: if the directory cannot be written; its content is then unchanged.
        """
        save_tasks(self, directory, is_main_process=is_main_process, strategy_state=strategy_state)

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        is_main_process: bool | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Saves as `save_pretrained` does, with the values of a state_dict.

        Args:
            directory, is_main_process: as in `save_pretrained`.
            state: the model's state_dict, whose values are saved; None for the current values.
        """
        save_tasks(self, directory, is_main_process=is_main_process, state=state)

    def export_adapter(
        self,
        weights: Tensor | Sequence[float],
        directory: str | os.PathLike[str],
        *,
        is_main_process: bool | None = None,
    ) -> None:
        """Saves a static mixture as one ordinary PEFT LoRA (or prompt); atomic.

        The rank of the LoRA is the total rank R of all tasks: A is stacked, the columns of B are
        multiplied by weight and scaling, and the adapter's own scaling is 1.

        Args:
            weights: [K], finite; in learning order.
            directory: the folder. The files of an earlier call are replaced; other files stay.
            is_main_process: as in `save_pretrained`.

        Raises:
            ValueError: if there is no task.
            ValueError: if the weights do not fit.
            ValueError: if the directory cannot be replaced.
            ValueError: if tasks have copies of a module that cannot be mixed statically: a module
                other than a plain linear layer, with weights other than one 1 and zeros.
            FileExistsError: if the directory contains another adapter.
            OSError: if the directory cannot be written; its content is then unchanged.
        """
        export_mixture(self, weights, directory, is_main_process=is_main_process)

    @property
    def slot(self) -> str:
        """The attribute name of a patched layer's pool."""
        return "sapt_pool"

    @property
    def config_file(self) -> str:
        """The file of a saved folder that describes the tasks."""
        return CONFIG_FILE

    def restore_tasks(self, stored: StoredTasks) -> None:
        """Adds checked tasks to a handle without tasks."""
        own = stored.modules if stored.config.modules_per_task else [None] * len(stored.names)
        parts = zip(stored.names, stored.adapters, stored.keys, own, strict=True)
        for name, adapters, key, modules in parts:
            self.put_task(name, adapters, key, modules)
        self.router.load_state_dict(stored.router, strict=False)
        self.targets.update({name: target.clone() for name, target in stored.targets.items()})
        self.restore_trained(stored.trained)
        self.restore_state(stored.state)

    def set_values(self, stored: StoredTasks) -> None:
        """Sets the existing tasks to the values of a checked folder."""
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
        """Sets the model's tasks to the values in a saved folder.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: as `sapt_fast.load_pretrained`.
            ValueError: if the folder contains other tasks.
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
                f"{files.folder}: got tasks {stored.names}, expected {self.tasks}, the model's"
            )
        source = files.folder / STRATEGY_FILE
        self.require_state(self._model, self.config, stored.state, len(stored.names), source)
        self.set_values(stored)

    # --- hooks ---

    def install(self) -> None:
        """Adds the hooks and unfreezes the shared `modules_to_save`; called by `patch`."""
        self.routing.install()
        super().install()
        self.task_modules.install(self.routing)
        if self.task_modules.paths and self.task_modules not in self.routing.pools:
            self.routing.pools.append(self.task_modules)
        self._trained.install()

    def remove(self) -> None:
        """Removes the hooks; called by `unpatch`."""
        self.routing.remove()
        super().remove()
        self.task_modules.remove()
        self._trained.remove()

    def _has_tasks(self) -> bool:
        return bool(self.tasks)

    def _count(self) -> int:
        return len(self.tasks)

    def _require_task(self) -> None:
        if not self.tasks:
            raise RuntimeError(
                f"the model has no task yet: call model.{self.attribute}.add_task(name) first"
            )

    def _require_new(self, name: str) -> None:
        self.routing.require_unmerged()
        require_folder_name("name: got", name, self.tasks)

    def _task_added(self, name: str) -> None:
        self._tasks.append(name)
        self.routing.weights = None


def task_handle(model: nn.Module) -> TaskHandle | None:
    """Returns the handle of a model's pool of tasks; None if it has none."""
    return next((one for one in handles(model) if isinstance(one, TaskHandle)), None)


def learner_of(model: nn.Module) -> Any:
    """Returns the handle of the method that learns tasks: a pool of tasks, or of prompts.

    Raises:
        ValueError: if the model has none.
    """
    found = task_handle(model) or next((h for h in handles(model) if h.routing is not None), None)
    if found is None:
        raise ValueError("model: not patched by sapt_fast.patch")
    return found


def pool_of(model: nn.Module) -> Any:
    """Returns the handle of a model's pool of tasks.

    Raises:
        ValueError: if the model has none.
    """
    handle = task_handle(model)
    if handle is None:
        raise ValueError("model: not patched by sapt_fast.patch")
    return handle
