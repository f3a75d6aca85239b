"""Reads what `sapt_fast.storage.task_saving` wrote, and checks it before a model changes."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sapt_fast.sites.find import layer_features
from sapt_fast.sites.modules import (
    base_tensors,
    find_modules,
    module_tensors,
    require_present,
    whole_modules,
    with_prefix,
)
from sapt_fast.sites.towers import input_layer, input_width
from sapt_fast.storage.base_model import require_base, require_model_type
from sapt_fast.storage.description import (
    CONFIG_FILE,
    MODULES_FILE,
    ROUTER_FILE,
    STRATEGY_FILE,
    check_description,
    is_sealed,
    require_sealed,
    stated_files,
)
from sapt_fast.storage.lora import require_shapes
from sapt_fast.storage.tensors import StoredFiles, read_tensors, require_finite

__all__ = [
    "AdapterFiles",
    "Expected",
    "StoredTasks",
    "read_files",
    "read_state",
    "read_tasks",
    "require_fits",
    "require_same_config",
    "require_targets",
]


class AdapterFiles(Protocol):
    """The file format of one kind of adapter (`storage.lora.LoraFiles`, `storage.prompt`)."""

    fields: frozenset[str]

    def described(self, adapter: Any) -> dict[str, Any]:
        """Returns the fields of a task in sapt_config.json, besides its name."""

    def write(
        self, folder: Path, model: Any, adapter: Any, config: Any, mark: Any, beside: Any
    ) -> None:
        """Writes a task's folder."""

    def read(
        self, files: StoredFiles, task: Any, layers: Any, config: Any, width: int, beside: Any
    ) -> Any:
        """Reads the adapter of a task."""

    def parts(
        self, adapter: Any, layers: Any, config: Any, width: int, source: str
    ) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
        """Returns the tensors of an adapter, and the shapes that they must have."""

    def require_same_in_peft(
        self,
        files: StoredFiles,
        name: str,
        adapter: Any,
        model: Any,
        config: Any,
        beside: Any,
        sealed: bool,
    ) -> None:
        """Raises ValueError if PEFT would compute something else with these files."""


@dataclass(frozen=True)
class Expected:
    """What a method expects of the tasks in a folder.

    Attributes:
        config: the folder's config.
        kind: the file format of the adapters.
        patched: paths of the layers that are, or would be, patched.
        layers: paths of the layers that identify the base model.
        router: shapes of the router's state_dict, without its keys.
    """

    config: Any
    kind: AdapterFiles
    patched: Sequence[str]
    layers: Sequence[str]
    router: Mapping[str, tuple[int, ...]]

    def features(self, model: Any) -> dict[str, tuple[int, int]]:
        """Returns (in_features, out_features) of each of `layers`."""
        return {path: layer_features(model.get_submodule(path)) for path in self.layers}


@dataclass
class StoredTasks:
    """The content of a checkpoint, not yet loaded into a model.

    Attributes:
        source: the folder, for messages.
        config: the method's config.
        names: names of the K tasks, in learning order.
        adapters: for each task, {layer path: (A, B, scaling)}, or its prompt [P, D].
        keys: [K, D].
        router: the rest of the router's state_dict.
        targets: as `SaptHandle.targets`.
        trained: tensors of the base model, as `TaskHandle.trained_tensors`.
        modules: each task's copies of `config.modules_to_save`, with `config.modules_per_task`.
        state: further tensors of the method, as `TaskHandle.state`.
        files: names of the files of the router, the keys and the targets, for messages.
    """

    source: str
    config: Any
    names: list[str]
    adapters: Sequence[Any]
    keys: Tensor
    router: dict[str, Tensor]
    targets: dict[str, Tensor]
    trained: dict[str, Tensor] = field(default_factory=dict)
    modules: Sequence[dict[str, Tensor]] = ()
    state: Mapping[str, Tensor] = field(default_factory=dict)
    files: Mapping[str, str] = field(
        default_factory=lambda: dict.fromkeys(("router", "keys", "targets"), ROUTER_FILE)
    )

    def file(self, part: str) -> str:
        """Returns the path of the file that contains "router", "keys" or "targets"."""
        return os.path.join(self.source, self.files[part])


