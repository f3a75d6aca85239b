"""Experts that a forward has selected, and experts that are in training."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Selection", "Trained", "require_index"]


class Selection(NamedTuple):
    """Experts to mix: the arguments of `ops.mix_experts`.

    Attributes:
        a: [rows, r, I], at least the selected experts that were ever trained.
        b: [rows, r, O].
        at: [M, k] int64, rows of a and b; -1 for none and for untouched experts.
        version: that of the bank's rows.
    """

    a: Tensor
    b: Tensor
    at: Tensor
    version: int


class Trained(NamedTuple):
    """The rows that are in training.

    Attributes:
        ids: [U] int64, the experts.
        a: [U, r, I], a leaf.
        b: [U, r, O], a leaf.
        ordered: [U] int64, the experts in ascending order.
        order: [U] int64, the row of each of these.
    """

    ids: Tensor
    a: Tensor
    b: Tensor
    ordered: Tensor
    order: Tensor

    def find(self, index: Tensor) -> Tensor:
        """Returns the leaf's rows of an index; -1 for experts that are not trained."""
        if len(self.ordered) == 0:
            return torch.full_like(index, -1)
        at = torch.searchsorted(self.ordered, index).clamp_(max=len(self.ordered) - 1)
        return torch.where(self.ordered[at] == index, self.order[at], -1)


def require_index(index: Tensor, num_experts: int) -> None:
    """Raises TypeError or ValueError unless index [M, k] int64 is of -1 and experts.

    Values are read only on the CPU, and not while a graph is compiled.
    """
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index: got {kind}, expected a tensor of torch.int64")
    if index.dim() != 2:
        raise ValueError(f"index: got shape {tuple(index.shape)}, expected [M, k]")
    if index.device.type != "cpu" or torch.compiler.is_compiling() or not index.numel():
        return
    least, most = (int(value) for value in index.aminmax())
    if least < -1 or most >= num_experts:
        raise ValueError(
            f"index: got values from {least} to {most}, expected -1 to {num_experts - 1}"
        )
