"""UltraEdit: changes weights in closed form, without training.

Gu et al., "UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Language Models",
arXiv 2505.14679. h [R, I] are the layer's inputs and g [R, O] the gradients of the loss at its
outputs, at the R tokens that predict the targets of a batch. A running mean and deviation over all
edits so far standardises [h, g] to [h', g']. Then

    v = -learning_rate · |h'|^2 · g'        dW = (h^T h + I)^-1 h^T v

As in the released code, the solve takes h, not h'. Layers that do not predict the target's tokens
one by one (an encoder's) give a row for each token of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sapt_fast.checks import require_number
from sapt_fast.editing.editors.base import MADE, Pair
from sapt_fast.editing.editors.finetune import WeightEditor
from sapt_fast.editing.editors.training import only_training, texts_of
from sapt_fast.methods.edits.fitting import gives, losses_of
from sapt_fast.methods.edits.sites import in_decoder, widths_of

__all__ = ["RunningStatistics", "UltraEditEditor", "UltraEditOptions"]


@dataclass
class UltraEditOptions:
    """Which layers to edit, and how much."""

    target_modules: tuple[str, ...] | list[str] | str | None = field(
        default=None, metadata={"help": "The layers to edit; None: the one that GRACE edits."}
    )
    learning_rate: float = field(
        default=1e-3,
        metadata={"help": "Scale of an edit's change. The released code: 1e-6, for many layers."},
    )

    def __post_init__(self) -> None:
        require_number("learning_rate", self.learning_rate, positive=True)


class RunningStatistics:
    """Mean and deviation of all rows so far, by Welford's update.

    Attributes:
        count: [] float64, the number of rows.
        mean: [D] float64.
        squares: [D] float64, the sum of squared distances to the mean.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.squares = torch.zeros(width, dtype=torch.float64, device=device)

    def update(self, rows: Tensor) -> None:
        """Adds rows [R, D]."""
        rows = rows.double()
        total = self.count + rows.shape[0]
        mean = rows.mean(0)
        delta = mean - self.mean
        self.squares = (
            self.squares
            + (rows - mean).square().sum(0)
            + delta.square() * self.count * rows.shape[0] / total
        )
        self.mean = self.mean + delta * rows.shape[0] / total
        self.count = total

    def standardised(self, rows: Tensor) -> Tensor:
        """Returns rows [R, D] less the mean, by the deviation."""
        deviation = (self.squares / (self.count - 1).clamp(min=1)).sqrt()
        return ((rows.double() - self.mean) / (deviation + 1e-8)).to(rows.dtype)


class UltraEditEditor(WeightEditor):
    """Changes the layers' weights by one linear solve for each batch."""

    Options = UltraEditOptions

    def __init__(self, model: Any, options: Any) -> None:
        super().__init__(model, options)
        self.statistics = {
            path: RunningStatistics(sum(self._widths(path)), weight.device)
            for path, weight in self.weights.items()
        }

    def edit(self, pairs: Sequence[Pair]) -> list[str]:
        """Changes the weights; a target that the model then does not give is reported."""
        rows = [self._rows(*pair) for pair in pairs]
        for path, weight in self.weights.items():
            h = torch.cat([found[path][0] for found in rows])
            g = torch.cat([found[path][1] for found in rows])
            shift = self._shift(path, h, g)
            with torch.no_grad():
                is_conv1d = hasattr(self.model.get_submodule(path), "nf")
                weight.add_((shift if is_conv1d else shift.t()).to(weight.dtype))
        texts = texts_of(self.model, pairs)
        with torch.no_grad():
            fits = gives(texts.whole(), texts.labels, 0.0).tolist()
        return [MADE if fit else "does not fit after one solve" for fit in fits]

    def _shift(self, path: str, h: Tensor, g: Tensor) -> Tensor:
        """Returns the change of a layer's weight, [I, O], for h [R, I] and g [R, O]."""
        statistics, both = self.statistics[path], torch.cat([h, g], 1)
        statistics.update(both)
        h_hat, g_hat = statistics.standardised(both).split(list(self._widths(path)), 1)
        v = -self.options.learning_rate * h_hat.square().sum(1, keepdim=True) * g_hat
        gram = h.t() @ h + torch.eye(h.shape[1], device=h.device)
        return torch.linalg.solve(gram, h.t() @ v)

    def _rows(self, prompt: Tensor, target: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns h and g of one pair, by the layer's path."""
        texts = texts_of(self.model, [(prompt, target)])
        with only_training(self.model, [*self.weights.values()]), torch.enable_grad():
            with self._watching() as seen:
                loss = losses_of(texts.whole(), texts.labels).sum()
            outputs = [output for _, output in seen.values()]
            gradients = torch.autograd.grad(loss, outputs)
        rows = {}
        for (path, (x, _)), gradient in zip(seen.items(), gradients, strict=True):
            predicts = texts.kind == "causal" or in_decoder(self.model, path)
            count = texts.labels.shape[1] if predicts else x.shape[1]
            rows[path] = (x[0, -count:].detach().float(), gradient[0, -count:].float())
        return rows

    @contextmanager
    def _watching(self) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Yields the layers' inputs and outputs [1, S, .] of the forward within, by path."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def watch(path: str) -> Any:
            return lambda layer, args, output: seen.update({path: (args[0], output)})

        hooks = [self.model.get_submodule(p).register_forward_hook(watch(p)) for p in self.paths]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def _widths(self, path: str) -> tuple[int, int]:
        return widths_of(self.model.get_submodule(path), path)

    def state(self) -> dict[str, Tensor]:
        """Returns the weights and the statistics."""
        tensors = super().state()
        for path, statistics in self.statistics.items():
            tensors |= {f"{path}:{name}": value for name, value in vars(statistics).items()}
        return tensors

    def restore(self, tensors: Mapping[str, Tensor], history: Sequence[Pair]) -> None:
        """Restores the weights and the statistics."""
        for name, held in self.state().items():
            if name not in tensors or tensors[name].shape != held.shape:
                raise ValueError(f"tensors: expected {name} of shape {tuple(held.shape)}")
        super().restore(tensors, history)
        for path, statistics in self.statistics.items():
            for name, held in vars(statistics).items():
                setattr(statistics, name, tensors[f"{path}:{name}"].to(held))
