"""Writes JSON files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sapt_fast.files.directories import atomic_write_text

__all__ = ["write_json"]


def write_json(path: str | os.PathLike[str], data: Any) -> Path:
    """Writes standard JSON, indented and atomically; NaN and infinities become null.

    Args:
        path: the file.
        data: mappings with string keys, sequences, numbers, strings, None, paths and numpy values.

    Returns:
        `path` as a `Path`.

    Raises:
        TypeError: if JSON does not support a value.
    """
    text = json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False)
    return atomic_write_text(path, text + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"data: got the key {key!r}, expected a string")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value
