"""Reads and writes the files of a saved folder: safetensors and JSON, with limits and checks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sapt_fast.files.reading import CONFIG_BYTES, open_regular, parse_json, read_bytes
from sapt_fast.files.safetensors_header import WEIGHTS_BYTES, damaged, read_header

__all__ = [
    "StoredFiles",
    "digest_of_file",
    "parse_tensors",
    "read_tensors",
    "require_finite",
    "tensor_bytes",
    "write_tensors",
]


class StoredFiles:
    """The files of one folder, which are read into memory first and parsed afterwards.

    Attributes:
        folder: the folder.
        digests: the SHA-256 of each file, in hexadecimal digits, by its relative path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.digests: dict[str, str] = {}
        self._data: dict[str, bytes] = {}

    def take(self, name: str) -> None:
        """Reads a file into memory.

        Args:
            name: the file's relative path.

        Raises:
            FileNotFoundError: if the file is missing.
            ValueError: if it is not a regular file, or too large.
            ValueError: if the header of a safetensors file does not fit its size.
            OSError: if it cannot be read.
        """
        path = self.folder / name
        is_weights = name.endswith(".safetensors")
        data = _read_tensor_file(path) if is_weights else read_bytes(path, CONFIG_BYTES)
        self._data[name] = data
        self.digests[name] = sha256(data).hexdigest()

    def json(self, name: str) -> Any:
        """Parses a JSON file that was read.

        Raises:
            ValueError: if it is not valid JSON.
        """
        return parse_json(self._data[name], self.folder / name)

    def tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Parses a safetensors file that was read, and frees its bytes.

        Returns:
            Tensors by name, and the metadata.

        Raises:
            ValueError: if the file is damaged, or a value is not finite.
        """
        path = self.folder / name
        tensors, metadata = parse_tensors(self._data.pop(name), path)
        require_finite(path, tensors)
        return tensors, metadata


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads tensors and metadata of a safetensors file.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is not a regular file, or damaged.
        OSError: if it cannot be read.
    """
    return parse_tensors(_read_tensor_file(path), path)


def parse_tensors(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parses the content of a safetensors file into tensors and metadata.

    Raises:
        ValueError: if it is damaged.
    """
    from safetensors.torch import load

    try:
        tensors = load(data)
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise damaged(path, error) from error
    size = int.from_bytes(data[:8], "little")
    metadata = parse_json(data[8 : 8 + size], path).get("__metadata__") or {}
    return tensors, metadata


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Returns the content of a safetensors file, equal for equal tensors and metadata."""
    from safetensors.torch import save

    copies = {name: t.detach().to("cpu").contiguous().clone() for name, t in tensors.items()}
    data = save(copies, metadata={"format": "pt", **(metadata or {})})
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # safetensors' varies
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file of copies of these tensors.

    Raises:
        OSError: if it cannot be written, for example on a full disk.
    """
    path.write_bytes(tensor_bytes(tensors, metadata))


def digest_of_file(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    digest = sha256()
    with open_regular(path, WEIGHTS_BYTES) as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def require_finite(source: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a floating-point value is NaN or infinite."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        wide = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no isfinite
        if not torch.isfinite(wide).all():
            raise ValueError(f"{source}: {name}: got NaN or infinite values, expected finite ones")


def _read_tensor_file(path: Path) -> bytes:
    """Returns the bytes of a safetensors file; checks the header before reading the rest."""
    with open_regular(path, WEIGHTS_BYTES) as file:
        read_header(file, path)
        file.seek(0)
        return file.read(os.fstat(file.fileno()).st_size)
