"""Reads files that may be damaged or hostile: regular files up to a limit, strict JSON."""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["CONFIG_BYTES", "DATA_BYTES", "open_regular", "parse_json", "read_bytes", "read_json"]

CONFIG_BYTES = 2**28  # limit of a settings file, more than thousands of tasks and layers need
DATA_BYTES = 2**34  # limit of a file of training data

_JSON_STARTS = b'{["-0123456789tfn'
_HEAD = 4096
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def open_regular(path: Path, limit: int) -> BinaryIO:
    """Opens a regular file for reading; a symbolic link is followed.

    Args:
        path: the file.
        limit: its largest allowed size in bytes.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is a folder, a pipe or a device, which could block.
        ValueError: if it is larger than `limit`.
        OSError: if it cannot be read.
    """
    try:
        _require_regular(path, os.stat(path).st_mode)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} is missing") from None
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise FileNotFoundError(f"{path!r} is missing") from None  # a name with a zero byte
    file = os.fdopen(descriptor, "rb")
    try:
        status = os.fstat(descriptor)
        _require_regular(path, status.st_mode)
        if status.st_size > limit:
            raise ValueError(f"{path}: got {status.st_size} bytes, expected at most {limit}")
    except BaseException:
        file.close()
        raise
    return file


def read_bytes(path: Path, limit: int) -> bytes:
    """Reads a file.

    Args:
        path: the file.
        limit: its largest allowed size in bytes.

    Raises:
        FileNotFoundError, ValueError, OSError: as `open_regular`.
    """
    with open_regular(path, limit) as file:
        return file.read(limit)


def read_json(path: Path, limit: int = CONFIG_BYTES) -> Any:
    """Reads a JSON file.

    Args:
        path: the file.
        limit: its largest allowed size in bytes.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is not a regular file, or too large.
        ValueError: if it is not UTF-8, not JSON, or nested too deeply.
        ValueError: if an object has a key twice.
        ValueError: if it has NaN, Infinity, or half of a surrogate pair.
        OSError: if it cannot be read.
    """
    with open_regular(path, limit) as file:
        head = file.read(_HEAD)
        # The first bytes show that a huge file is not JSON.
        if head.strip() and head.strip()[:1] not in _JSON_STARTS:
            raise ValueError(
                f"{path}: broken JSON at line 1, column 1: it begins with {head.strip()[:8]!r}; is "
                "it truncated?"
            )
        data = head + file.read(limit)
    return parse_json(data, path)


def parse_json(data: bytes, path: str | os.PathLike[str]) -> Any:
    """Parses JSON.

    Args:
        data: the content of a file.
        path: the file, for messages.

    Raises:
        ValueError: as `read_json`.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}: {error.reason}") from error
    try:
        content = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_number)
        if _SURROGATE.search(text):  # half of a pair could not be printed
            json.dumps(content, ensure_ascii=False).encode("utf-8")
        return content
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: broken JSON at line {error.lineno}, column {error.colno} "
            f"(character {error.pos} of {len(text)}): {error.msg}; is it truncated?"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply") from error


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds: Iterable[tuple[Any, str]] = (
            (stat.S_ISDIR, "a folder"),
            (stat.S_ISFIFO, "a pipe"),
            (stat.S_ISSOCK, "a socket"),
        )
        kind = next((name for test, name in kinds if test(mode)), "a device")
        raise ValueError(f"{path}: got {kind}, expected a regular file")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"an object has the key {twice[:80]!r} twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
