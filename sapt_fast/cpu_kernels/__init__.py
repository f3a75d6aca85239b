"""CPU backend: C++ kernels of `sapt_fast._C`, and torch's own if they are as fast."""

import torch

from sapt_fast import dispatch

BACKWARD = "cpu"


def unavailable(op: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Returns why no kernel of this backend can run on tensors of that device, or None."""
    if device.type != "cpu":
        return f"the tensors are on '{device.type}': move them to the CPU or choose triton"
    remedy = "reinstall with SAPT_FAST_BUILD=cpu to see the error"
    return dispatch.import_failure("sapt_fast._C", remedy)


def unchosen(
    op: str, device: torch.device, few: int | None, dtype: torch.dtype | None = None
) -> str | None:
    """Returns None: this backend is used whenever it can run."""
    return None
