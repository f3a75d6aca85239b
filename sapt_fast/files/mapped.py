"""A safetensors file in virtual memory: what is not read takes no memory."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sapt_fast.files.reading import open_regular
from sapt_fast.files.safetensors_header import WEIGHTS_BYTES, damaged, read_header

__all__ = ["MappedTensors"]

_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


class MappedTensors:
    """The tensors of a file, whose pages the operating system reads when they are used.

    The content stays that of the opened file if another file takes its path. Copies share it, and
    it is pickled as its path.

    Args:
        path: the file.

    Attributes:
        path: as above.
        tensors: by name.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if its header is damaged, or does not fit its size.
        OSError: if it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path, WEIGHTS_BYTES) as file:
            entries, start = read_header(file, path)
            # Private and writable, because torch warns about memory that cannot be written.
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if hasattr(mmap, "MADV_RANDOM"):
            memory.madvise(mmap.MADV_RANDOM)
        self.tensors = {name: _view(memory, start, e, path) for name, e in entries.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> MappedTensors:
        return self

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return MappedTensors, (self.path,)


def _view(memory: mmap.mmap, start: int, entry: dict[str, Any], path: Path) -> Tensor:
    try:
        dtype, shape = _DTYPES[entry["dtype"]], [int(size) for size in entry["shape"]]
        first, end = (int(at) for at in entry["data_offsets"])
        if first == end:
            return torch.empty(shape, dtype=dtype)
        count = (end - first) // dtype.itemsize
        whole = torch.frombuffer(memory, dtype=dtype, count=count, offset=start + first)
        return whole.view(shape)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise damaged(path, error) from error
