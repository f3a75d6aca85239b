"""PEFT's LoRA file format: adapter_config.json and adapter_model.safetensors in one folder."""

import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sapt_fast.pools.lora import Adapter, is_scaling
from sapt_fast.pools.own import is_inside, own_paths
from sapt_fast.sites.modules import outermost
from sapt_fast.storage.adapter_config import require_lora_config
from sapt_fast.storage.tensors import StoredFiles, read_tensors, write_tensors

LORA_FILES = ("adapter_config.json", "adapter_model.safetensors")
_CONFIG_FILE, _WEIGHTS_FILE = LORA_FILES
_PREFIX = "base_model.model."
_TASK_MARK = "sapt_fast_task"
_MOST_RANK = 2**31


def write_lora(
    folder: Path,
    model: PreTrainedModel,
    adapters: Mapping[str, Adapter],
    dropout: float,
    metadata: Mapping[str, str] | None = None,
    modules: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a folder that `PeftModel.from_pretrained(base, folder)` loads.

    Args:
        folder: the folder, which is created if it is missing.
        model: the patched model; adapter_config.json names its layers and kind.
        adapters: by the path of each layer, (A [r, in_features], B [r, out_features], scaling);
            layers of rank 0 are left out.
        dropout: dropout rate on the adapters' input in training.
        metadata: metadata for the header of the weights' file.
        modules: tensors of modules that are saved with the adapter, by their names in the base
            model: all tensors of PEFT's `modules_to_save`.

    Raises:
        ValueError: if no layer has a rank above 0, which PEFT does not support.
    """
    adapters = {path: adapter for path, adapter in adapters.items() if adapter[0].shape[0]}
    if not adapters:
        raise ValueError(
            f"{folder.name}: cannot be saved, because the adapter has rank 0 in every layer, which "
            "PEFT does not support"
        )
    folder.mkdir(exist_ok=True)
    modules = modules or {}
    config = _lora_config(model, adapters, dropout, owners(modules)).to_dict()
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted)
    (folder / _CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    tensors = {}
    for path, (a, b, _) in adapters.items():
        tensors[_key(path, "A")] = a
        tensors[_key(path, "B")] = b.t()
    tensors |= {f"{_PREFIX}{name}": tensor for name, tensor in modules.items()}
    write_tensors(folder / _WEIGHTS_FILE, tensors, metadata)


def read_lora(
    files: StoredFiles,
    task: str,
    shapes: Mapping[str, tuple[int, int, int]],
    modules: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Reads a task's LoRA, as `write_lora` wrote it.

    Args:
        files: contains the two files of the task.
        task: the task's name, which is also that of its folder.
        shapes: by the path of each layer, the expected (r, in_features, out_features).
        modules: the shapes of the tensors that `write_lora` got as `modules`.

    Returns:
        By the path of each layer, (A [r, in_features], B [r, out_features]).

    Raises:
        ValueError: if the file is damaged, or contains another task.
        ValueError: if its entries, shapes or values are not the expected ones.
    """
    tensors = read_task_tensors(files, task)
    expected: dict[str, tuple[int, ...]] = {}
    expected |= {f"{_PREFIX}{name}": shape for name, shape in (modules or {}).items()}
    for path, (rank, inputs, outputs) in shapes.items():
        if rank:
            expected[_key(path, "A")] = (rank, inputs)
            expected[_key(path, "B")] = (outputs, rank)
    require_shapes(files.folder / task / _WEIGHTS_FILE, tensors, expected)
    adapters = {}
    for path, (rank, inputs, outputs) in shapes.items():
        if rank:
            adapters[path] = (tensors[_key(path, "A")], tensors[_key(path, "B")].t())
        else:
            adapters[path] = (torch.empty(0, inputs), torch.empty(0, outputs))
    return adapters


def task_mark(task: str) -> dict[str, str]:
    """Returns metadata that identifies the weights of one task."""
    return {_TASK_MARK: json.dumps(task)}


def read_task_tensors(files: StoredFiles, task: str) -> dict[str, Tensor]:
    """Reads the tensors of a task.

    Raises:
        ValueError: if they are damaged, not finite, or those of another task.
    """
    name = f"{task}/{_WEIGHTS_FILE}"
    tensors, metadata = files.tensors(name)
    mark = metadata.get(_TASK_MARK, json.dumps(task))  # earlier versions wrote none
    if mark != json.dumps(task):
        raise ValueError(
            f"{files.folder / name}: got the weights of task {mark}, expected those of {task!r}: "
            "the folders of two tasks were exchanged or renamed"
        )
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the header's metadata of a safetensors file; empty for any other file."""
    try:
        return read_tensors(path)[1]
    except (OSError, ValueError):
        return {}


def require_shapes(
    source: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """Raises ValueError unless tensors has exactly these names, as floats of these shapes."""
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unknown:
        raise ValueError(
            f"{source}: {_some(missing)} missing, {_some(unknown)} not expected: it is of another "
            "model, configuration or task"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != tuple(shape) or not tensors[name].is_floating_point():
            raise ValueError(
                f"{source}: {name}: got {tensors[name].dtype} of shape "
                f"{tuple(tensors[name].shape)}, expected floats of shape {tuple(shape)}"
            )


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _key(path: str, side: str) -> str:
    return f"{_PREFIX}{path}.lora_{side}.weight"


def owners(modules: Iterable[str]) -> list[str] | None:
    """Returns the paths of the modules with these tensors, for adapter_config.json."""
    return sorted(outermost(name.rpartition(".")[0] for name in modules)) or None


def _lora_config(
    model: Any, adapters: Mapping[str, Adapter], dropout: float, modules_to_save: list[str] | None
) -> Any:
    from peft import LoraConfig

    ranks = {path: a.shape[0] for path, (a, _, _) in adapters.items()}
    alphas = {path: scaling * ranks[path] for path, (_, _, scaling) in adapters.items()}
    rank: Any = Counter(ranks.values()).most_common(1)[0][0]
    alpha: Any = Counter(alphas.values()).most_common(1)[0][0]
    task_type, auto_mapping = None, None
    if model.can_generate():
        task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    else:
        kind = type(model)
        auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return LoraConfig(
        r=rank,
        lora_alpha=_tidy(alpha),
        # Anchored, because PEFT matches a pattern with the end of a path.
        rank_pattern={f"^{path}": r for path, r in ranks.items() if r != rank},
        alpha_pattern={f"^{path}": _tidy(x) for path, x in alphas.items() if x != alpha},
        target_modules=_target_modules(model, set(adapters)),
        lora_dropout=dropout,
        fan_in_fan_out=any(isinstance(model.get_submodule(path), Conv1D) for path in adapters),
        bias="none",
        modules_to_save=modules_to_save,
        task_type=task_type,
        auto_mapping=auto_mapping,
        base_model_name_or_path=model.name_or_path or None,
        inference_mode=True,
    )


def _target_modules(model: PreTrainedModel, paths: set[str]) -> list[str]:
    """Returns short names, which servers expect, if they select only these layers; else paths."""
    short = {path.rpartition(".")[2] for path in paths}
    named = {name for name in base_modules(model) if name.rpartition(".")[2] in short}
    return sorted(short if named == paths else paths)


def _tidy(alpha: float) -> Any:
    return int(alpha) if alpha == int(alpha) else alpha


def base_modules(model: PreTrainedModel) -> list[str]:
    """Returns the paths of the base model's own modules."""
    own = own_paths(model)
    return [name for name, _ in model.named_modules() if not is_inside(name, own)]


class LoraFiles:
    """The file format of tasks with LoRA adapters.

    An adapter is, by the path of each layer, (A [r, in_features], B [r, out_features], scaling).
    """

    fields = frozenset({"rank", "scaling"})

    def described(self, adapter: Mapping[str, Adapter]) -> dict[str, Any]:
        """Returns the fields of a task in sapt_config.json: rank and scaling."""
        ranks = {path: len(a) for path, (a, _, _) in adapter.items()}
        scaling = {path: scaling for path, (_, _, scaling) in adapter.items()}
        return {"rank": _uniform(ranks), "scaling": _uniform(scaling)}

    def write(
        self,
        folder: Path,
        model: Any,
        adapter: Mapping[str, Adapter],
        config: Any,
        mark: Mapping[str, str],
        beside: Mapping[str, Tensor],
    ) -> None:
        """Writes a task's folder; `mark` and `beside` as in `write_lora`."""
        write_lora(folder, model, adapter, config.lora_dropout, mark, beside)

    def read(
        self,
        files: StoredFiles,
        task: Mapping[str, Any],
        layers: Mapping[str, tuple[int, int]],
        config: Any,
        width: int,
        beside: Mapping[str, tuple[int, ...]],
    ) -> dict[str, Adapter]:
        """Reads the adapter of a task, as sapt_config.json describes it."""
        where = f"{files.folder}: task {task['name']!r}"
        ranks = per_layer(task, "rank", layers, where)
        scaling = per_layer(task, "scaling", layers, where)
        shapes = {path: (ranks[path], *layers[path]) for path in layers}
        weights = read_lora(files, task["name"], shapes, beside)
        return {path: (*weights[path], float(scaling[path])) for path in layers}

    def parts(
        self,
        adapter: Mapping[str, Adapter],
        layers: Mapping[str, tuple[int, int]],
        config: Any,
        width: int,
        source: str,
    ) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
        """Returns the tensors of an adapter by name, and the shapes that they must have.

        Raises:
            ValueError: if the adapter is for other layers.
        """
        if odd := sorted(set(adapter) ^ set(layers)):
            raise ValueError(
                f"{source}: got adapters for other layers than the config selects: {odd[0]} and "
                f"{len(odd) - 1} more are only in one of them"
            )
        tensors: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path, (inputs, outputs) in layers.items():
            a, b, _ = adapter[path]
            tensors |= {f"{path} A": a, f"{path} B": b}
            shapes |= {f"{path} A": (len(a), inputs), f"{path} B": (len(a), outputs)}
        return tensors, shapes

    def require_same_in_peft(
        self,
        files: StoredFiles,
        name: str,
        adapter: Mapping[str, Adapter],
        model: Any,
        config: Any,
        beside: Collection[str],
        sealed: bool,
    ) -> None:
        """Raises ValueError if PEFT would compute something else from a task's folder."""
        present = {path: (len(a), scaling) for path, (a, _, scaling) in adapter.items() if len(a)}
        require_lora_config(
            files.folder / name / _CONFIG_FILE,
            files.json(f"{name}/{_CONFIG_FILE}"),
            present,
            base_modules(model),
            transposed=any(isinstance(model.get_submodule(path), Conv1D) for path in present),
            dropout=config.lora_dropout,
            expected={"modules_to_save": owners(beside)},
            sealed=sealed,
        )


def per_layer(task: Mapping[str, Any], field: str, layers: Collection[str], source: str) -> Any:
    """Returns the rank or scaling of each layer.

    Args:
        task: the task's entry in sapt_config.json.
        field: "rank" or "scaling".
        layers: paths of the layers.
        source: for messages.

    Raises:
        ValueError: if the value is missing for a layer, or out of range.
    """
    value = task[field]
    valid = _is_rank if field == "rank" else is_scaling
    values = value if isinstance(value, dict) else dict.fromkeys(layers, value)
    wrong = [number for number in values.values() if not valid(number)]
    if set(values) != set(layers) or wrong:
        shown = str(wrong[0] if wrong else value)
        shown = shown if len(shown) <= 60 else f"{shown[:50]}..."
        raise ValueError(
            f"{source}: {field}: got {shown}, expected a number or one for each of {sorted(layers)}"
        )
    return values


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_RANK


def _uniform(values: dict[str, Any]) -> Any:
    return next(iter(values.values())) if len(set(values.values())) == 1 else values
