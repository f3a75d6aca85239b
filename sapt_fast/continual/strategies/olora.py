"""O-LoRA: every task learns in a subspace orthogonal to those of the earlier tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sapt_fast.continual.data.rows import TaskData
from sapt_fast.continual.objective import Step
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.strategies.base import Strategy, require
from sapt_fast.methods.lora_sum import LoraSumConfig
from sapt_fast.methods.task_config import TaskConfig
from sapt_fast.pools.lora import AdapterPool

__all__ = ["OLora", "OLoraOptions", "overlap"]


@dataclass(frozen=True)
class OLoraOptions:
    """Options of `OLora`."""

    orthogonality: float = field(
        default=0.5, metadata={"help": "lambda_1, weight of the overlap; tune it on dev."}
    )
    norm: float = field(
        default=0.0, metadata={"help": "lambda_2, weight of the new adapter's norms."}
    )

    def __post_init__(self) -> None:
        require(self.orthogonality >= 0, "orthogonality", self.orthogonality, "at least 0")
        require(self.norm >= 0, "norm", self.norm, "at least 0")


class OLora(Strategy):
    """Orthogonal LoRA (Wang et al., Findings of EMNLP 2023), as in its authors' code.

        L = CE + lambda_1 sum_layers sum |A_past A_t^T| + lambda_2 sum_layers (|A_t|_2 + |B_t|_2)

    All adapters are summed for every input, y = W x + sum_{k<=t} (alpha / r) B_k A_k x; the past
    ones are frozen. The overlap is the sum of absolute values, not of squares. The authors' scripts
    have different values of lambda_2; we use 0.

    The overlap is a sum, not a mean: L layers and t - 1 tasks of rank r have L (t - 1) r^2 terms.
    The default lambda_1 is the authors' value for T5-Large and r = 8. Other models, ranks and
    numbers of tasks need another value.
    """

    Options = OLoraOptions

    @classmethod
    def check(cls, settings: ContinualSettings) -> None:
        kind = settings.sapt.adapter
        require(kind == "lora", "adapter", kind, "'lora', whose matrices become orthogonal")

    def configure(self, config: TaskConfig[Any]) -> LoraSumConfig:
        return LoraSumConfig(**config.to_dict())

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        self.handle.add_task(task.name)

    def objective(self, step: Step) -> Tensor:
        loss = step.loss + self.options.orthogonality * self.overlap()
        return loss + self.options.norm * self.norms() if self.options.norm else loss

    def overlap(self) -> Tensor:
        """Returns the sum over layers of sum |A_past A_t^T|, a scalar."""
        return overlap(self.handle.pools.values())

    def norms(self) -> Tensor:
        """Returns the sum over layers of |A_t|_2 + |B_t|_2 (Frobenius), a scalar."""
        pools = self.handle.pools.values()
        parts = [part.trainable.norm() for pool in pools for part in (pool.a, pool.b)]
        return torch.stack(parts).sum()


def overlap(pools: Iterable[AdapterPool]) -> Tensor:
    """Returns the sum over layers of sum |A_past A_t^T|, a scalar.

    Args:
        pools: of the layers.
    """
    parts = [(pool.a.frozen @ pool.a.trainable.T).abs().sum() for pool in pools]
    return torch.stack(parts).sum()