def read_files(folder: Path) -> tuple[dict[str, Any], StoredFiles]:
    """Reads sapt_config.json and the files that it names into memory."""
    files = StoredFiles(folder)
    files.take(CONFIG_FILE)
    description = check_description(files.json(CONFIG_FILE), folder / CONFIG_FILE)
    for name in stated_files(description):
        files.take(name)
    return description, files


def read_tasks(
    model: Any, expected: Expected, description: dict[str, Any], files: StoredFiles
) -> StoredTasks:
    """Parses a saved folder, and checks it alone and against the model.

    Args:
        model: a model of the folder's base, patched or not; not changed.
        expected: what the method expects.
        description, files: the return values of `read_files`.

    Raises:
        ValueError: if a file is damaged or does not fit.
    """
    folder, source = files.folder, files.folder / CONFIG_FILE
    config, kind, layers = expected.config, expected.kind, expected.features(model)
    require_model_type(model, description["base_model"], source)
    trained, modules = _read_modules(files, len(description["tasks"]))
    require_base(model, layers, description["base_model"], source, trained)

    names = [task["name"] for task in description["tasks"]]
    beside = _beside(model, expected, trained)
    adapters = [
        kind.read(files, task, layers, config, input_width(model), beside)
        for task in description["tasks"]
    ]
    router, _ = files.tensors(ROUTER_FILE)
    targets = {n.removeprefix("targets."): t for n, t in router.items() if n.startswith("targets.")}
    router = {n: t for n, t in router.items() if not n.startswith("targets.")}
    keys = router.pop("keys", torch.empty(0))
    stored = StoredTasks(
        str(folder), config, names, adapters, keys, router, targets, trained, modules
    )
    require_fits(model, expected, stored)
    for name, adapter in zip(names, adapters, strict=True):
        kind.require_same_in_peft(
            files, name, adapter, model, config, beside, is_sealed(description)
        )
    require_sealed(description, files)
    stored.state = read_state(description, files)
    return stored


def read_state(description: dict[str, Any], files: StoredFiles) -> dict[str, Tensor]:
    """What the method and the strategy of a saved folder remember; empty if there is none."""
    if STRATEGY_FILE in files.digests:
        return files.tensors(STRATEGY_FILE)[0]
    if not is_sealed(description) and (files.folder / STRATEGY_FILE).is_file():
        return read_tensors(files.folder / STRATEGY_FILE)[0]
    return {}


