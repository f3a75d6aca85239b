"""Methods whose pools are prefixes of attention layers: CODA-Prompt and DualPrompt."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from sapt_fast.files.directories import read_directory
from sapt_fast.files.names import require_folder_name
from sapt_fast.methods.base import Handle, follow, require_held
from sapt_fast.methods.config import MethodConfig
from sapt_fast.methods.task_config import require
from sapt_fast.pools.rows import RowStack
from sapt_fast.routing.images import ImageRouting
from sapt_fast.sites.image_queries import ImageQueries
from sapt_fast.sites.modules import find_modules, heads, require_present, with_prefix
from sapt_fast.sites.prefix import (
    AtAttention,
    attach_prefix,
    detach_prefix,
    prefix_size,
    require_prefix,
)
from sapt_fast.sites.trained import Trained
from sapt_fast.storage.method_files import read_method
from sapt_fast.storage.tasks import require_same_config

__all__ = ["PrefixConfig", "PrefixHandle"]

_Handle = TypeVar("_Handle")
_OF_QUERIES = ("keys", "attention")  # stacks whose rows are as wide as queries


@dataclass
class PrefixConfig(MethodConfig[_Handle]):
    """The fields that methods with prefixes share."""

    query_layer: int | None = field(
        default=None,
        metadata={
            "help": "Number of encoder layers of the frozen model that compute an image's query; "
            "None for all of them and the last norm."
        },
    )
    query_pooling: str | None = field(
        default=None,
        metadata={
            "help": "Query of an image: 'cls', the CLS token, or 'mean', the mean of the patches; "
            "None for 'cls', or 'mean' if the model has no CLS token."
        },
    )
    modules_to_save: Sequence[str] | None = field(
        default=None,
        metadata={
            "help": "Modules to train in full and save with the prefixes, such as "
            "['classifier']: names (last parts of the path); None for no module."
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


class PrefixHandle(Handle):
    """The base class of handles whose pools are prefixes, chosen or weighted by image queries.

    A subclass defines `sites`, `make`, `signal`, `stacks` and what a task adds.

    Attributes:
        Routing: the class of `routing`.
        routing: the weights (or places) of the running forward.
    """

    site = "attention"
    Routing: ClassVar[type[ImageRouting]] = ImageRouting
    routing: ImageRouting

    def __init__(self, model: Any, config: Any, report: Any) -> None:
        super().__init__(model, config, report)
        saved = find_modules(model, config.modules_to_save or (), report.patched)
        unsaved = [path for path in heads(model) if path not in saved]
        if unsaved:
            report.notes.append(
                f"{', '.join(unsaved)} is frozen and will not train; to train a head and save it "
                f"with the prefixes, set modules_to_save={unsaved} in the config"
            )
        self._trained = Trained(model, saved)
        self._images = ImageQueries(model, config.query_layer, config.query_pooling)
        self._encoder_is_missing = False
        self.routing = self.Routing(model, self.signal, self._has_tasks, self._count)
        self.routing.tower = self._images.parts.tower

    # --- what a method with prefixes defines ---

    def signal(self, **inputs: Any) -> Tensor:
        """Returns the weights (or places) [B, K] of a forward.

        Args:
            **inputs: pixel_values [B, C, H, W] and interpolate_pos_encoding.
        """
        raise NotImplementedError

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

    def _add(self) -> None:
        """Adds the rows of a new task."""
        raise NotImplementedError

    def _count(self) -> int:
        """Returns the number of weights (or indices) per image that a caller has to give."""
        raise NotImplementedError

    def key_loss(
        self, pixel_values: Tensor | None = None, interpolate_pos_encoding: bool | None = None
    ) -> Tensor:
        """Returns the term that the method adds to the loss, a scalar.

        Args:
            pixel_values, interpolate_pos_encoding: as passed to the model.
        """
        raise NotImplementedError

    def count_picks(self, batches: Any) -> None:
        """Ends a task; these methods count nothing."""

    # --- queries and weights ---

    def query(self, pixel_values: Tensor, interpolate_pos_encoding: bool | None = None) -> Tensor:
        """Returns the queries [B, D] of images, of the model without prefixes; no gradient.

        Args:
            pixel_values: [B, C, H, W].
            interpolate_pos_encoding: as passed to the model.

        Raises:
            TypeError, ValueError: if the images do not fit the model.
            ValueError: inside `queries`, if they are those of another number of images.
            RuntimeError: after loading, if `look_up_by` has to be called.
        """
        given = self.routing.queries
        if given is None and self._encoder_is_missing:
            raise RuntimeError(
                "the keys were trained with the queries of another model, which is not saved with "
                f"them: call model.{self.attribute}.look_up_by(encoder) first"
            )
        if given is None:
            return self._images(pixel_values, bool(interpolate_pos_encoding))
        if len(given) != len(pixel_values):
            raise ValueError(
                f"queries: got {len(given)} for {len(pixel_values)} images, expected one each"
            )
        return given

    def queries(self, queries: Tensor) -> AbstractContextManager[None]:
        """Returns a context in which forwards use these queries instead of computing them.

        Args:
            queries: [B, D], what `query` returned for the images of these forwards.

        Raises:
            ValueError: if the shape does not fit, or queries are not floats.
        """
        width = self._query_width
        if queries.dim() != 2 or queries.shape[1] != width or not queries.is_floating_point():
            raise ValueError(
                f"queries: got {queries.dtype} of shape {tuple(queries.shape)}, expected floats "
                f"[B, {width}]"
            )
        return self.routing.use_queries(queries.detach())

    def look_up_by(self, encoder: nn.Module) -> None:
        """Lets another frozen model compute the queries; call it before the first task.

        The encoder is not saved: call this after loading, too.

        Args:
            encoder: in eval mode, takes pixel_values [B, C, H, W] and returns [B, D].

        Raises:
            ValueError, RuntimeError: if the encoder is in training mode, or returns something else.
            RuntimeError: if there are keys of another width.
        """
        images = ImageQueries(self._model, encoder=encoder)
        width = images.width
        if self.tasks and width != self._query_width:
            raise RuntimeError(
                f"encoder: got queries of width {width}, expected {self._query_width}, that of the "
                "keys"
            )
        if not self.tasks:
            self._make_keys(width)
        self._images, self._encoder_is_missing = images, False

    @property
    def _query_width(self) -> int:
        """D of the queries, which is that of the keys."""
        return next(s.width for name, s in self.stacks().items() if name.endswith("keys"))

    def _make_keys(self, width: int) -> None:
        if width != self._query_width:
            self.new_keys(width)
            self.routing.pools[:] = self.stacks().values()

    @property
    def attention(self) -> Tensor | None:
        """What this thread's last forward mixed or chose by, detached; None before the first."""
        weights = self.routing.weights
        return None if weights is None else weights.detach()

    def fixed(self, weights: Tensor) -> AbstractContextManager[None]:
        """Returns a context in which these weights replace the computed ones, in this thread.

        Args:
            weights: [K] or [1, K] for all images, or [B, K], as `attention`.

        Raises:
            ValueError: if they do not fit.
        """
        return self.routing.pin(self.routing.checked(weights).to(self._device))

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
        self.routing.install()
        super().install()
        self._trained.install()
        self.routing.pools[:] = self.stacks().values()

    def remove(self) -> None:
        """Removes the hooks; called by `unpatch`."""
        self.routing.remove()
        super().remove()
        self._trained.remove()

    # --- tasks ---

    def grow(self, name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Adds a task, whose rows train from now on; those of earlier tasks freeze.

        Args:
            name: the task's name, unique.
            optimizer: in its parameter groups, the new parameters replace those of the previous
                task, with fresh state. None changes no optimizer.

        Raises:
            ValueError: if the name is not valid, or another task has it.
            ValueError: if the optimizer contains none of the previous task's parameters.

        Nothing has changed after an error.
        """
        self._require_new(name)
        before = list(self._growing())
        if optimizer is not None:
            require_held(optimizer, before)
        self._add()
        self._task_added(name)
        if optimizer is not None:
            follow(optimizer, before, list(self._growing()))

    def add_task(self, name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Calls `grow`; methods with tasks have `add_task`."""
        self.grow(name, optimizer)

    def _require_new(self, name: str) -> None:
        require_folder_name("name: got", name, self.tasks)

    def _task_added(self, name: str) -> None:
        self._tasks.append(name)
        self.routing.weights = None
        for parameter in self.kept().values():
            parameter.requires_grad_(True)

    def _growing(self) -> Iterator[nn.Parameter]:
        yield from (stack.trainable for stack in self.stacks().values())

    def _has_tasks(self) -> bool:
        return bool(self.tasks)

    # --- saving ---

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the rows, the parameters of all tasks and what was trained of the base model."""
        if not self.tasks:
            raise ValueError(
                f"model: got no task, expected one; call model.{self.attribute}.grow(name) first"
            )
        tensors = {name: stack.rows() for name, stack in self.stacks().items()}
        tensors |= {name: parameter.data for name, parameter in self.kept().items()}
        tensors |= {f"trained.{name}": t for name, t in self._trained.tensors().items()}
        encoded = self._images.encoder is not None or self._encoder_is_missing
        return tensors, {"tasks": list(self.tasks), "encoder": encoded}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Copies what `stored` returned into a handle without tasks.

        Raises:
            ValueError: if something is missing or has another shape; nothing has changed then.
        """
        tasks, width = self._checked(tensors, values)
        self._make_keys(width)
        share = self.share
        for index, name in enumerate(tasks):
            for key, stack in self.stacks().items():
                rows = tensors[key][index * share : (index + 1) * share]
                stack.append(share, lambda fresh, rows=rows: fresh.copy_(rows))  # type: ignore
            self._task_added(name)
        self._set_values(tensors, values)

    def restore_values(self, directory: str | os.PathLike[str]) -> None:
        """Sets the model's tasks to the values in a saved folder.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if the folder contains something else, or other tasks.
        """
        read = partial(read_method, attribute=self.attribute)
        stored = read_directory(directory, self.config_file, read)
        require_same_config(self.config, stored.config, stored.source)
        tasks, width = self._checked(stored.tensors, stored.values)
        if tasks != self.tasks or width != self._query_width:
            raise ValueError(
                f"{stored.source}: got tasks {tasks} with queries of width {width}, expected "
                f"{self.tasks} with {self._query_width}, the model's"
            )
        self._set_values(stored.tensors, stored.values)

    def _checked(
        self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> tuple[list[str], int]:
        """Returns the tasks and the queries' width; raises ValueError as `restore`."""
        tasks, encoded = values.get("tasks"), values.get("encoder")
        if not isinstance(tasks, list) or not tasks or not isinstance(encoded, bool):
            raise ValueError(f"values: got {dict(values)}, expected tasks, and whether an encoder")
        if self._images.encoder is not None and not encoded:
            raise ValueError(
                "values: got keys for the model's own queries, expected those of an encoder: load "
                "them into a model without look_up_by"
            )
        for index, name in enumerate(tasks):
            require_folder_name("tasks: got", name, tasks[:index])
        own = {n: tuple(t.shape) for n, t in tensors.items() if not n.startswith("trained.")}
        width, rows = self._query_width, len(tasks) * self.share
        if encoded and self._images.encoder is None:
            width = next((x[1] for n, x in own.items() if n.endswith("keys") and x[1:]), width)
        expected: dict[str, tuple[int, ...]] = {
            name: (rows, width if name.endswith(_OF_QUERIES) else stack.width)
            for name, stack in self.stacks().items()
        }
        expected |= {name: tuple(p.shape) for name, p in self.kept().items()}
        if own != expected:
            raise ValueError(f"tensors: got shapes {own}, expected {expected}")
        require_present("tensors", with_prefix(tensors, "trained."), self._model)
        return tasks, width

    @torch.no_grad()
    def _set_values(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        for key, stack in self.stacks().items():
            stack.rows().copy_(tensors[key])
        for key, parameter in self.kept().items():
            parameter.copy_(tensors[key])
        self._trained.restore(with_prefix(tensors, "trained."))
        self._encoder_is_missing = values["encoder"] and self._images.encoder is None

    def extra_repr(self) -> str:
        return f"tasks={self.tasks}"
