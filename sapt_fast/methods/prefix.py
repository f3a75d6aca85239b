"""Methods whose pools are prefixes of attention layers: CODA-Prompt and DualPrompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from sapt_fast.methods.base import follow, require_held
from sapt_fast.methods.config import MethodConfig
from sapt_fast.methods.queried import QueryHandle
from sapt_fast.methods.task_config import require
from sapt_fast.pools.rows import RowStack
from sapt_fast.routing.queries import QueryRouting
from sapt_fast.sites.prefix import (
    AtAttention,
    attach_prefix,
    detach_prefix,
    prefix_size,
    require_prefix,
)

__all__ = ["PrefixConfig", "PrefixHandle"]

_Handle = TypeVar("_Handle")
_OF_QUERIES = ("keys", "attention")  # stacks whose rows are as wide as queries


@dataclass
class PrefixConfig(MethodConfig[_Handle]):
    """The fields that methods with prefixes share."""

    query_layer: int | None = field(
        default=None,
        metadata={
            "help": "Images: number of encoder layers of the frozen model that compute a query; "
            "None for all of them and the last norm."
        },
    )
    query_pooling: str | None = field(
        default=None,
        metadata={
            "help": "Query of an image: 'cls', the CLS token, or 'mean', the mean of the patches; "
            "None for 'cls', or 'mean' if the model has no CLS token. Texts have 'mean'."
        },
    )
    modules_to_save: Sequence[str] | None = field(
        default=None,
        metadata={
            "help": "Modules to train in full and save with the prefixes: names (last parts of "
            "the path); None for the classifier, if there is one, and [] for no module."
        },
    )
    autocast_adapter_dtype: bool = field(
        default=False,
        metadata={
            "help": "Keep prefixes and keys in float32 if the model's weights are float16 or "
            "bfloat16; otherwise they have the weights' dtype."
        },
    )

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range; converts names to lists, as in JSON."""
        layer, named = self.query_layer, self.modules_to_save
        require(layer is None or _is_count(layer), "query_layer", layer, "at least 1, or None")
        pooling, known = self.query_pooling, (None, "cls", "mean")
        require(pooling in known, "query_pooling", pooling, f"one of {known}")
        self.require_flags("autocast_adapter_dtype")
        if named is not None:
            self.modules_to_save = [named] if isinstance(named, str) else list(named)

    def require_layers(self, name: str) -> None:
        """Converts a field with indices of layers to a list.

        Raises:
            ValueError: if it does not contain distinct indices.
        """
        given = getattr(self, name)
        layers = [*given] if isinstance(given, (list, tuple)) else None
        fits = layers is not None and all(type(x) is int and x >= 0 for x in layers)
        expected = "indices of encoder layers, each at least 0 and named once"
        require(fits and len({*layers}) == len(layers) > 0, name, given, expected)  # type: ignore
        setattr(self, name, layers)

    def require_counts(self, *names: str) -> None:
        """Raises ValueError unless these fields are integers of at least 1."""
        for name in names:
            value = getattr(self, name)
            require(_is_count(value), name, value, "an integer, at least 1")

    def require_weight(self, name: str) -> None:
        """Raises ValueError unless a field is a finite number of at least 0."""
        value = getattr(self, name)
        fits = isinstance(value, (int, float)) and 0 <= value < float("inf")
        require(fits, name, value, "a number, at least 0")

    def require_flags(self, *names: str) -> None:
        """Raises ValueError unless these fields are True or False."""
        for name in names:
            value = getattr(self, name)
            require(isinstance(value, bool), name, value, "True or False")

    def adapter_dtype(self, base: torch.dtype) -> torch.dtype:
        """Returns the dtype of prefixes and keys for base weights of dtype `base`."""
        return torch.promote_types(base, torch.float32) if self.autocast_adapter_dtype else base


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


