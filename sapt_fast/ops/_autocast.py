"""Autocast as the ops see it. torch knows none for meta tensors and raises when asked."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for tensors of that device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Leaves the dtypes inside alone."""
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
