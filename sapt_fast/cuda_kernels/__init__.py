"""CUDA backend: hand-written kernels of ``sapt_fast._C`` for decoding and search, forward only."""

import torch

from sapt_fast.cuda_kernels import common

BACKWARD = "triton"  # kernels for few rows have none of their own


def unavailable(op: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Returns why no kernel of this backend supports the device and dtype, or None."""
    if device.type != "cuda":
        return f"the tensors are on '{device.type}': move them to a GPU"
    if dtype == torch.float64:
        return "float64 runs in the reference and on the CPU only"
    return common.unavailable(device.index)


def unchosen(
    op: str, device: torch.device, few: int | None, dtype: torch.dtype | None = None
) -> str | None:
    """Returns None for few rows, if the current source has passed such calls on a GPU."""
    if few is None:
        return "they are for few rows"
    return common.unavailable(device.index) or common.unrecorded(op, dtype, few)
