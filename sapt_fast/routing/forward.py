"""A forward of a patched model while it runs."""

import sys
from types import FrameType

from torch import Tensor, nn

from sapt_fast.routing.packing import Segments

# For each group of layers with one input: the input, its version, and the outputs of the layers
# that have not been called yet.
Waiting = dict[object, tuple[Tensor, int | None, dict[nn.Module, Tensor]]]


class Forward:
    """A forward in progress.

    Args:
        module: the module whose forward it is; None for the recomputation of a checkpoint.
        outer: the forward that it is part of.
        frame: the frame that runs it; None if it cannot be interrupted.

    Attributes:
        given: weights from the caller, which override the router's.
        weights: what its layers mix by: [B, K], [B, T, K], or [1, K] for all samples alike.
        per_row: the same with one row for each of the B rows of its input.
        segments: the texts of packed rows, if the weights are those of each text; or None.
        waiting: outputs of layers that were computed together with another layer.
        inserted: whether a prompt was inserted before its tokens and has to be removed again.
    """

    def __init__(
        self, module: nn.Module | None, outer: "Forward | None", frame: FrameType | None
    ) -> None:
        self.module = module
        self.outer = outer
        self.frame = frame
        self.given: Tensor | None = None
        self.weights: Tensor | None = None
        self.per_row: Tensor | None = None
        self.segments: Segments | None = None
        self.waiting: Waiting = {}
        self.inserted = False

    def interrupted(self) -> bool:
        """Returns whether its frame is gone from the stack although no hook has ended it.

        torch calls no hook after a KeyboardInterrupt, and a try block would have to be in a
        replacement of the model's `forward`, which accelerate wraps, so that it could not be
        removed again.
        """
        frame = None if self.frame is None else sys._getframe()
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not self.frame
