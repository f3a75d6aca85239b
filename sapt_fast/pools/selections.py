"""Experts that a forward has selected, and experts that are in training."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Selection", "Trained"]


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
