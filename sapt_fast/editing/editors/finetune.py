"""Fine-tuning of the layer that GRACE edits, alone or with a penalty on leaving its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.checks import require_number
from sapt_fast.editing.editors.base import MADE, Editor, Pair
from sapt_fast.editing.editors.training import TrainingOptions, texts_of, train
from sapt_fast.methods.edits.sites import default_targets
from sapt_fast.methods.edits.texts import EditTexts
from sapt_fast.sites.output import find_outputs

__all__ = ["FineTuneEditor", "FineTuneL2Editor", "FineTuneL2Options", "WeightEditor"]


class WeightEditor(Editor):
    """A method that changes the weights of some layers; biases stay.

    Attributes:
        paths: the layers' paths, in the order of the model.
        weights: their weights, by path.
        original: copies of them from before the first edit, by path.
    """

    def __init__(self, model: Any, options: Any) -> None:
        super().__init__(model, options)
        targets = options.target_modules
        self.paths = find_outputs(
            model, default_targets(model) if targets is None else targets
        ).patched
        self.weights: dict[str, nn.Parameter] = {}
        for path in self.paths:
            weight = getattr(model.get_submodule(path), "weight", None)
            if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
                raise ValueError(f"target_modules: {path} has no floating-point weight to train")
            self.weights[path] = weight
        self.original = {path: weight.detach().clone() for path, weight in self.weights.items()}

    def state(self) -> dict[str, Tensor]:
        """Returns the weights."""
        return {f"{path}.weight": weight.detach() for path, weight in self.weights.items()}

    def restore(self, tensors: Mapping[str, Tensor], history: Sequence[Pair]) -> None:
        """Restores the weights."""
        for name, held in self.state().items():
            if name not in tensors or tensors[name].shape != held.shape:
                raise ValueError(f"tensors: expected {name} of shape {tuple(held.shape)}")
        self.put({path: tensors[f"{path}.weight"] for path in self.weights})

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Sets the weights."""
        for path, weight in self.weights.items():
            weight.copy_(weights[path])

    def close(self) -> None:
        """Restores the weights from before the first edit."""
        self.put(self.original)

    def fit(
        self, batches: Sequence[EditTexts], options: TrainingOptions, penalty: Any = None
    ) -> Tensor:
        """Trains the weights: [N] bool, which targets the model gives; errors as `train`."""
        return train(
            self.model, [*self.weights.values()], batches, options, penalty, lowest=self.paths[0]
        )


class FineTuneEditor(WeightEditor):
    """Trains the layer on the edits of the batch, from the weights that the edits so far left."""

    Options = TrainingOptions

    def edit(self, pairs: Sequence[Pair]) -> list[str]:
        """Trains the layer; after a loss that is not finite, its weights are as before."""
        before = {path: weight.detach().clone() for path, weight in self.weights.items()}
        try:
            fits = self.fit([texts_of(self.model, pairs)], self.options, self.penalty())
        except FloatingPointError as error:
            self.put(before)
            return [str(error)] * len(pairs)
        return [
            MADE if fit else f"does not fit after {self.options.steps} steps"
            for fit in fits.tolist()
        ]

    def penalty(self) -> Any:
        """Returns the term to add to the loss, as a function; None for none."""
        return None


@dataclass
class FineTuneL2Options(TrainingOptions):
    """How weights are trained, and held to the original ones."""

    strength: float = field(
        default=0.1, metadata={"help": "Factor of the squared distance to the original weights."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("strength", self.strength)


class FineTuneL2Editor(FineTuneEditor):
    """Fine-tuning whose loss has the term strength * |W - W_0|^2, W_0 from before all edits."""

    Options = FineTuneL2Options

    def penalty(self) -> Any:
        """Returns the distance to the original weights."""

        def distance() -> Tensor:
            parts = [(w - self.original[path]).square().sum() for path, w in self.weights.items()]
            return self.options.strength * torch.stack(parts).sum()

        return distance
