"""Triton backend: NVIDIA GPUs from compute capability 8.0 on, or Triton's interpreter."""

import importlib

import torch

from sapt_fast import dispatch

BACKWARD = "triton"


def unavailable(op: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Returns why no kernel of this backend supports the device and dtype, or None."""
    if dtype == torch.float64:
        return "float64 runs in the reference and on the CPU only"
    missing = dispatch.import_failure("triton", "pip install 'sapt_fast[gpu]'")
    if missing:
        return missing
    if dispatch.triton_interpreted():
        return _interpreter_failure()
    if device.type == "cuda":
        return None
    return f"the tensors are on '{device.type}' and TRITON_INTERPRET=1 is not set"


def _interpreter_failure() -> str | None:
    """Triton 3.6 converts arrays of one element to integers, which numpy from 2.4 on refuses."""
    triton, numpy = (importlib.import_module(name).__version__ for name in ("triton", "numpy"))
    if triton.startswith("3.6.") and [int(part) for part in numpy.split(".")[:2]] >= [2, 4]:
        return (
            f"the interpreter of Triton {triton} does not run with numpy {numpy}:"
            " install 'numpy<2.4', or 'triton>=3.8'"
        )
    return None


def unchosen(
    op: str, device: torch.device, few: int | None, dtype: torch.dtype | None = None
) -> str | None:
    """Returns why Triton's interpreter, which is for tests, is used only by name; else None."""
    interpreted = device.type != "cuda" and dispatch.triton_interpreted()
    return "Triton's interpreter would run it" if interpreted else None
