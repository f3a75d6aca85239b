"""L2P: every input selects prompts from one pool by their keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from sapt_fast.continual.data.rows import TaskData
from sapt_fast.continual.objective import Step
from sapt_fast.continual.strategies.base import Strategy, require
from sapt_fast.continual.strategies.prompts import prompt_fields
from sapt_fast.methods.l2p import L2pConfig
from sapt_fast.methods.task_config import TaskConfig

__all__ = ["L2p", "L2pOptions"]


@dataclass(frozen=True)
class L2pOptions:
    """Options of `L2p`."""

    prompts: int = field(default=10, metadata={"help": "M, number of prompts in the pool."})
    top: int = field(default=5, metadata={"help": "N, number of prompts per input."})
    length: int = field(default=5, metadata={"help": "L_p, number of rows of a prompt."})
    strength: float = field(
        default=0.1,
        metadata={"help": "lambda, weight of the loss that moves selected keys to their queries."},
    )
    diversified: bool = field(
        default=True,
        metadata={"help": "While training, prefer prompts that past tasks selected less often."},
    )

    def __post_init__(self) -> None:
        require(self.prompts >= 1, "prompts", self.prompts, "at least 1")
        require(1 <= self.top <= self.prompts, "top", self.top, f"1 to {self.prompts} (prompts)")
        require(self.length >= 1, "length", self.length, "at least 1")
        require(self.strength >= 0, "strength", self.strength, "at least 0")


class L2p(Strategy):
    """Learning to prompt (Wang et al., CVPR 2022), for text: `sapt_fast.methods.l2p.L2pHandle`.

        L = CE(y | [P_s1; ...; P_sN; x]) - lambda (1 / B) sum_b sum_i cos(q(x_b), k_si)

    All prompts and keys train in every task.
    """

    Options = L2pOptions
    options: L2pOptions

    def configure(self, config: TaskConfig[Any]) -> L2pConfig:
        return L2pConfig(**{**prompt_fields(config), **asdict(self.options)})

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        self.handle.grow("prompts")

    def objective(self, step: Step) -> Tensor:
        batch = step.batch
        labels = batch["labels"] if self.bench.causal else None
        pull: Tensor = self.handle.key_loss(batch["input_ids"], batch["attention_mask"], labels)
        return step.loss + pull

    def end_task(self, task: TaskData) -> None:
        inputs, size = self.bench.inputs(task.train), self.bench.settings.eval_batch_size
        starts = range(0, len(inputs), size)
        self.handle.count_picks(self.bench.pad(inputs[start : start + size]) for start in starts)
