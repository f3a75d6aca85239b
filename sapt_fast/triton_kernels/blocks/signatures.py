"""Comparisons of tensors' sizes, strides and dtypes, and allocations, as compiled graphs make them.

Both come from the functions that torch's own compiler calls, where torch has them: they take a
tenth of a microsecond a tensor. Otherwise they are computed in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_compiled: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)


def same_as(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Returns a function of as many tensors: whether each has this one's size, stride and dtype.

    It may also be false for another device, kind of tensor, `requires_grad` or mode of torch.
    """
    if len({id(t) for t in tensors}) == len(tensors):  # torch's is false for a tensor given twice
        try:
            check: Callable[..., bool] = _compiled.TensorGuards(
                *tensors,
                dynamic_dims_sizes=[list(t.shape) for t in tensors],
                dynamic_dims_strides=[list(t.stride()) for t in tensors],
            ).check
            if check(*tensors):
                return check
        except (AttributeError, TypeError, SystemError):
            pass
    facts = [_facts(t) for t in tensors]
    return lambda *others: [_facts(t) for t in others] == facts


def _facts(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.stride(), t.dtype, t.get_device()


def allocation(device: torch.device) -> Callable[..., Tensor]:
    """Returns a function of size, stride and dtype: an uninitialised tensor.

    It is on the current device of the given one's kind.
    """
    found: Callable[..., Tensor] | None = getattr(_compiled, f"_empty_strided_{device.type}", None)
    if found is not None:
        return found
    return lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device=device.type
    )
