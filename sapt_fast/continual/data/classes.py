"""The classes of an image benchmark: one head for all of them, masked to a task's in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["ClassSpace", "mask_other_classes"]


def mask_other_classes(logits: Tensor, own: Tensor) -> Tensor:
    """Returns the logits with those of other tasks' classes as -inf, for the loss alone.

    L2P (Wang et al., CVPR 2022) trains so: the classes of earlier tasks get no gradient, and are
    not pushed down by a task that has no example of them.

    Args:
        logits: [..., C].
        own: [C] bool, the classes of the task that trains.

    Raises:
        ValueError: if `own` is not [C] bool, or has no class.
    """
    if own.dtype != torch.bool or own.shape != logits.shape[-1:] or not own.any():
        raise ValueError(
            f"own: got {own.dtype} {list(own.shape)} with {int(own.sum())} classes, expected bool "
            f"[{logits.shape[-1]}] with at least one"
        )
    return logits.masked_fill(~own.to(logits.device), -torch.inf)


@dataclass(frozen=True)
class ClassSpace:
    """The classes of all tasks, in the order of the head's rows.

    Attributes:
        classes: C distinct names.
        own: [C] bool, the classes of the task that trains, to which training is masked; None trains
            on all classes.
    """

    classes: tuple[str, ...]
    own: Tensor | None = None

    def of_task(self, labels: tuple[str, ...]) -> ClassSpace:
        """Returns the space that is masked to a task's classes in training.

        Args:
            labels: names of the task's classes.
        """
        own = torch.tensor([name in labels for name in self.classes])
        return replace(self, own=None if own.all() else own)

    def logits(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns logits [B, 1, C] of a forward for the loss, masked to the task's classes.

        The dev loss, by which `load_best` selects a checkpoint, is masked as the training loss is.

        Args:
            outputs: of the model, with `logits` [B, C].
            batch: the inputs of the forward.
        """
        logits: Tensor = outputs.logits
        if self.own is not None:
            logits = mask_other_classes(logits, self.own)
        return logits[:, None]

    def index(self, label: str) -> int:
        """Returns the row of the head that predicts a class."""
        return self.classes.index(label)
