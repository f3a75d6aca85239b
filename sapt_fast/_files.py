"""Files that are either whole or absent: write to a neighbour, then rename."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

__all__ = ["atomic_write_bytes", "atomic_write_text"]


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part.

    Missing parent folders are created. A failure or a kill leaves the old file as it was.

    Args:
        path: target file.
        data: its whole content.

    Returns:
        `path` as a `Path`.

    Raises:
        TypeError: `data` is not bytes.
        OSError: the folder cannot be written.
    """
    if not isinstance(data, bytes):
        raise TypeError(f"data must be bytes, got {type(data).__name__}")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Same folder, hence same filesystem: only there is the rename atomic.
    partial = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return target


def atomic_write_text(path: str | os.PathLike[str], text: str) -> Path:
    """`atomic_write_bytes` of `text` as UTF-8, line ends as given.

    Args:
        path: target file.
        text: its whole content.

    Returns:
        `path` as a `Path`.

    Raises:
        TypeError: `text` is not a string.
        OSError: the folder cannot be written.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, got {type(text).__name__}")
    return atomic_write_bytes(path, text.encode("utf-8"))
