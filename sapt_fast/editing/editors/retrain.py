"""Retraining: the layer is trained on all edits so far, from the original weights, every time.

It bounds what fine-tuning of this layer can reach, at a cost that grows with the square of the
number of edits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sapt_fast.checks import require_count
from sapt_fast.editing.data import Tokens
from sapt_fast.editing.editors.base import MADE, Pair
from sapt_fast.editing.editors.finetune import WeightEditor
from sapt_fast.editing.editors.training import TrainingOptions, texts_of

__all__ = ["RetrainEditor", "RetrainOptions"]


@dataclass
class RetrainOptions(TrainingOptions):
    """How weights are trained on all edits so far."""

    steps: int = field(
        default=1000, metadata={"help": "The largest number of training steps, each time."}
    )
    train_batch: int = field(default=16, metadata={"help": "Edits in one training step."})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("train_batch", self.train_batch)


class RetrainEditor(WeightEditor):
    """Trains the layer on all edits so far; of equal prompts, on the last target.

    The batches are the edits in their order, without shuffling.
    """

    Options = RetrainOptions

    def __init__(self, model: Any, options: Any) -> None:
        super().__init__(model, options)
        self._pairs: dict[Tokens, Pair] = {}

    def edit(self, pairs: Sequence[Pair]) -> list[str]:
        """Trains the layer anew; if the loss is not finite, its weights are the original ones."""
        self._remember(pairs)
        self.put(self.original)
        everything, size = [*self._pairs.values()], self.options.train_batch
        batches = [everything[i : i + size] for i in range(0, len(everything), size)]
        texts = [texts_of(self.model, batch) for batch in batches]
        try:
            fits = self.fit(texts, self.options)
        except FloatingPointError as error:
            self.put(self.original)
            return [str(error)] * len(pairs)
        right = dict(zip(self._pairs, fits.tolist(), strict=True))
        failed = f"does not fit after {self.options.steps} steps"
        return [MADE if right[tuple(prompt.tolist())] else failed for prompt, _ in pairs]

    def restore(self, tensors: Mapping[str, Tensor], history: Sequence[Pair]) -> None:
        """Restores the weights, and the edits to train on."""
        super().restore(tensors, history)
        self._remember(history)

    def _remember(self, pairs: Sequence[Pair]) -> None:
        for prompt, target in pairs:
            self._pairs[tuple(prompt.tolist())] = (prompt, target)
