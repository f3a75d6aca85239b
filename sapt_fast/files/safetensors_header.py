"""Reads and checks the header of a safetensors file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

from sapt_fast.files.reading import parse_json

__all__ = ["WEIGHTS_BYTES", "damaged", "read_header"]

WEIGHTS_BYTES = 2**40  # the largest file that is read
_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


def read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    """Reads the header, and checks that the file is as long as it states.

    Args:
        file: the open file, at its start.
        path: its path, for messages.

    Returns:
        The entries by name of the tensor, and the position of the first tensor in the file.

    Raises:
        ValueError: if it is damaged.
    """
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or not 0 < length <= min(size - 8, _HEADER_BYTES):
        raise damaged(path, f"a header of {length} bytes in a file of {size}")
    text = file.read(length)
    try:
        entries = parse_json(text, path)
        entries.pop("__metadata__", None)
        end = max([0, *(entry["data_offsets"][1] for entry in entries.values())])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, error) from error
    if 8 + length + end != size:
        raise damaged(path, f"its header states {8 + length + end} bytes, but it has {size}")
    return entries, 8 + length


def damaged(path: Path, error: object) -> ValueError:
    """Returns the error for a file that is no whole safetensors file."""
    return ValueError(f"{path}: truncated, or not a safetensors file ({error})")
