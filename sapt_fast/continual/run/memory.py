"""Peak memory of a part of a run."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

__all__ = ["peak_memory", "reset_peak_memory"]

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak_memory(device: torch.device) -> None:
    """Resets the peak to the memory in use now; on a CPU only where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR.write_text("5")  # the resident set's high-water mark (proc(5))
    except OSError:
        return


def peak_memory(device: torch.device) -> int | None:
    """The peak memory in bytes: allocated by torch on a GPU, resident in the process on a CPU.

    Returns:
        None if the system does not report it.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return _resident_since_start()
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return _resident_since_start()


def _resident_since_start() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
