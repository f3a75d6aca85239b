"""Reads torch's archives and numpy's pickles without executing any code from the file.

A pickle is scanned first, so that no opcode can allocate more memory than the file has bytes. Then
it is read with stand-ins for the few names that tensors and arrays need.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sapt_fast.files.reading import open_regular, read_bytes

__all__ = ["Refused", "read_array", "read_torch"]

_ARCHIVE_BYTES = 2**40
_PICKLE_BYTES = 2**26
_ARRAY_BYTES = 2**20  # a weight for each task
_MOST_OPCODES = 2**21
_DIRECTORY_BYTES = 2**26
_END_BYTES = 2**16 + 100  # the end of a zip archive, with the longest comment
_BLOCK = 2**24

_FLOATS = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}
_OTHERS = (
    *("Long", "Int", "Short", "Char", "Byte", "Bool", "ComplexFloat", "ComplexDouble"),
    *("QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4", "Untyped"),
)
_NOT_DENSE = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without values (on the meta device)",
    "_rebuild_device_tensor_from_numpy": "a tensor of another device",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
    "_rebuild_wrapper_subclass": "a tensor of a subclass",
    "_rebuild_from_type_v2": "a tensor of a subclass",
    "_rebuild_tensor_v3": "a tensor of a type that the original SAPT code does not use",
}


@dataclass(frozen=True, slots=True)
class Refused:
    """The stand-in for a value that is not a dense tensor of floats."""

    kind: str


@dataclass(frozen=True, slots=True)
class _Dense:
    """The stand-in for a tensor while a pickle is read, so that the pickle cannot change it."""

    tensor: Tensor


class _Call:
    """The stand-in for a function, created for each use, so that a pickle cannot change it."""

    __slots__ = ("run",)

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    def __call__(self, *arguments: Any) -> Any:
        return self.run(*arguments)


def read_torch(path: Path) -> Any:
    """Reads a tensor or a dict of tensors that `torch.save` wrote.

    Args:
        path: an archive in the format of torch 1.6 and newer.

    Returns:
        Dense tensors of float16, bfloat16, float32 or float64 that lie within their storages. Any
        other tensor is replaced by a `Refused`.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is damaged, or contains anything other than tensors.
    """
    with open_regular(path, _ARCHIVE_BYTES) as file:
        try:
            content = _Archive(file).load()
        except Exception as error:  # whatever a damaged or hostile file makes the readers raise
            reason = str(error)[:300] or type(error).__name__
            raise ValueError(
                f"{path}: damaged, or contains more than tensors ({reason})"
            ) from error
    if isinstance(content, dict):
        return {name: _opened(value) for name, value in content.items()}
    return _opened(content)


def _opened(value: Any) -> Any:
    return value.tensor if isinstance(value, _Dense) else value


class _Archive:
    """A torch archive, whose parts are not compressed."""

    def __init__(self, file: Any) -> None:
        size = file.seek(0, io.SEEK_END)
        if _directory_bytes(file, size) > _DIRECTORY_BYTES:
            raise ValueError("its list of parts is too large")
        self.archive = zipfile.ZipFile(file)
        self.parts: dict[str, zipfile.ZipInfo] = {}
        for part in self.archive.infolist():
            stored = part.compress_type == zipfile.ZIP_STORED
            if not stored or part.compress_size != part.file_size or part.flag_bits & 1:
                raise ValueError(f"{part.filename[:80]} is compressed or encrypted")
            if part.filename in self.parts:
                raise ValueError(f"it contains {part.filename[:80]} twice")
            self.parts[part.filename] = part
        if sum(part.file_size for part in self.parts.values()) > size:
            raise ValueError("its parts are larger than the file")
        self.storages: dict[tuple[str, torch.dtype], Tensor] = {}

    def load(self) -> Any:
        found = [name for name in self.parts if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError("it contains no data.pkl")
        self.root = found[0].removesuffix("data.pkl")
        order = self.parts.get(self.root + "byteorder")
        if order is not None and self._bytes(order, 16) != b"little":
            raise ValueError("its byte order is not little-endian")
        data = self._bytes(self.parts[found[0]], _PICKLE_BYTES)
        _scan(data)
        return _TensorUnpickler(io.BytesIO(bytes(data)), self).load()

    def _bytes(self, part: zipfile.ZipInfo, limit: int) -> bytearray:
        if part.file_size > limit:
            raise ValueError(
                f"{part.filename[:80]}: got {part.file_size} bytes, expected at most {limit}"
            )
        content, at = bytearray(part.file_size), 0
        with self.archive.open(part) as file:
            while block := file.read(_BLOCK):
                content[at : at + len(block)] = block
                at += len(block)
        if at != part.file_size or len(content) != at:
            raise ValueError(f"{part.filename[:80]} is truncated")
        return content

    def storage(self, name: str, dtype: torch.dtype, count: int) -> Tensor:
        """Returns the numbers of a storage, [count]."""
        known = self.storages.get((name, dtype))
        if known is None:
            part = self.parts[f"{self.root}data/{name}"]
            if part.file_size != count * dtype.itemsize:
                raise ValueError(
                    f"a storage of {count} numbers has {part.file_size} bytes in the file"
                )
            data = self._bytes(part, part.file_size)
            known = torch.frombuffer(data, dtype=dtype) if count else torch.empty(0, dtype=dtype)
            self.storages[name, dtype] = known
        if len(known) != count:
            raise ValueError("it uses one storage with two sizes")
        return known


def _directory_bytes(file: Any, size: int) -> int:
    """Returns the size that a zip archive states for its list of parts, which limits memory."""
    start = max(0, size - _END_BYTES)
    file.seek(start)
    tail = file.read(_END_BYTES)
    end = tail.rfind(b"PK\5\6")
    if end < 0 or len(tail) < end + 22:
        raise ValueError("not an archive of torch.save since torch 1.6")
    stated = int.from_bytes(tail[end + 12 : end + 16], "little")
    locator = tail[max(0, end - 20) : end]
    if stated == 2**32 - 1 and locator[:4] == b"PK\6\7":  # zip64
        file.seek(min(int.from_bytes(locator[8:16], "little"), size))
        stated = int.from_bytes(file.read(56)[40:48], "little")
    file.seek(0)
    return stated


class _TensorUnpickler(pickle.Unpickler):
    """An unpickler that allows only the names of dense tensors."""

    def __init__(self, file: io.BytesIO, archive: _Archive) -> None:
        super().__init__(file)
        self._archive = archive

    def persistent_load(self, pid: Any) -> Any:
        kind, storage, name, _, count = pid
        if kind != "storage" or not isinstance(name, str) or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("refuses a reference that is not a storage")
        if isinstance(storage, Refused):
            return storage
        if not isinstance(storage, torch.dtype):
            raise pickle.UnpicklingError("refuses a storage without a type")
        return self._archive.storage(name, storage, count)

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module_name in ("torch", "torch.storage"):
            if global_name in _FLOATS:
                return _FLOATS[global_name]
            kind = global_name.removesuffix("Storage")
            if kind in _OTHERS:
                return Refused(f"a tensor of type {kind}")
        if module_name in ("torch._utils", "torch._tensor"):
            if global_name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
                return _Call(_rebuild_tensor)
            if global_name == "_rebuild_parameter":
                return _Call(_rebuild_parameter)
            if global_name in _NOT_DENSE:
                return _refuse(_NOT_DENSE[global_name])
        # Arguments of refused tensors.
        if module_name in ("torch", "torch.serialization", "builtins") and global_name in _INERT:
            return _refuse(f"torch.{global_name}")
        raise pickle.UnpicklingError(f"refuses {module_name}.{global_name}")


_INERT = {
    *("device", "Size", "per_tensor_affine", "per_channel_affine", "_get_layout"),
    *(str(value).removeprefix("torch.") for value in vars(torch).values()
      if isinstance(value, (torch.dtype, torch.layout))),
}  # fmt: skip


def _refuse(kind: str) -> _Call:
    """Returns a stand-in for a function or value of torch, which returns a `Refused`."""
    return _Call(lambda *arguments: Refused(kind))


def _rebuild_tensor(
    storage: Any, offset: int, size: Sequence[int], stride: Sequence[int], *others: Any
) -> Any:
    """Returns the tensor of a storage; a `Refused` if it exceeds the storage or overlaps itself."""
    if isinstance(storage, Refused):
        return storage
    numbers = (offset, *size, *stride)
    if any(type(number) is not int or number < 0 for number in numbers) or len(size) != len(stride):
        raise ValueError("a tensor with an invalid size or stride")
    last, covered = offset, 1
    # In order of stride, each dimension's step must exceed the extent of the smaller ones.
    for length, step in sorted(zip(size, stride, strict=True), key=lambda pair: pair[1]):
        if length > 1:
            if step < covered:
                return Refused(
                    f"a tensor of shape {tuple(size)} with values that overlap in memory"
                )
            last += (length - 1) * step
            covered = step * (length - 1) + covered
    if math.prod(size) and last >= len(storage):
        return Refused(f"a tensor of shape {tuple(size)} that exceeds its storage")
    return _Dense(torch.as_strided(storage, tuple(size), tuple(stride), offset))


def _rebuild_parameter(data: Any, requires_grad: Any, hooks: Any) -> Any:
    return data


def _scan(data: bytes | bytearray) -> None:
    """Raises ValueError if a pickle would allocate more memory than its own size."""
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(bytes(data))):
        if count > _MOST_OPCODES:
            raise ValueError("a pickle with more steps than tensors need")
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= argument <= len(data):
            raise ValueError("a pickle with memo indices beyond its size")
        if name == "FRAME" and argument > len(data):
            raise ValueError("a pickle with a frame larger than itself")
        if name in ("LONG1", "LONG4", "LONG", "INT") and abs(argument) >= 2**64:
            raise ValueError("a pickle with a huge number")


# --- numpy's arrays ---


def read_array(path: Path) -> np.ndarray:
    """Reads a numpy array of floats from a pickle file.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is not a pickle, or contains anything else.
    """
    data = read_bytes(path, _ARRAY_BYTES)
    try:
        _scan(data)
        return _ArrayUnpickler(io.BytesIO(data)).load().floats()
    except Exception as error:  # a damaged or hostile pickle can make the reader raise anything
        reason = str(error)[:300] or type(error).__name__
        raise ValueError(f"{path}: not a pickled numpy array of floats ({reason})") from error


class _PickledType:
    """The stand-in for numpy.dtype, which stores its name and byte order."""

    def __init__(self, name: str, *flags: object) -> None:
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


class _PickledArray:
    """The stand-in for numpy.ndarray, which stores its shape, type and bytes."""

    def __init__(self, *arguments: object) -> None:
        self.state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def floats(self) -> np.ndarray:
        _, shape, kind, _, data = self.state
        if kind.name not in ("f2", "f4", "f8") or kind.order not in ("<", ">", "="):
            raise ValueError(f"got numbers of type {str(kind.name)[:40]!r}, expected floats")
        return np.frombuffer(data, np.dtype(kind.order + kind.name)).reshape(shape)


def _reconstruct(*arguments: object) -> _PickledArray:
    """Replaces numpy's function that creates an array, whose state follows."""
    return _PickledArray()


def _frombuffer(data: bytes, kind: _PickledType, shape: tuple, order: str) -> _PickledArray:
    """Replaces numpy's function that creates an array from a buffer (pickle protocol 5)."""
    array = _PickledArray()
    array.state = (1, shape, kind, order == "F", data)
    return array


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler for one numpy array of floats.

    It allows only the names of numpy's array format and replaces them by the stand-ins above. So
    no code of other libraries, numpy included, processes the file's content.
    """

    names: ClassVar[Mapping[tuple[str, str], Callable[..., object]]] = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy.core.numeric", "_frombuffer"): _frombuffer,
        ("numpy._core.numeric", "_frombuffer"): _frombuffer,
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledType,
    }

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in self.names:
            raise pickle.UnpicklingError(f"refuses {module_name}.{global_name}")
        found = self.names[module_name, global_name]
        return found if isinstance(found, type) else _Call(found)
