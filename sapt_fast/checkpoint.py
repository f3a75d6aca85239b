"""Saving and loading a patched model's tasks: one PEFT adapter each, the router, the settings.

In a saved directory, `<task>/` is a folder that PEFT loads by itself, router.safetensors holds the
query projection, keys [K, D] and targets.<task> [k], and sapt_config.json the SaptConfig, the tasks
in learning order and what tells the base model from others.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sapt_fast import __version__
from sapt_fast._base_model import describe_base, require_base, require_model_type
from sapt_fast._files import replace_directory, whole_directory
from sapt_fast.handle import Adapter, SaptHandle
from sapt_fast.merging import static_weights
from sapt_fast.methods.sapt import SaptConfig, SaptRouter
from sapt_fast.patching import find_layers, layer_features, patch, require_pretrained, unpatch
from sapt_fast.peft_format import (
    LORA_FILES,
    read_lora,
    read_metadata,
    read_tensors,
    require_shapes,
    write_lora,
    write_tensors,
)
from sapt_fast.prompt_format import outer_layers, read_prompt, write_prompt
from sapt_fast.prompts.patching import PromptHandle
from sapt_fast.prompts.routing import prompt_place
from sapt_fast.sharding import is_sharded, whole

FORMAT_VERSION = 1

_CONFIG_FILE = "sapt_config.json"
_ROUTER_FILE = "router.safetensors"
_FIELDS = {"format_version", "sapt_fast_version", "config", "tasks", "base_model"}
_EXPORT_MARK = {"sapt_fast": "export_adapter"}


@dataclass
class StoredTasks:
    """What a checkpoint holds, read and not yet in a model.

    Attributes:
        source: where it was read, for messages.
        names: of the K tasks, in learning order.
        adapters: of each task, by the path of each layer; or its prompt [P, D].
        keys: [K, D].
        router: the rest of the router's state_dict.
        targets: as `SaptHandle.targets`.
    """

    source: str
    config: SaptConfig
    names: list[str]
    adapters: Sequence[dict[str, Adapter] | Tensor]
    keys: Tensor
    router: dict[str, Tensor]
    targets: dict[str, Tensor]


def save_pretrained(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    is_main_process: bool | None = None,
) -> None:
    """Saves the tasks, the router and the settings of a patched model.

    The folder is replaced as a whole: a kill at any point leaves the old or the new one, which
    `load_pretrained` finds (see `sapt_fast._files.replace_directory`).

    Args:
        model: patched, with at least one task.
        directory: what an earlier call wrote there is replaced, other files stay.
        is_main_process: whether this process writes; only one may at a time. None: if it calls,
            but of a sharded model, for which all processes must call, rank 0 alone.

    Raises:
        ValueError: the model is not patched, has no task, or its targets do not fit its tasks; the
            directory cannot be replaced, or holds a sapt_config.json that is damaged.
        FileExistsError: a file that this function has not written is in the way.
        RuntimeError: a mixture is merged into the base weights, by which the base model is known
            again.
        OSError: it cannot be written; it is then as it was.
    """
    handle = _patched(model)
    handle.routing.require_unmerged()
    _require_targets("targets", handle.targets, handle.tasks)
    state = handle.router.state_dict(keep_vars=True)  # whole() asks whose they are
    router = {n: whole(t) for n, t in state.items() if not n.startswith("keys.")}
    router["keys"] = handle.router.keys.rows()
    for name, target in handle.targets.items():
        router[f"targets.{name}"] = target.float()
    adapters = _adapters(handle)
    text = json.dumps(_description(model, handle), indent=2, default=sorted)
    if not _writes(model, is_main_process):
        return
    with replace_directory(directory, _written) as folder:
        write = write_prompt if isinstance(handle, PromptHandle) else write_lora
        for name, adapter in zip(handle.tasks, adapters, strict=True):
            write(folder / name, model, adapter)
        write_tensors(folder / _ROUTER_FILE, router)
        (folder / _CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def load_pretrained(model: PreTrainedModel, directory: str | os.PathLike[str]) -> PreTrainedModel:
    """Puts what `save_pretrained` saved into a model of the same base.

    The last task is then the trainable one, as after training it. Weights take the device
    of the model and the dtype that the stored config asks for on it. Everything is read and checked
    before the model changes.

    Args:
        model: not patched (it gets the stored config), or patched with the stored config and
            still without tasks.
        directory: written by `save_pretrained`.

    Returns:
        model.

    Raises:
        TypeError: model is not a PreTrainedModel.
        FileNotFoundError: a file is missing.
        ValueError: the model has tasks or another config, is another base model, or a file is
            damaged or does not fit the others.

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
    handle = _without_tasks(model)
    folder = whole_directory(directory, _CONFIG_FILE)
    source = folder / _CONFIG_FILE
    description = _read_description(source)
    require_model_type(model, description["base_model"], source)
    try:
        config = SaptConfig.from_dict(description["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: config: {error}") from error
    layers = _layers(model, handle, config, source)
    require_base(model, layers, description["base_model"], source)

    names = [task["name"] for task in description["tasks"]]
    adapters: list[dict[str, Adapter] | Tensor] = []
    for task in description["tasks"]:
        if config.adapter == "prompt":
            adapters.append(read_prompt(folder / task["name"], config.prompt_length, _width(model)))
            continue
        where = f"{source}: task {task['name']!r}"
        ranks = _per_layer(task["rank"], layers, _is_rank, f"{where}: rank")
        scaling = _per_layer(task["scaling"], layers, _is_finite, f"{where}: scaling")
        shapes = {path: (ranks[path], *layers[path]) for path in layers}
        weights = read_lora(folder / task["name"], shapes)
        adapters.append({path: (*weights[path], float(scaling[path])) for path in layers})
    router = read_tensors(folder / _ROUTER_FILE)
    targets = {n.removeprefix("targets."): t for n, t in router.items() if n.startswith("targets.")}
    router = {n: t for n, t in router.items() if not n.startswith("targets.")}
    keys = router.pop("keys", torch.empty(0))
    return install(model, StoredTasks(str(folder), config, names, adapters, keys, router, targets))


def export_adapter(
    model: PreTrainedModel,
    weights: Tensor | Sequence[float],
    directory: str | os.PathLike[str],
    *,
    is_main_process: bool | None = None,
) -> None:
    """Saves the static mixture `weights` as one ordinary PEFT LoRA, for anything that loads LoRA.

    Its rank is the total rank R of all tasks; A is stacked, the columns of B carry weight times
    scaling, and the adapter's own scaling is 1. Of prompts, the mixture is one for PEFT's prompt
    tuning. The folder is replaced as a whole.

    Args:
        model: patched, with K tasks.
        weights: [K], finite; in learning order.
        directory: what an earlier call wrote there is replaced, other files stay.
        is_main_process: as in `save_pretrained`.

    Raises:
        ValueError: the model is not patched, has no task, or the weights do not fit; the directory
            cannot be replaced.
        FileExistsError: a file that this function has not written is in the way, another adapter.
        OSError: it cannot be written; it is then as it was.
    """
    handle = _patched(model)
    weights = static_weights(weights, handle.tasks)
    if isinstance(handle, PromptHandle):
        prompts = torch.stack([handle.prompts.prompt(k) for k in range(len(weights))]).to("cpu")
        mixed = torch.einsum("k,kpd->pd", weights.double(), prompts.double()).to(prompts.dtype)
        if not _writes(model, is_main_process):
            return
        with replace_directory(directory, _exported) as folder:
            write_prompt(folder, model, mixed, _EXPORT_MARK)
        return
    adapters = {}
    for path, pool in handle.pools.items():
        a, b = pool.scaled(weights)
        adapters[path] = (a, b, 1.0)
    if not _writes(model, is_main_process):
        return
    with replace_directory(directory, _exported) as folder:
        write_lora(folder, model, adapters, _EXPORT_MARK)


def install(model: Any, stored: StoredTasks) -> PreTrainedModel:
    """Checks the names and shapes of stored tasks against a model and puts them in.

    Args:
        model: not patched, or patched with the stored config and without tasks.

    Returns:
        model, patched.

    Raises:
        TypeError, ValueError: as `load_pretrained`; the model is then unchanged.
    """
    handle = _without_tasks(model)
    layers = _layers(model, handle, stored.config, stored.source)
    for name, adapters in zip(stored.names, stored.adapters, strict=True):
        tensors: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        if isinstance(adapters, Tensor):
            shapes = {"prompt": (stored.config.prompt_length, _width(model))}
            require_shapes(f"{stored.source}, task {name!r}", {"prompt": adapters}, shapes)
            continue
        if odd := sorted(set(adapters) ^ set(layers)):
            raise ValueError(
                f"{stored.source}: task {name!r} has adapters for other layers than those that "
                f"the config chooses: {odd[0]} and {len(odd) - 1} more are in one but not in both"
            )
        for path, (inputs, outputs) in layers.items():
            a, b, _ = adapters[path]
            tensors |= {f"{path} A": a, f"{path} B": b}
            shapes |= {f"{path} A": (len(a), inputs), f"{path} B": (len(a), outputs)}
        require_shapes(f"{stored.source}, task {name!r}", tensors, shapes)
    width = _width(model)
    empty = SaptRouter(width, stored.config, device=torch.device("meta"))
    expected = (handle.router if handle else empty).state_dict()
    shapes = {n: tuple(t.shape) for n, t in expected.items() if not n.startswith("keys.")}
    shapes |= {"keys": (len(stored.names), width)}
    require_shapes(f"{stored.source}, router", {**stored.router, "keys": stored.keys}, shapes)
    _require_targets(f"{stored.source}, targets", stored.targets, stored.names)

    if handle is None:
        patch(model, stored.config)
    try:
        with torch.no_grad():
            _fill(model.sapt, stored)
    except BaseException:
        if handle is None:
            unpatch(model)
        raise
    return model


def _fill(handle: SaptHandle, stored: StoredTasks) -> None:
    for name, adapters, key in zip(stored.names, stored.adapters, stored.keys, strict=True):
        handle.restore_task(name, adapters, key)
    handle.router.load_state_dict(stored.router, strict=False)
    handle.targets.update({name: target.clone() for name, target in stored.targets.items()})


def _patched(model: PreTrainedModel) -> SaptHandle:
    handle = getattr(model, "sapt", None)
    if not isinstance(handle, SaptHandle):
        raise ValueError("model: not patched by sapt_fast.patch")
    if not handle.tasks:
        raise ValueError("model: there is no task yet; call model.sapt.add_task(name) first")
    return handle


def _without_tasks(model: Any) -> SaptHandle | None:
    require_pretrained(model)
    handle = getattr(model, "sapt", None)
    if not isinstance(handle, SaptHandle):
        return None
    if handle.tasks:
        raise ValueError(
            f"model: already has the tasks {handle.tasks}; call sapt_fast.unpatch(model) first"
        )
    return handle


def _stacks(handle: SaptHandle) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of all tasks, by layer; gathers what is sharded."""
    return {path: (pool.a.rows(), pool.b.rows()) for path, pool in handle.pools.items()}


def _writes(model: PreTrainedModel, is_main_process: bool | None) -> bool:
    if is_main_process is None:
        return not is_sharded(model) or torch.distributed.get_rank() == 0
    return is_main_process


def _adapters(handle: SaptHandle) -> list[Any]:
    """What each task's adapter is written from; gathers what is sharded."""
    if isinstance(handle, PromptHandle):
        return [handle.prompts.prompt(index) for index in range(len(handle.tasks))]
    stacks, pools = _stacks(handle), handle.pools
    adapters = []
    for index in range(len(handle.tasks)):
        own = {}
        for path, (a, b) in stacks.items():
            start = sum(pools[path].ranks[:index])
            rows = slice(start, start + pools[path].ranks[index])
            own[path] = a[rows], b[rows], pools[path].scaling[index]
        adapters.append(own)
    return adapters


def _layers(
    model: PreTrainedModel,
    handle: SaptHandle | None,
    config: SaptConfig,
    source: str | os.PathLike[str],
) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of each layer that is patched, or would be with this config.

    With prompts none is; then of the layers that tell one base model from another.
    """
    if handle is not None:
        own, new = _jsonable(handle.config), _jsonable(config)
        differing = sorted(name for name in own if own[name] != new[name])
        if differing:
            raise ValueError(
                f"model: patched with another config than {source}, they differ in "
                + ", ".join(f"{n} ({own[n]!r} here, {new[n]!r} there)" for n in differing)
                + "; call sapt_fast.unpatch(model) first"
            )
    if config.adapter == "prompt":
        prompt_place(model)
        paths = outer_layers(model)
    else:
        report = find_layers(model, config) if handle is None else handle.report
        paths = report.patched
    return {path: layer_features(model.get_submodule(path)) for path in paths}


def _width(model: Any) -> int:
    """D, of the input embeddings."""
    return model.get_input_embeddings().weight.shape[1]


def _jsonable(config: SaptConfig) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_dict(), default=sorted))


def _require_targets(source: str, targets: Mapping[str, Tensor], names: list[str]) -> None:
    for name, target in targets.items():
        if name not in names:
            raise ValueError(f"{source}: got one for {name!r}, expected tasks among {names}")
        shape = (names.index(name) + 1,)
        if tuple(target.shape) != shape or not target.is_floating_point():
            raise ValueError(
                f"{source}: {name!r} has {target.dtype} of shape {tuple(target.shape)}, expected "
                f"floats of shape {shape}"
            )


# --- sapt_config.json ---


def _description(model: PreTrainedModel, handle: SaptHandle) -> dict[str, Any]:
    tasks: list[dict[str, Any]] = []
    for index, name in enumerate(handle.tasks):
        if isinstance(handle, PromptHandle):
            tasks.append({"name": name})
            continue
        ranks = {path: pool.ranks[index] for path, pool in handle.pools.items()}
        scaling = {path: pool.scaling[index] for path, pool in handle.pools.items()}
        tasks.append({"name": name, "rank": _uniform(ranks), "scaling": _uniform(scaling)})
    layers = _layers(model, handle, handle.config, "")
    return {
        "format_version": FORMAT_VERSION,
        "sapt_fast_version": __version__,
        "config": handle.config.to_dict(),
        "tasks": tasks,
        "base_model": describe_base(model, layers),
    }


def _uniform(values: dict[str, Any]) -> Any:
    return next(iter(values.values())) if len(set(values.values())) == 1 else values


def _per_layer(
    value: Any, layers: Mapping[str, Any], valid: Callable[[Any], bool], source: str
) -> dict[str, Any]:
    values = value if isinstance(value, dict) else dict.fromkeys(layers, value)
    if set(values) != set(layers) or not all(valid(number) for number in values.values()):
        raise ValueError(
            f"{source}: got {value!r}, expected a number or one for each of {sorted(layers)}"
        )
    return values


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: truncated or no JSON ({error})") from error
    version = description.get("format_version") if isinstance(description, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version is {version!r}, expected {FORMAT_VERSION}")
    if set(description) != _FIELDS:
        raise ValueError(f"{path}: fields {sorted(description)}, expected {sorted(_FIELDS)}")
    tasks = description["tasks"]
    config = description["config"]
    prompts = isinstance(config, dict) and config.get("adapter") == "prompt"
    fields = {"name"} if prompts else {"name", "rank", "scaling"}
    if not isinstance(tasks, list) or any(
        not isinstance(t, dict) or set(t) != fields or not isinstance(t["name"], str) for t in tasks
    ):
        raise ValueError(f"{path}: tasks: expected a list of objects with {sorted(fields)}")
    names = [task["name"] for task in tasks]
    for name in names:
        folder = os.path.basename(name) == name and name not in ("", ".", "..")
        if not folder or names.count(name) > 1:
            raise ValueError(
                f"{path}: tasks: {name!r} is no folder name or stands twice in {names}"
            )
    if not names:
        raise ValueError(f"{path}: tasks: got none")
    return description


# --- which files are ours ---


def _written(folder: Path) -> list[str]:
    """The files of this folder that `save_pretrained` wrote."""
    if not (folder / _CONFIG_FILE).is_file():
        return []
    names = [task["name"] for task in _read_description(folder / _CONFIG_FILE)["tasks"]]
    return [
        _CONFIG_FILE,
        _ROUTER_FILE,
        *(f"{name}/{file}" for name in names for file in LORA_FILES),
    ]


def _exported(folder: Path) -> list[str]:
    """The files of this folder that `export_adapter` wrote."""
    metadata = read_metadata(folder / LORA_FILES[1])
    return list(LORA_FILES) if metadata.items() >= _EXPORT_MARK.items() else []