def _read_modules(
    files: StoredFiles, count: int
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Reads the trained tensors of the base model, and the modules of each of `count` tasks."""
    if MODULES_FILE not in files.digests:
        return {}, [{} for _ in range(count)]
    tensors, _ = files.tensors(MODULES_FILE)
    shared = with_prefix(tensors, "shared.")
    own = [with_prefix(tensors, f"tasks.{index}.") for index in range(count)]
    if len(shared) + sum(map(len, own)) != len(tensors):
        raise ValueError(
            f"{files.folder / MODULES_FILE}: got {len(tensors)} tensors, expected "
            f"{len(shared) + sum(map(len, own))}: those of {count} tasks and the shared ones"
        )
    return shared, own


def _beside(model: Any, expected: Expected, trained: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of what a task's folder contains besides its LoRA, for PEFT."""
    if not expected.patched:  # PEFT's prompt tuning stores only the prompt
        return {}
    paths, _ = whole_modules(trained, expected.patched)
    paths += _own_paths(model, expected)
    try:
        tensors = module_tensors(model, paths)
    except AttributeError as error:
        raise ValueError(f"model: lacks a module that was saved with the tasks: {error}") from None
    return {name: tuple(t.shape) for name, t in tensors.items() if t.is_floating_point()}


def _own_paths(model: Any, expected: Expected) -> list[str]:
    """Returns the paths of the modules of which each task has a copy."""
    config = expected.config
    if not config.modules_per_task:
        return []
    return find_modules(model, config.modules_to_save or (), expected.patched)


def require_fits(model: Any, expected: Expected, stored: StoredTasks) -> None:
    """Raises ValueError unless names, shapes and values of stored tasks fit a model."""
    layers, width = expected.features(model), input_width(model)
    dtype = stored.config.adapter_dtype(input_layer(model).weight.dtype)
    for name, adapter in zip(stored.names, stored.adapters, strict=True):
        tensors, shapes = expected.kind.parts(
            adapter, layers, stored.config, width, f"{stored.source}: task {name!r}"
        )
        require_shapes(f"{stored.source}, task {name!r}", tensors, shapes)
    require_shapes(f"{stored.file('router')}, router", stored.router, expected.router)
    keys = {"keys": (len(stored.names), width)}
    require_shapes(f"{stored.file('keys')}, router", {"keys": stored.keys}, keys)
    require_targets(f"{stored.file('targets')}, targets", stored.targets, stored.names)
    _require_modules(model, expected, stored)
    for name, adapter in zip(stored.names, stored.adapters, strict=True):
        tensors, _ = expected.kind.parts(adapter, layers, stored.config, width, "")
        require_finite(
            f"{stored.source}, task {name!r}", {n: t.to(dtype) for n, t in tensors.items()}
        )
    parts = {"router": stored.router, "keys": {"keys": stored.keys}, "targets": stored.targets}
    for part, tensors in parts.items():
        cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        require_finite(f"{stored.file(part)}, {part}", cast)


def _require_modules(model: Any, expected: Expected, stored: StoredTasks) -> None:
    source = f"{stored.source}, {MODULES_FILE}"
    require_present(source, stored.trained, model)
    _require_finite_here(source, stored.trained, base_tensors(model))
    own = module_tensors(model, _own_paths(model, expected))
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    for name, tensors in zip(stored.names, stored.modules, strict=False):
        found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        if found != shapes:
            raise ValueError(
                f"{source}: task {name!r}: got modules of shapes {found}, expected {shapes}"
            )
        _require_finite_here(f"{source}, task {name!r}", tensors, own)


def _require_finite_here(
    source: str, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> None:
    """Raises ValueError if a value is not finite in the dtype of the model's tensor."""
    require_finite(source, {name: tensor.to(own[name].dtype) for name, tensor in tensors.items()})


def require_same_config(config: Any, values: Any, source: str | os.PathLike[str]) -> None:
    """Raises ValueError unless a model's config equals that of a folder."""
    own = json.loads(json.dumps(config.to_dict(), default=sorted))
    try:
        new = json.loads(json.dumps(type(config).from_dict(values).to_dict(), default=sorted))
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: config: {error}") from error
    differing = sorted(name for name in own if own[name] != new[name])
    if differing:
        raise ValueError(
            f"model: patched with another config than {source}: "
            + ", ".join(f"{n}: got {own[n]!r}, expected {new[n]!r}" for n in differing)
            + "; call sapt_fast.unpatch(model) first"
        )


def require_targets(source: str, targets: Mapping[str, Tensor], names: list[str]) -> None:
    """Raises ValueError unless each target is of one of these tasks, floats [1 + index]."""
    for name, target in targets.items():
        if name not in names:
            raise ValueError(f"{source}: got one for {name!r}, expected tasks among {names}")
        shape = (names.index(name) + 1,)
        if tuple(target.shape) != shape or not target.is_floating_point():
            raise ValueError(
                f"{source}: {name!r}: got {target.dtype} of shape {tuple(target.shape)}, expected "
                f"floats of shape {shape}"
            )
