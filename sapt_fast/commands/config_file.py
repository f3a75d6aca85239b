"""Reads options of the command line from a YAML file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sapt_fast.files.reading import read_bytes

__all__ = ["read_config"]

_BYTES = 2**16
_MOST_VALUES, _MOST_DEPTH = 10_000, 20


def read_config(path: Path, known: Collection[str]) -> dict[str, Any]:
    """Reads the options in a file.

    Args:
        path: a YAML mapping of options by name (`max_train` or `max-train`). An option of repeated
            NAME=VALUE texts is a mapping.
        known: the names of the options.

    Returns:
        The options by name, with values in the form of the command line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a regular file, or not a YAML mapping.
        ValueError: if an option is unknown or given twice.
        ValueError: if a value has a type that JSON does not have (dates, bytes, sets, Python
            objects), or a number has more than 64 bits.
        ValueError: if the file is larger or deeper, or has more values, than options need; an alias
            counts at every use.
    """
    try:
        data = read_bytes(path, _BYTES)
    except FileNotFoundError:
        raise FileNotFoundError(f"config: {path} does not exist") from None
    content = _parsed(data, path)
    if not isinstance(content, dict):
        raise ValueError(f"config: {path} holds {type(content).__name__}, expected options by name")
    options = {str(name).replace("-", "_"): value for name, value in content.items()}
    if len(options) < len(content):
        raise ValueError(f"config: {path} has an option twice, spelt with - and with _")
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"config: {path} has unknown options {unknown}")
    return {name: _as_given(value) for name, value in options.items()}


def _parsed(data: bytes, path: Path) -> Any:
    import yaml

    try:
        loader = yaml.SafeLoader(data.decode("utf-8"))
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            # before values are made: a merge key copies its mapping at every use
            _check(node, 0, [_MOST_VALUES])
            content = loader.construct_document(node)
        finally:
            loader.dispose()
        _require_plain(content)
        return content
    except UnicodeDecodeError as error:
        raise ValueError(f"config: {path} is not UTF-8: {error.reason}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"config: {path} is no YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError(f"config: {path} is nested too deep for options") from error
    except ValueError as error:
        raise ValueError(f"config: {path}: {error}") from error
    except Exception as error:  # the loader raises anything for a tag that its value does not fit
        raise ValueError(f"config: {path} is no YAML: {type(error).__name__}: {error}") from error


def _check(node: Any, depth: int, left: list[int]) -> None:
    """Raises ValueError if a YAML node has a key twice, or is larger or deeper than options need;
    aliases and merge keys count at every use."""
    left[0] -= 1
    if left[0] < 0 or depth > _MOST_DEPTH:
        raise ValueError(
            f"more than {_MOST_VALUES} values, or more than {_MOST_DEPTH} inside each other"
        )
    if isinstance(node.value, str):
        return
    inner = node.value
    if inner and isinstance(inner[0], tuple):
        keys = Counter(key.value for key, _ in inner if isinstance(key.value, str))
        twice, count = (keys.most_common(1) or [("", 0)])[0]
        if count > 1:
            raise ValueError(f"got the key {twice!r} twice")
        inner = [part for pair in inner for part in pair]
    for part in inner:
        _check(part, depth + 1, left)


def _require_plain(value: Any) -> None:
    """Raises ValueError for a type that JSON does not have, or a number of more than 64 bits."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for part in value:
            _require_plain(part)
    elif isinstance(value, str):
        value.encode("utf-8")  # half of a surrogate pair raises
    elif isinstance(value, int) and abs(value) >= 2**64:
        raise ValueError("got a number of more than 64 bits")
    elif value is not None and not isinstance(value, (int, float)):
        raise ValueError(
            f"got a value of type {type(value).__name__}, expected text, numbers, lists and "
            "mappings; quote a value to make it text"
        )


def _as_given(value: Any) -> Any:
    if isinstance(value, dict):
        return [f"{name}={json.dumps(item)}" for name, item in value.items()]
    return value
