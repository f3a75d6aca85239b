"""EWC: a penalty on changes of the parameters that matter for earlier tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from sapt_fast.continual.data.rows import Example, TaskData
from sapt_fast.continual.objective import Step
from sapt_fast.continual.strategies.base import require
from sapt_fast.continual.strategies.shared import SeqLora
from sapt_fast.continual.workbench import Workbench

__all__ = ["Ewc", "EwcOptions"]


@dataclass(frozen=True)
class EwcOptions:
    """Options of `Ewc`."""

    strength: float = field(
        default=100.0, metadata={"help": "lambda, weight of the penalty; tune it on dev."}
    )
    rows: int = field(
        default=64, metadata={"help": "Number of training examples for the Fisher information."}
    )

    def __post_init__(self) -> None:
        require(self.strength >= 0, "strength", self.strength, "at least 0")
        require(self.rows >= 1, "rows", self.rows, "at least 1")


class Ewc(SeqLora):
    """Elastic weight consolidation (Kirkpatrick et al., PNAS 2017) of one adapter.

        L = CE + (lambda / 2) sum_k sum_i F_ki (theta_i - theta*_ki)^2

    over earlier tasks k, where theta*_k is the adapter after task k. F_k is the diagonal of the
    empirical Fisher information: the squared gradient of log p(y | x), averaged over the task's
    first examples at theta*_k. log p is summed over the answer's tokens. The paper leaves open
    which answers to use; we use those of the examples.

    F_k has the scale of squared gradients: it grows with the answers' length, and is nearly zero
    for a task learned to a loss near zero. lambda has to compensate for this, by powers of ten.

    A sum of quadratics is one quadratic. So only that one is stored: F = sum F_k, its centre (the
    mean of theta*_k weighted by F_k), and a constant.
    """

    data = ("text",)
    Options = EwcOptions
    _fisher: dict[str, Tensor]
    _center: dict[str, Tensor]
    _constant: Tensor

    def __init__(self, bench: Workbench, options: EwcOptions) -> None:
        super().__init__(bench, options)
        self.load_state({})

    def objective(self, step: Step) -> Tensor:
        return step.loss + self.options.strength / 2 * self.penalty()

    def penalty(self) -> Tensor:
        """Returns sum_k sum_i F_ki (theta_i - theta*_ki)^2, a scalar."""
        total = self._constant
        for name, parameter in self.trained():
            if name in self._fisher:
                moved = parameter.float() - self._center[name]
                total = total + (self._fisher[name] * moved.square()).sum()
        return total

    def end_task(self, task: TaskData) -> None:
        for name, fisher in self.fisher(task.train[: self.options.rows]).items():
            here = self.model.get_parameter(name).detach().float()
            before = self._fisher.get(name, torch.zeros_like(fisher))
            center = self._center.get(name, here)
            total = fisher + before
            share = torch.where(total > 0, fisher / total, 0.0)
            self._constant = self._constant + (before * share * (here - center).square()).sum()
            self._center[name] = center + share * (here - center)
            self._fisher[name] = total

    def fisher(self, rows: Sequence[Example]) -> dict[str, Tensor]:
        """Returns the diagonal of the empirical Fisher information.

        Args:
            rows: training examples.

        Returns:
            By parameter name, a float32 tensor of the parameter's shape.
        """
        names, parameters = zip(*self.trained(), strict=True)
        total = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        self.model.eval()
        for row in self.bench.encode(rows):
            logits, labels = self.token_logits(self.bench.collate([row]))
            loss = F.cross_entropy(logits, labels, reduction="sum")
            for sum_, gradient in zip(total, torch.autograd.grad(loss, parameters), strict=True):
                sum_ += gradient.float().square()
        return {name: sum_ / len(rows) for name, sum_ in zip(names, total, strict=True)}

    def state(self) -> dict[str, Tensor]:
        fisher = {f"fisher.{name}": tensor for name, tensor in self._fisher.items()}
        center = {f"center.{name}": tensor for name, tensor in self._center.items()}
        return {**fisher, **center, "constant": self._constant}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        state = {name: tensor.to(self.bench.device) for name, tensor in state.items()}
        self._constant = state.get("constant", torch.zeros((), device=self.bench.device))
        self._fisher = _under("fisher.", state)
        self._center = _under("center.", state)


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