class PrefixHandle(QueryHandle):
    """The base class of handles whose pools are prefixes, chosen or weighted by queries.

    A subclass defines `sites`, `make`, `signal`, `stacks` and what a task adds.

    Attributes:
        Routing: the class of `routing`.
        routing: the weights (or places) of the running forward.
    """

    site = "attention"
    Routing: ClassVar[type[QueryRouting]] = QueryRouting

    def __init__(self, model: Any, config: Any, report: Any) -> None:
        super().__init__(model, config, report)
        self.routing = self.Routing(model, self._route, self._has_tasks, self._count)

    # --- what a method with prefixes defines ---

    def make(self, path: str) -> AtAttention:
        """Returns the module that gives the attention layer at `path` its prefix."""
        raise NotImplementedError

    @property
    def share(self) -> int:
        """The number of rows that each task adds to each of `stacks`."""
        return 1

    def stacks(self) -> dict[str, RowStack]:
        """Returns the rows of all tasks, by the names of their tensors in saved folders."""
        raise NotImplementedError

    def new_keys(self, width: int) -> None:
        """Replaces the keys by none, for queries [B, width]; there is no task yet."""
        raise NotImplementedError

    def kept(self) -> dict[str, nn.Parameter]:
        """Returns the parameters that all tasks train, by their names in saved folders."""
        return {}

    def _route(self, **inputs: Any) -> Tensor:
        """Returns the weights (or places) of the running forward."""
        return self.signal(**inputs)

    def _add(self) -> None:
        """Adds the rows of a new task."""
        raise NotImplementedError

    def _count(self) -> int:
        """Returns the number of weights (or indices) per sample that a caller has to give."""
        raise NotImplementedError

    @property
    def query_width(self) -> int:
        """D of the queries, which is that of the keys."""
        return next(s.width for name, s in self.stacks().items() if name.endswith("keys"))

    def set_query_width(self, width: int) -> None:
        """Replaces the keys by none, for queries [B, width]; there is no task yet."""
        self.new_keys(width)
        self.routing.pools[:] = self.stacks().values()

    @property
    def _device(self) -> torch.device:
        return prefix_size(self._model.get_submodule(self.report.patched[0]))[1]

    # --- places ---

    def attach(self, path: str) -> None:
        """Puts the module that `make` returns at an attention layer."""
        attach_prefix(self._model, path, self.slot, self.make(path))

    def detach(self, path: str) -> None:
        """Removes the module from the layer."""
        detach_prefix(self._model, path, self.slot)

    def require_own(self) -> None:
        """Raises ValueError if another library has replaced a layer."""
        for path in self.report.patched:
            require_prefix(self._model, path, self.slot)

    def sources(self) -> dict[str, Any]:
        """Returns the module at each layer, by the layer's path."""
        return {
            path: getattr(self._model.get_submodule(path), self.slot)
            for path in self.report.patched
        }

    def install(self) -> None:
        """Adds the hooks and unfreezes the `modules_to_save`; called by `patch`."""
        super().install()
        self.routing.pools[:] = self.stacks().values()

    # --- tasks ---

    def grow(self, name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Adds a task, whose rows train from now on; those of earlier tasks freeze.

        Args:
            name: the task's name, unique.
            optimizer: gets the method's parameters for the first task, in its first group. Later,
                the new parameters replace those of the previous task, with fresh state. None
                changes no optimizer.

        Raises:
            ValueError: if the name is not valid, or another task has it.
            ValueError: if the optimizer contains none of the previous task's parameters.

        Nothing has changed after an error.
        """
        self._require_new(name)
        first, before = not self.tasks, list(self._growing())
        if optimizer is not None and not first:
            require_held(optimizer, before)
        self._add()
        self._task_added(name)
        if optimizer is not None:
            after = list(self._growing())
            follow(optimizer, before, after)
            if first:
                held = {id(p) for group in optimizer.param_groups for p in group["params"]}
                new = [p for p in (*after, *self.kept().values()) if id(p) not in held]
                optimizer.param_groups[0]["params"] += new

    def _task_added(self, name: str) -> None:
        self._tasks.append(name)
        self.routing.weights = None
        for parameter in self.kept().values():
            parameter.requires_grad_(True)

    def _growing(self) -> Iterator[nn.Parameter]:
        yield from (stack.trainable for stack in self.stacks().values())

    def _rows(self) -> Iterator[tuple[RowStack, Sequence[int]]]:
        for stack in self.stacks().values():
            yield stack, [self.share] * len(self.tasks)

    def _selected(self, order: Sequence[int], *, same: bool) -> None:
        """Freezes what all tasks train if no task is left."""
        for parameter in self.kept().values():
            parameter.requires_grad_(parameter.requires_grad and bool(order))

    # --- saving ---

    def own_tensors(self) -> dict[str, Tensor]:
        """Returns the rows of all tasks, and the parameters that all tasks train."""
        rows = {name: stack.rows() for name, stack in self.stacks().items()}
        return rows | {name: parameter.data for name, parameter in self.kept().items()}

    def own_shapes(self, tasks: int, width: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of `own_tensors` for a number of tasks and queries [B, width]."""
        rows = tasks * self.share
        shapes: dict[str, tuple[int, ...]] = {
            name: (rows, width if name.endswith(_OF_QUERIES) else stack.width)
            for name, stack in self.stacks().items()
        }
        return shapes | {name: tuple(p.shape) for name, p in self.kept().items()}

    def begin_stored(self, tasks: list[str], own: Mapping[str, Tensor]) -> None:
        """Adds the rows of each task of a saved folder."""
        share = self.share
        for index, name in enumerate(tasks):
            for key, stack in self.stacks().items():
                rows = own[key][index * share : (index + 1) * share]
                stack.append(share, lambda fresh, rows=rows: fresh.copy_(rows))  # type: ignore
            self._task_added(name)

    def set_own(self, own: Mapping[str, Tensor]) -> None:
        """Sets the existing tasks to the values of stored tensors."""
        for key, stack in self.stacks().items():
            stack.rows().copy_(own[key])
        for key, parameter in self.kept().items():
            parameter.copy_(own[key])
