"""LwF: on the new task's inputs, the model is trained to keep its old predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from sapt_fast.continual.data.encoder import label_strings
from sapt_fast.continual.data.rows import TaskData
from sapt_fast.continual.objective import Step, supervised
from sapt_fast.continual.strategies.base import Strategy, require
from sapt_fast.continual.strategies.shared import SeqLora
from sapt_fast.continual.workbench import Workbench

__all__ = ["Lwf", "LwfOptions", "OldModel", "softened_kl"]


@dataclass(frozen=True)
class LwfOptions:
    """Options of `Lwf`."""

    strength: float = field(
        default=1.0, metadata={"help": "lambda, weight of the distillation; tune it on dev."}
    )
    temperature: float = field(default=2.0, metadata={"help": "T, temperature of the softmax."})
    squared_temperature: bool = field(
        default=True,
        metadata={"help": "Multiply the divergence by T^2; most implementations do not."},
    )
    old_classes: bool = field(
        default=False,
        metadata={
            "help": "Compare the predictions among the labels of earlier tasks alone, as the paper "
            "does; for encoders."
        },
    )

    def __post_init__(self) -> None:
        require(self.strength >= 0, "strength", self.strength, "at least 0")
        require(self.temperature > 0, "temperature", self.temperature, "a positive number")


class Lwf(SeqLora):
    """Learning without forgetting (Li and Hoiem, ECCV 2016) of one adapter.

        L = CE + lambda T^2 KL(p_old^T || p_new^T)

    p^T is the softmax of logits / T on the new task's inputs, at the answer tokens under teacher
    forcing. The divergence is averaged over the tokens of a micro-batch. The old model runs in
    addition to the new one, without dropout. The paper stores its predictions instead, which for a
    vocabulary would be far larger than the model.

    Both terms are means over tokens, and T^2 preserves the gradient's size, so lambda does not
    depend on batch size, length or width. At T = 1 the loss is smallest at
    (y + lambda p_old) / (1 + lambda). So for lambda of 1 (the paper's value and the default) or
    more, a confident old prediction outweighs the answer. If the new task has other answers than
    the old ones, smaller values learn more.

    The common form of the loss differs in two points, which are options. It has no T^2
    (`squared_temperature=False`): at T = 2 our lambda of 1 is a lambda of 4 there. And the softmax
    runs over the outputs of the earlier tasks alone (`old_classes=True`); ours runs over all of
    them, so it also holds down the new task's answers. A model that generates has one vocabulary
    for all tasks, so only an encoder has old classes.

    Raises:
        ValueError: if `old_classes` is True and the model is no encoder.
    """

    data = ("text",)
    Options = LwfOptions

    def __init__(self, bench: Workbench, options: LwfOptions) -> None:
        super().__init__(bench, options)
        require(
            not options.old_classes or bench.space is not None,
            "old_classes", True, "False for a model that generates: it has no classes",
        )  # fmt: skip

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        super().begin_task(task, learned)
        self._old = OldModel(self) if learned else None
        space = self.bench.space
        self._classes: list[int] | None = None
        if self.options.old_classes and space is not None:
            labels = dict.fromkeys(label for old in learned for label in label_strings(old))
            self._classes = [space.labels.index(label) for label in labels]

    def objective(self, step: Step) -> Tensor:
        if self._old is None:
            return step.loss
        new, _ = supervised(step.logits, step.batch["labels"], self.bench.causal)
        old, _ = self._old.token_logits(step.batch)
        if self._classes is not None:
            old, new = old[:, self._classes], new[:, self._classes]
        temperature = self.options.temperature
        divergence = softened_kl(old, new, temperature)
        if not self.options.squared_temperature:
            divergence = divergence / temperature**2
        return step.loss + self.options.strength * divergence


class OldModel:
    """The current state of a strategy's model: a copy of the parameters that will train."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.parameters = {name: p.detach().clone() for name, p in strategy.trained()}

    @torch.no_grad()
    def token_logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Computes `Strategy.token_logits` with the copy, without gradient and dropout."""
        model = self.strategy.model
        training = model.training
        model.eval()
        try:
            return self.strategy.token_logits(
                batch, lambda **inputs: functional_call(model, self.parameters, (), inputs)
            )
        finally:
            model.train(training)


def softened_kl(old: Tensor, new: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns T^2 KL(softmax(old / T) || softmax(new / T)), averaged over N logits [N, V]."""
    target = F.log_softmax(old / temperature, -1)
    prediction = F.log_softmax(new / temperature, -1)
    divergence = F.kl_div(prediction, target, reduction="batchmean", log_target=True)
    return temperature**2 * divergence
