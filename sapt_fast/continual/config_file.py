"""Options of the command line in a YAML file."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

__all__ = ["read_config"]


def read_config(path: Path, known: Collection[str]) -> dict[str, Any]:
    """The options in a file, as the command line takes them.

    Args:
        path: a YAML mapping of options by name (`max_train` or `max-train`). An option that is
            given as NAME=VALUE and may be repeated is a mapping.
        known: the options that there are.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no YAML, no mapping, or an unknown option.
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"config: {path} does not exist")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"config: {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config: {path} holds {type(content).__name__}, expected options by name")
    options = {str(name).replace("-", "_"): value for name, value in content.items()}
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"config: {path} has unknown options {unknown}")
    return {name: _as_given(value) for name, value in options.items()}


def _as_given(value: Any) -> Any:
    if isinstance(value, dict):
        return [f"{name}={json.dumps(item)}" for name, item in value.items()]
    return value
