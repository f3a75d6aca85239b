"""A forward of a patched model while it runs."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, NamedTuple

from torch import Tensor, nn

from sapt_fast.routing.packing import Segments

# For each group of layers with one input: the input, its version, and the outputs of the layers
# that have not been called yet.
Waiting = dict[object, tuple[Tensor, int | None, dict[nn.Module, Tensor]]]


class Prompt(NamedTuple):
    """Where the prompt of each row ends.

    Attributes:
        first: [B] int64, the first token of the row that is no padding.
        last: [B] int64, the prompt's last token. Both count from the first token of the forward, so
            that they are negative for a token in the cache.
        length: tokens of the longest prompt, padding included.
        start: tokens in the cache.
        query: [B, D], what the prompts are looked up by; None if layers look up by their input.
        decided: what layers have decided about the prompts, [B, ...] by the layer's path, and what
            follows from that.
        tokens: T of the forward's input, which is that of the layers; None: not known.
        copies: rows per prompt, of which one is counted (beams have several); 0: none is counted.
    """

    first: Tensor
    last: Tensor
    length: int
    start: int
    query: Tensor | None
    decided: dict[str, Any]
    tokens: int | None = None
    copies: int = 0

    @property
    def is_read(self) -> bool:
        """Whether the forward reads tokens of the prompts."""
        return self.start < self.length

    def moved(self, start: int) -> Prompt:
        """The same prompts as a forward sees them that begins behind `start` tokens."""
        by = self.start - start
        return self._replace(first=self.first + by, last=self.last + by, start=start)


class Balance(NamedTuple):
    """The balance losses of a forward's gated layers.

    Attributes:
        tokens: [B, T], zero for tokens that do not count; None if all count.
        encoder_tokens: the same of an encoder's tokens; of a model without encoder, `tokens`.
        losses: one scalar for each call of a gated layer so far.
    """

    tokens: Tensor | None
    encoder_tokens: Tensor | None
    losses: list[Tensor]


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
        prompt_outputs: [B, P, D], the last layer's outputs of prompts in an image model.
        prompt: where its prompts end, for methods that decide by a prompt's last token.
        balance: what gated layers add to the loss of a forward that trains; or None.
    """

    def __init__(
        self, module: nn.Module | None, outer: Forward | None, frame: FrameType | None
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
        self.prompt_outputs: Tensor | None = None
        self.prompt: Prompt | None = None
        self.balance: Balance | None = None

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
