"""Triton backend: NVIDIA GPUs from compute capability 8.0 on, or Triton's interpreter."""

import torch

from sapt_fast import dispatch

BACKWARD = "triton"


def unavailable(op: str, device_type: str, dtype: torch.dtype | None) -> str | None:
    """Why no kernel of this backend can run on tensors of that device and dtype, or None."""
    if dtype == torch.float64:
        return "float64 runs in the reference and on the CPU only"
    missing = dispatch.import_failure("triton", "pip install 'sapt_fast[gpu]'")
    if missing or device_type == "cuda" or dispatch.triton_interpreted():
        return missing
    return f"the tensors are on '{device_type}' and TRITON_INTERPRET=1 is not set"


def unchosen(
    op: str, device_type: str, few: int | None, dtype: torch.dtype | None = None
) -> str | None:
    """The interpreter is for tests: it is taken by name only."""
    interpreted = device_type != "cuda" and dispatch.triton_interpreted()
    return "Triton's interpreter would run it" if interpreted else None
