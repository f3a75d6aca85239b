"""Reads checkpoints of the original SAPT code (github.com/circle-hit/SAPT) without unpickling.

After each task, the original code writes a folder `<output>/<i>-<task>/saved_weights` with five
files:

- trans_input.pt: the query projection;
- lora_weights_A.pt and lora_weights_B.pt: the task's own LoRA, and the earlier ones as
  previous_lora_weights;
- prompts_keys_till_now.pt: the keys;
- attention_weights.pkl: the mean attention.

The original code counts from the newest task; here everything is converted to learning order.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sapt_fast.files.names import require_folder_name
from sapt_fast.loading import install
from sapt_fast.methods.sapt import SaptConfig, SaptHandle
from sapt_fast.patching import require_pretrained
from sapt_fast.pools.lora import Adapter
from sapt_fast.storage.released_files import Refused, read_array, read_torch
from sapt_fast.storage.tasks import StoredTasks
from sapt_fast.storage.tensors import require_finite

_FILES = ("trans_input", "lora_weights_A", "lora_weights_B", "prompts_keys_till_now")
_ATTENTION_FILE = "attention_weights.pkl"
_PROJECTION = {
    "0.weight": "down.weight",
    "1.weight": "up.weight",
    "3.weight": "norm.weight",
    "3.bias": "norm.bias",
}
_ENTRY = re.compile(
    r"(?P<parent>.+)\.(lora|previous_lora_weights)_(?P<letter>[a-z]+)"
    r"(\.(?P<previous>[0-9]{1,6}))?\.lora_(?P<side>[AB])"
)


@dataclass
class _Released:
    """One saved_weights folder, newest task first.

    Attributes:
        folder: its path.
        adapters: by (path of the attention, projection letter), one (A [r, I], B [O, r]) per task.
        projection: the query projection, by our router's names.
        keys: [K, D].
        attention: [K].
    """

    folder: Path
    adapters: dict[tuple[str, str], list[tuple[Tensor, Tensor]]]
    projection: dict[str, Tensor]
    keys: Tensor
    attention: Tensor


def load_official(
    model: PreTrainedModel,
    directories: Sequence[str | os.PathLike[str]],
    config: SaptConfig | None = None,
) -> PreTrainedModel:
    """Loads the tasks of a run of the original SAPT code into its base model.

    Adapters, keys and projection come from the last folder. The earlier folders must agree with
    it, and provide attention targets. A task has the name of its folder's parent, without the
    leading number. Nothing in the files is executed. All is checked before the model changes.

    Args:
        model: T5 or LLaMA; not patched, or patched and without tasks.
        directories: each task's saved_weights folder, in learning order.
        config: defaults to the config of a patched model, else to the settings of the original
            code, with the rank and the projection's width from the files.

    Returns:
        model, patched; `model.sapt.targets` contains each task's attention.

    Raises:
        TypeError: if model is not a PreTrainedModel, or directories is one path.
        FileNotFoundError: if a folder or file is missing.
        ValueError: if a file is damaged, or contains anything other than tensors.
        ValueError: if the files do not fit each other, the config or the model.

    Example:
        >>> import json, pathlib, sapt_fast, transformers
        >>> run = pathlib.Path("tests/data/oracle/t5")  # a run recorded with the original code
        >>> config = transformers.T5Config(**json.loads((run / "run.json").read_text())["config"])
        >>> model = transformers.T5ForConditionalGeneration(config)
        >>> folders = [run / f"task{number}" / "saved_weights" for number in range(3)]
        >>> sapt_fast.load_official(model, folders).sapt.tasks
        ['task0', 'task1', 'task2']
        >>> model.sapt.targets["task1"]  # mean attention when it was learned, in learning order
        tensor([0.5232, 0.4768])
    """
    require_pretrained(model)
    if isinstance(directories, (str, os.PathLike)):
        raise TypeError(f"directories: got {directories!r}, expected a list with a folder per task")
    folders = [Path(directory) for directory in directories]
    names = _task_names(folders)
    released = [_read(folder, index + 1) for index, folder in enumerate(folders)]
    last = released[-1]
    for earlier in released[:-1]:
        _require_tail(last, earlier)

    rank = next(iter(last.adapters.values()))[0][0].shape[0]
    if config is None:
        config = _default_config(model, rank, last.projection["down.weight"].shape[0])
    if config.adapter != "lora":
        raise ValueError(
            f"config: got adapter={config.adapter!r}, expected 'lora', as in all runs of the "
            "original SAPT code"
        )
    if config.r != rank:
        raise ValueError(
            f"config: got r={config.r}, expected {rank}, the rank of the adapters in {last.folder}"
        )
    adapters = _by_task(model, last, config, len(folders))
    targets = {
        name: checkpoint.attention.flip(0) for name, checkpoint in zip(names, released, strict=True)
    }
    stored = StoredTasks(
        str(last.folder),
        config,
        names,
        adapters,
        last.keys.flip(0),
        last.projection,
        targets,
        files={
            "router": "trans_input.pt",
            "keys": "prompts_keys_till_now.pt",
            "targets": _ATTENTION_FILE,
        },
    )
    return install(model, stored)


def _by_task(
    model: PreTrainedModel, last: _Released, config: SaptConfig, count: int
) -> list[dict[str, Adapter]]:
    """Returns the adapters of each task, oldest first, by the path of each layer."""
    layers = {part: _layer_path(model, *part) for part in last.adapters}
    adapters: list[dict[str, Adapter]] = [{} for _ in range(count)]
    for part, newest_first in last.adapters.items():
        for age, (a, b) in enumerate(newest_first):
            scaling = config.lora_alpha / a.shape[0]
            adapters[count - 1 - age][layers[part]] = (a, b.t(), scaling)
    return adapters


def _task_names(folders: Sequence[Path]) -> list[str]:
    if not folders:
        raise ValueError("directories: got none, expected a saved_weights folder per task")
    names = [_task_name(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"directories: got task names {names}, expected distinct ones")
    for place, name in enumerate(names):
        require_folder_name("directories: got the name", name, names[:place])
    return names


def _task_name(folder: Path) -> str:
    path = folder.resolve()
    name = path.parent.name if path.name == "saved_weights" else path.name
    return re.sub(r"^\d+-(?=.)", "", name)


def _default_config(model: PreTrainedModel, rank: int, hidden: int) -> SaptConfig:
    handle = getattr(model, "sapt", None)
    if isinstance(handle, SaptHandle):
        return handle.config
    kind = model.config.model_type
    if kind not in ("t5", "llama"):
        raise ValueError(
            f"config: got None, but the original SAPT code has no settings for model type {kind!r};"
            " pass a SaptConfig"
        )
    presets = [SaptConfig.official(kind, name) for name in ("superni", "long_sequence")]
    preset = next((preset for preset in presets if preset.r == rank), presets[0])
    return replace(preset, r=rank, query_hidden_dim=hidden)


def _layer_path(model: PreTrainedModel, parent: str, letter: str) -> str:
    paths = [f"{parent}.{letter}", f"{parent}.{letter}_proj"]
    for path in paths:
        try:
            model.get_submodule(path)
        except AttributeError:
            continue
        return path
    raise ValueError(f"model: {type(model).__name__} has no layer {paths[0]} or {paths[1]}")


def _require_tail(last: _Released, earlier: _Released) -> None:
    """Raises ValueError unless the last checkpoint contains the earlier one."""
    newer = len(last.keys) - len(earlier.keys)
    same = last.adapters.keys() == earlier.adapters.keys()
    same = same and torch.equal(last.keys[newer:], earlier.keys)
    for part, adapters in earlier.adapters.items():
        pairs = zip(last.adapters[part][newer:], adapters, strict=True) if same else ()
        same = same and all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)
    if not same:
        raise ValueError(
            f"directories: {last.folder} does not continue {earlier.folder}: its previous adapters "
            "or keys differ. Pass the folders of one run, in learning order"
        )


# --- one folder ---


def _read(folder: Path, count: int) -> _Released:
    if not folder.is_dir():
        raise FileNotFoundError(f"directories: {folder} is not a folder")
    projection, a, b, keys = (read_torch(folder / f"{name}.pt") for name in _FILES)
    keys_path = folder / "prompts_keys_till_now.pt"
    if not isinstance(keys, Tensor) or keys.dim() != 2 or len(keys) != count:
        raise ValueError(f"{keys_path}: got {_kind(keys)}, expected keys [{count}, D]")
    require_finite(keys_path, {"keys": keys})
    return _Released(
        folder,
        _adapters(folder, a, b, count),
        _projection(folder / "trans_input.pt", projection),
        keys,
        _attention(folder / _ATTENTION_FILE, count),
    )


def _projection(path: Path, entries: Any) -> dict[str, Tensor]:
    tensors = _tensors(path, entries)
    if set(tensors) != set(_PROJECTION):
        raise ValueError(f"{path}: got {sorted(tensors)}, expected {sorted(_PROJECTION)}")
    down = tensors["0.weight"]
    if down.dim() != 2 or not down.numel():
        raise ValueError(f"{path}: 0.weight: got {_kind(down)}, expected [hidden, D]")
    return {ours: tensors[name] for name, ours in _PROJECTION.items()}


def _adapters(
    folder: Path, entries_a: Any, entries_b: Any, count: int
) -> dict[tuple[str, str], list[tuple[Tensor, Tensor]]]:
    found: dict[tuple[str, str], dict[tuple[int, str], Tensor]] = {}
    for side, entries in (("A", entries_a), ("B", entries_b)):
        path = folder / f"lora_weights_{side}.pt"
        for name, tensor in _tensors(path, entries).items():
            match = _ENTRY.fullmatch(name)
            if match is None or match["side"] != side or tensor.dim() != 2:
                raise ValueError(f"{path}: {name} ({_kind(tensor)}) is not a LoRA entry of SAPT")
            age = 0 if match["previous"] is None else int(match["previous"]) + 1
            found.setdefault((match["parent"], match["letter"]), {})[age, side] = tensor
    wanted = {(age, side) for age in range(count) for side in "AB"}
    for (parent, letter), tensors in found.items():
        if set(tensors) != wanted:
            raise ValueError(
                f"{folder}: {parent}, projection {letter}: got {len(tensors)} LoRA entries, "
                f"expected A and B of {count} tasks"
            )
    if not found:
        raise ValueError(f"{folder}: got no LoRA entries, expected A and B of {count} tasks")
    rank = next(iter(found.values()))[0, "A"].shape[0]
    for (parent, letter), tensors in found.items():
        for (_, side), tensor in tensors.items():
            if tensor.shape["AB".index(side)] != rank or not tensor.numel():
                raise ValueError(
                    f"{folder / f'lora_weights_{side}.pt'}: {parent}, projection {letter}: got "
                    f"{_kind(tensor)}, expected a rank of at least 1, the same in all A and B "
                    f"(the first has {rank})"
                )
    return {
        part: [(tensors[age, "A"], tensors[age, "B"]) for age in range(count)]
        for part, tensors in found.items()
    }


def _tensors(path: Path, entries: Any) -> dict[str, Tensor]:
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise ValueError(f"{path}: got {_kind(entries)}, expected named tensors")
    for name, value in entries.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: {name[:80]}: got {_kind(value)}, expected a dense tensor of floats"
            )
    require_finite(path, entries)
    return dict(entries)


def _kind(value: Any) -> str:
    if isinstance(value, Refused):
        return value.kind
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _attention(path: Path, count: int) -> Tensor:
    array = read_array(path)
    weights = torch.from_numpy(array.reshape(-1).astype(np.float64)).float()
    if len(weights) != count or not weights.isfinite().all():
        raise ValueError(f"{path}: got {weights[:8].tolist()}, expected {count} finite weights")
    return weights
