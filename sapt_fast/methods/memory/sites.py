"""The layers to which memory experts are added by default, and their widths."""

from __future__ import annotations

from typing import Any

from torch import nn

from sapt_fast.methods.edits.sites import default_targets, widths_of

__all__ = ["memory_targets", "memory_widths"]

_DEPTH = 0.67  # of the blocks of a decoder
_MLPS = ("mlp", "DenseReluDense")


def memory_targets(model: Any) -> tuple[str, ...]:
    """Returns the MLP of the block at two thirds of the depth.

    Where the MLP is no module of its own, it is its last projection.

    Raises:
        ValueError: if the model has no layer of a known name.
    """
    (last,) = default_targets(model, _DEPTH)
    parent = last.rpartition(".")[0]
    return (parent,) if parent.rpartition(".")[2] in _MLPS else (last,)


def memory_widths(layer: nn.Module, path: str) -> tuple[int, int]:
    """Returns the widths of a layer's input and output: of an MLP those of its projections.

    Raises:
        ValueError: if they cannot be told.
    """
    widths = []
    for name, module in layer.named_modules():
        try:
            widths.append(widths_of(module, f"{path}.{name}"))
        except ValueError:
            continue
    if not widths:
        raise ValueError(
            f"target_modules: got {path}, a {type(layer).__name__}, expected a linear layer or a "
            "block of them"
        )
    return widths[0][0], widths[-1][1]
