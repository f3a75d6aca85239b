"""The base class of methods that choose or weigh by queries, of images or of texts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor

from sapt_fast.files.names import require_folder_name
from sapt_fast.methods.task_order import OrderedTasks
from sapt_fast.routing.queries import QueryRouting
from sapt_fast.sites.modules import require_present, with_prefix
from sapt_fast.sites.report import PatchReport
from sapt_fast.sites.trained import Trained, saved_modules

__all__ = ["QueryHandle"]


class QueryHandle(OrderedTasks):
    """The base class of CODA-Prompt and DualPrompt, and of L2P on images.

    `ImageHandle` or `TextHandle` defines the queries. A method defines what it adds to the model,
    its keys and `signal`, and what it saves: the methods that raise NotImplementedError here.

    Attributes:
        inputs: what has queries, for messages.
        routing: the weights (or places) of the running forward.
    """

    inputs: ClassVar[str]
    query: Callable[..., Tensor]  # of a kind of inputs
    routing: QueryRouting

    def __init__(self, model: Any, config: Any, report: PatchReport) -> None:
        super().__init__(model, config, report)
        saved = saved_modules(model, config, report, "the method")
        self._trained = Trained(model, saved)
        self._queries = self._new_queries()
        self._encoder_is_missing = False

    # --- what a kind of inputs defines ---

    def _new_queries(self) -> Any:
        """Returns what computes queries: `width` is D, `encoder` a model that computes them."""
        raise NotImplementedError

    # --- what a method defines ---

    def signal(self, **inputs: Any) -> Tensor:
        """Returns the weights (or places) [B, K] of a forward, whose arguments `inputs` are."""
        raise NotImplementedError

    def count_picks(self, batches: Any) -> None:
        """Ends a task; methods that count nothing do nothing."""

    @property
    def query_width(self) -> int:
        """D of the queries, which is that of the keys."""
        raise NotImplementedError

    def set_query_width(self, width: int) -> None:
        """Prepares keys for queries [B, width]; there is no task yet."""
        raise NotImplementedError

    def own_tensors(self) -> dict[str, Tensor]:
        """Returns the method's tensors by the names that they have in saved folders."""
        raise NotImplementedError

    def own_shapes(self, tasks: int, width: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of `own_tensors` for a number of tasks and queries [B, width]."""
        raise NotImplementedError

    def require_own_values(self, own: Mapping[str, Tensor], tasks: int) -> None:
        """Raises ValueError if stored tensors, whose shapes fit, cannot be the method's."""

    def begin_stored(self, tasks: list[str], own: Mapping[str, Tensor]) -> None:
        """Begins the tasks of a saved folder; there is none yet."""
        raise NotImplementedError

    def set_own(self, own: Mapping[str, Tensor]) -> None:
        """Sets the existing tasks to the values of stored tensors."""
        raise NotImplementedError

    @property
    def _device(self) -> torch.device:
        """The device on which weights (or places) are computed."""
        raise NotImplementedError

    # --- queries and weights ---

    def _queried(self, count: int, compute: Callable[[], Tensor]) -> Tensor:
        """Returns the queries [B, D] of B inputs: those of the caller, else what is computed.

        Raises:
            ValueError: inside `queries`, if they are those of another number of inputs.
            RuntimeError: after loading, if `look_up_by` has to be called.
        """
        given = self.routing.queries
        if given is None and self._encoder_is_missing:
            raise RuntimeError(
                "the keys were trained with the queries of another model, which is not saved with "
                f"them: call model.{self.attribute}.look_up_by(encoder) first"
            )
        if given is None:
            return compute()
        if len(given) != count:
            raise ValueError(
                f"queries: got {len(given)} for {count} {self.inputs}, expected one each"
            )
        return given.to(self._device, torch.promote_types(given.dtype, torch.float32))

    def last_cosines(self, trains: bool) -> Tensor:
        """Returns the cosines [B, N] by which this thread's last forward chose.

        Args:
            trains: whether the keys need a gradient through them.

        Raises:
            RuntimeError: if it did not choose by keys that train, or there is no gradient.
        """
        cosines = self.routing.cosines
        lost = trains and torch.is_grad_enabled()
        if cosines is None or (lost and not cosines.requires_grad):
            raise RuntimeError(
                f"key_loss: got no {self.inputs}, and the last forward did not choose prompts by "
                "the keys that train, or ran without gradients; call the model first, or pass "
                f"the {self.inputs}"
            )
        return cosines

    def queries(self, queries: Tensor) -> AbstractContextManager[None]:
        """Returns a context in which forwards use these queries instead of computing them.

        Args:
            queries: [B, D], what `query` returned for the inputs of these forwards.

        Raises:
            ValueError: if the shape does not fit, or queries are not floats.
        """
        width = self.query_width
        if queries.dim() != 2 or queries.shape[1] != width or not queries.is_floating_point():
            raise ValueError(
                f"queries: got {queries.dtype} of shape {tuple(queries.shape)}, expected floats "
                f"[B, {width}]"
            )
        queries = queries.clone() if queries.is_inference() else queries.detach()
        return self.routing.use_queries(queries)

    @property
    def attention(self) -> Tensor | None:
        """What this thread's last forward mixed or chose by, detached; None before the first."""
        weights = self.routing.weights
        return None if weights is None else weights.detach()

    def fixed(self, weights: Tensor) -> AbstractContextManager[None]:
        """Returns a context in which these weights (or places) replace computed ones, per thread.

        Args:
            weights: [K] or [1, K] for all inputs, or [B, K], as `attention`.

        Raises:
            ValueError: if they do not fit.
        """
        return self.routing.pin(self.routing.checked(weights).to(self._device))

    # --- hooks ---

    def install(self) -> None:
        """Adds the hooks and unfreezes the `modules_to_save`; called by `patch`."""
        self.routing.install()
        super().install()
        self._trained.install()

    def remove(self) -> None:
        """Removes the hooks; called by `unpatch`."""
        self.routing.remove()
        super().remove()
        self._trained.remove()

    # --- tasks ---

    def add_task(self, name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Calls `grow`; methods with tasks have `add_task`."""
        self.grow(name, optimizer)

    def _require_new(self, name: str) -> None:
        require_folder_name("name: got", name, self.tasks)

    def _has_tasks(self) -> bool:
        return bool(self.tasks)

    # --- saving ---

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the method's tensors, what was trained of the base model, and the tasks."""
        if not self.tasks:
            raise ValueError(
                f"model: got no task, expected one; call model.{self.attribute}.grow(name) first"
            )
        trained = {f"trained.{name}": t for name, t in self._trained.tensors().items()}
        encoded = self._queries.encoder is not None or self._encoder_is_missing
        return {**self.own_tensors(), **trained}, {"tasks": list(self.tasks), "encoder": encoded}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Copies what `stored` returned into a handle without tasks.

        Raises:
            ValueError: if something is missing or has another shape; nothing has changed then.
        """
        tasks, width, own = self._checked(tensors, values)
        if width != self.query_width:
            self.set_query_width(width)
        self.begin_stored(tasks, own)
        self._set_values(tensors, own, values)

    def restore_values(self, directory: str | os.PathLike[str]) -> None:
        """Sets the model's tasks to the values in a saved folder.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if the folder contains something else, or other tasks.
        """
        stored = self._read(directory)
        tasks, width, own = self._checked(stored.tensors, stored.values)
        if tasks != self.tasks or width != self.query_width:
            raise ValueError(
                f"{stored.source}: got tasks {tasks} with queries of width {width}, expected "
                f"{self.tasks} with {self.query_width}, the model's"
            )
        self._set_values(stored.tensors, own, stored.values)

    def _checked(
        self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> tuple[list[str], int, dict[str, Tensor]]:
        """Returns the tasks, the queries' width, and the method's own tensors.

        Raises:
            ValueError: as `restore`.
        """
        tasks, encoded = values.get("tasks"), values.get("encoder")
        if not isinstance(tasks, list) or not tasks or not isinstance(encoded, bool):
            raise ValueError(f"values: got {dict(values)}, expected tasks, and whether an encoder")
        if self._queries.encoder is not None and not encoded:
            raise ValueError(
                "values: got keys for the model's own queries, expected those of an encoder: load "
                "them into a model without look_up_by"
            )
        for index, name in enumerate(tasks):
            require_folder_name("tasks: got", name, tasks[:index])
        own = {n: t for n, t in tensors.items() if not n.startswith("trained.")}
        width, found = self.query_width, {n: tuple(t.shape) for n, t in own.items()}
        if encoded and self._queries.encoder is None:
            width = next((x[1] for n, x in found.items() if n.endswith("keys") and x[1:]), width)
        expected = self.own_shapes(len(tasks), width)
        if found != expected:
            raise ValueError(f"tensors: got shapes {found}, expected {expected}")
        self.require_own_values(own, len(tasks))
        require_present("tensors", with_prefix(tensors, "trained."), self._model)
        return tasks, width, own

    @torch.no_grad()
    def _set_values(
        self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> None:
        self.set_own(own)
        self._trained.restore(with_prefix(tensors, "trained."))
        self._encoder_is_missing = values["encoder"] and self._queries.encoder is None

    def extra_repr(self) -> str:
        return f"tasks={self.tasks}"
