"""Dtypes that are drawn for a call, and values that an op must refuse."""

from collections.abc import Callable
from typing import Any

import torch
from fuzz_calls import DTYPES, Draw, numbers
from torch import Tensor

MaybeBackend = str | None


def widened(tensor: Any) -> Any:
    return (
        torch.cat([tensor, tensor[..., :1]], -1)
        if tensor.shape[-1]
        else tensor.new_zeros(*tensor.shape[:-1], 3)
    )


def lengthened(tensor: Any) -> Any:
    return tensor.new_zeros(tensor.shape[0] + 1, *tensor.shape[1:])


def deepened(tensor: Any) -> Any:
    return tensor[None, None, None]


def on_meta(tensor: Any) -> Any:
    return tensor.to("meta")


def bad_tensor(name: str, *others: Callable[[Any], Any]) -> list[tuple[str, Any]]:
    """What no tensor argument may be: another kind of thing, dtype, device or depth."""
    return [
        (name, "abc"),
        (name, 3),
        (name, [1.0, 2.0]),
        (name, lambda t: t.to(torch.complex64)),
        (name, on_meta),
        (name, deepened),
        *((name, other) for other in others),
    ]


def bad_float(name: str, *others: Callable[[Any], Any]) -> list[tuple[str, Any]]:
    return [(name, lambda t: t.long()), (name, lambda t: t != 0), *bad_tensor(name, *others)]


BAD_BACKEND = [("backend", "none such"), ("backend", "cuda"), ("backend", 3)]


def all_finite(leaves: dict[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(leaf).all()) for leaf in leaves.values())


def distinct(keys: Tensor) -> bool:
    """Whether no two keys are equal and none is zero, so that searches have derivatives."""
    rows = {tuple(row) for row in numbers(keys).tolist()}
    return len(rows) == keys.shape[0] and not any(all(v == 0 for v in row) for row in rows)


def drawn_dtypes(draw: Draw, backend: MaybeBackend, wide: bool) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the inputs, and that of what may be float32 besides."""
    dtype = DTYPES[int(draw.rng.integers(3 if backend == "triton" else 4))]
    if wide and backend != "triton":
        dtype = torch.float64
    return dtype, draw.pick(dtype, dtype, torch.float32)
