"""Helpers of the CUDA launchers: the compiled module, streams and dtypes."""

from __future__ import annotations

import importlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RECORDED = Path(__file__).with_name("recorded.json")
ROW_CLASSES = (1, 4, 16, 64)
"""Calls of up to so many rows run the same kernel of an op, or one that is tested with it."""


@cache
def native() -> Any:
    """Returns the module `sapt_fast._C`, built with CUDA.

    Raises:
        ImportError: if the module is not compiled, or was built without CUDA.
    """
    module = importlib.import_module("sapt_fast._C")
    if not module.cuda_runtime()["compiled"]:
        raise ImportError(
            "sapt_fast._C was built without CUDA: reinstall with SAPT_FAST_BUILD=cuda,"
            " which says what is missing"
        )
    return module


def unavailable(index: int | None = None) -> str | None:
    """Returns why no CUDA kernel of this build can run on a device, or None.

    Args:
        index: of the device. Defaults to any device of this machine.
    """
    try:
        runtime = native().cuda_runtime()
    except ImportError as error:
        return str(error)
    if runtime["error"]:
        return f"the CUDA runtime says: {runtime['error']}"
    devices = runtime["devices"]
    if index is None:
        reasons = [_uncovered(runtime["architectures"], device) for device in devices]
        return None if None in reasons else next(iter(reasons), "there is no GPU")
    if index >= len(devices):
        return f"the CUDA runtime sees {len(devices)} GPUs, none with index {index}"
    return _uncovered(runtime["architectures"], devices[index])


def _uncovered(architectures: list[str], device: dict[str, Any]) -> str | None:
    """Returns why no kernel of the build runs on a device that the runtime reports, or None."""
    major, minor = device["capability"]
    if _covers(architectures, major, minor):
        return None
    return (
        f"sapt_fast._C holds {', '.join(architectures)}, nothing for {device['name']}"
        f" (sm_{major}{minor}): add {major}{minor} to SAPT_FAST_CUDA_ARCHS and reinstall"
    )


def _covers(architectures: list[str], major: int, minor: int) -> bool:
    """Returns whether one runs on a device: binaries in their generation, PTX on later ones."""
    for name in architectures:
        kind, _, version = name.partition("_")
        number = int(version.rstrip("af"))
        exact = number == major * 10 + minor
        if version.endswith("a"):
            runs = exact
        elif kind == "compute":
            runs = number <= major * 10 + minor
        else:
            runs = number // 10 == major and number % 10 <= minor
        if runs:
            return True
    return False


def place(device: torch.device) -> tuple[int, int]:
    """Returns a CUDA device's index and the handle of torch's current stream on it.

    Raises:
        ValueError: if it is not a CUDA device.
    """
    if device.type != "cuda":
        raise ValueError(f"CUDA kernels need CUDA tensors, got device {str(device)!r}")
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def dtype_code(dtype: torch.dtype) -> int:
    """Returns the compiled module's code of a dtype.

    Raises:
        TypeError: if the module has no kernels for the dtype.
    """
    if dtype not in DTYPES:
        raise TypeError(f"CUDA kernels take float32, float16 or bfloat16 tensors, got {dtype}")
    return int(getattr(native(), str(dtype).removeprefix("torch.").upper()))


def typed(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Returns a tensor and the code of its dtype.

    Raises:
        TypeError: if the compiled module has no kernels for the dtype.
    """
    return tensor, dtype_code(tensor.dtype)


def row_class(rows: int) -> int | None:
    """Returns the entry of `ROW_CLASSES` for a number of rows; None if it is too large."""
    return next((bound for bound in ROW_CLASSES if rows <= bound), None)


def unrecorded(op: str, dtype: torch.dtype | None = None, rows: int | None = None) -> str | None:
    """Returns why an op's kernels are not selected by default; None if a GPU has run this source.

    `recorded.json` maps each op to `{"source": ..., "ran": {"bfloat16": [1, 4], ...}}`: its
    `source_digest`, and per dtype the row classes of which every test passed on a GPU.

    Args:
        op: an op with CUDA kernels.
        dtype: of the call's tensors. Defaults to any that is recorded.
        rows: of the call. Defaults to any number that is recorded.
    """
    recorded = json.loads(RECORDED.read_text()).get(op)
    if recorded is None:
        return "no correct run on a GPU is recorded"
    if recorded["source"] != source_digest(op):
        return "the source has changed since its recorded run on a GPU"
    if dtype is not None and rows is not None:
        name = str(dtype).removeprefix("torch.")
        if row_class(rows) not in recorded["ran"].get(name, ()):
            return f"no correct run on a GPU is recorded for {rows} rows of {name}"
    return None


def source_digest(op: str) -> str:
    """Returns a digest of the sources from which an op's kernels were compiled."""
    return str(native().cuda_runtime()["sources"][op])
