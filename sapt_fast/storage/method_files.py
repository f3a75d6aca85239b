"""The default files of a method: `<attribute>_config.json` and `<attribute>.safetensors`.

Methods with tasks use another layout, which PEFT can read (`storage.tasks`). Several methods may be
saved in one folder: each has its own two files.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sapt_fast.files.directories import replace_directory
from sapt_fast.files.reading import read_json
from sapt_fast.pools.sharding import whole
from sapt_fast.sites.find import layer_features
from sapt_fast.storage.base_model import describe_base, require_base, require_model_type
from sapt_fast.storage.description import (
    FORMAT_VERSION,
    require_digest,
    require_fields,
    write_sealed,
    writes,
)
from sapt_fast.storage.model_card import own_card, write_card
from sapt_fast.storage.prompt import outer_layers
from sapt_fast.storage.tensors import StoredFiles, require_finite, write_tensors
from sapt_fast.version import __version__

__all__ = ["StoredMethod", "config_file", "methods_in", "read_method", "write_method"]

_SUFFIX = "_config.json"
_FIELDS = frozenset(
    {
        *("format_version", "sapt_fast_version", "method", "config", "values"),
        *("base_model", "files", "digest"),
    }
)


@dataclass(frozen=True)
class StoredMethod:
    """The content of one method's files, checked but not yet loaded into a model.

    Attributes:
        source: path of the description file, for messages.
        method: the method's name.
        config: fields of the method's config.
        values: the JSON values that `Handle.stored` returned.
        base_model: description of the base model.
        tensors: the tensors that `Handle.stored` returned, by name.
    """

    source: Path
    method: str
    config: Mapping[str, Any]
    values: Mapping[str, Any]
    base_model: Mapping[str, Any]
    tensors: dict[str, Tensor]

    def require_model(self, model: Any, trained: Collection[str] = ()) -> None:
        """Raises ValueError unless this is the base model that the method was saved with.

        Args:
            trained: names of parameters whose values may differ.
        """
        require_model_type(model, self.base_model, self.source)
        require_base(model, _layers(model), self.base_model, self.source, trained)


def config_file(attribute: str) -> str:
    """Returns the name of the file that describes the method at `model.<attribute>`."""
    return f"{attribute}{_SUFFIX}"


def write_method(
    handle: Any,
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    is_main_process: bool | None,
) -> None:
    """Writes a method's tensors and settings; both files are replaced together.

    Args:
        handle: the method's handle.
        directory: the folder. The two files of an earlier call are replaced; other files stay.
        tensors: by name; gathered if they are sharded.
        values: values that JSON supports.
        is_main_process: as in `Handle.save_pretrained`.
    """
    model = handle._model
    held = {name: whole(tensor) for name, tensor in tensors.items()}
    description = {
        "format_version": FORMAT_VERSION,
        "sapt_fast_version": __version__,
        "method": handle.method,
        "config": handle.config.to_dict(),
        "values": dict(values),
        "base_model": describe_base(model, _layers(model)),
    }
    if not writes(model, is_main_process):
        return
    names = [config_file(handle.attribute), _tensor_file(handle.attribute)]
    with replace_directory(directory, lambda folder: _written(folder, names)) as folder:
        write_tensors(folder / names[1], held)
        write_sealed(folder, names[0], description)
        write_card(folder, directory, handle)


def methods_in(folder: Path) -> dict[str, str]:
    """Returns the methods with their own files in a folder, by the attribute of the handle.

    Raises:
        ValueError: if a file that sapt_fast wrote names no method, or is not JSON.
    """
    found = {}
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        attribute = path.name.removesuffix(_SUFFIX)
        if attribute in ("sapt", "adapter", "generation"):
            continue
        try:
            description = read_json(path)
        except ValueError:
            if (folder / _tensor_file(attribute)).exists():
                raise
            continue  # of another library
        if isinstance(description, dict) and "sapt_fast_version" in description:
            if not isinstance(description.get("method"), str):
                raise ValueError(
                    f"{path}: method: got {description.get('method')!r}, expected a name"
                )
            found[attribute] = description["method"]
    return found


def read_method(folder: Path, attribute: str) -> StoredMethod:
    """Reads the files of one method.

    Args:
        folder: the saved folder.
        attribute: the attribute name of the method's handle.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged.
        ValueError: if the format version is unknown.
    """
    files, name = StoredFiles(folder), config_file(attribute)
    files.take(name)
    files.take(_tensor_file(attribute))
    description, source = files.json(name), folder / name
    require_fields(description, FORMAT_VERSION, _FIELDS, source)
    require_digest(description, files, [_tensor_file(attribute)], source)
    tensors, _ = files.tensors(_tensor_file(attribute))
    require_finite(folder / _tensor_file(attribute), tensors)
    return StoredMethod(
        source,
        description["method"],
        description["config"],
        description["values"],
        description["base_model"],
        tensors,
    )


def _tensor_file(attribute: str) -> str:
    return f"{attribute}.safetensors"


def _layers(model: Any) -> dict[str, tuple[int, int]]:
    """Returns the layers that identify the base model, with their (in, out) features."""
    return {path: layer_features(model.get_submodule(path)) for path in outer_layers(model)}


def _written(folder: Path, names: list[str]) -> list[str]:
    """Returns the files of this folder that `write_method` wrote."""
    try:
        description = read_json(folder / names[0])
    except (FileNotFoundError, ValueError):
        description = None
    ours = isinstance(description, dict) and "sapt_fast_version" in description
    return [*(names if ours else []), *own_card(folder)]
