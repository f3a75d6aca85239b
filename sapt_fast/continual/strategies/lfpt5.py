"""LFPT5: one adapter learns to solve tasks and to generate examples, and keeps its old answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sapt_fast.continual.data.collate import LABEL_PADDING
from sapt_fast.continual.data.rows import Example, TaskData
from sapt_fast.continual.objective import Step
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.strategies.base import require
from sapt_fast.continual.strategies.generative_replay import answered, require_pseudo_samples
from sapt_fast.continual.strategies.lwf import OldModel, softened_kl
from sapt_fast.continual.strategies.replay import Replay

__all__ = ["Lfpt5", "Lfpt5Options"]

_GENERATE = "__gen__"


@dataclass(frozen=True)
class Lfpt5Options:
    """Options of `Lfpt5`."""

    kl_share: float = field(default=0.01, metadata={"help": "k, weight of the divergence."})
    lm_weight: float = field(default=0.25, metadata={"help": "Weight of the generator's loss."})

    def __post_init__(self) -> None:
        require(0 <= self.kl_share <= 1, "kl_share", self.kl_share, "a number in [0, 1]")
        require(self.lm_weight >= 0, "lm_weight", self.lm_weight, "at least 0")


class Lfpt5(Replay):
    """LFPT5 (Qin and Joty, ICLR 2022) of one adapter.

        L = (1 - k) (CE + 0.25 CE_LM) + k KL(p_old || p_new)

    - CE is the loss on the new task's examples and on the pseudo-samples of earlier tasks.
    - CE_LM is the loss of generating prompt and answer of both from the input `__gen__`.
    - The divergence is at the answer tokens of the pseudo-samples; p_old is the model before the
      new task.

    This class differs from the paper in three points:

    - The setting `replay` names the pseudo-samples; the adapter does not generate them. The old
      model answers those that have no output.
    - `__gen__` is read as text; no token is added.
    - The adapter is the configured one, while the paper uses a soft prompt.
    """

    Options: ClassVar[Any] = Lfpt5Options
    pseudo = True
    generates = True

    @classmethod
    def check(cls, settings: ContinualSettings) -> None:
        require_pseudo_samples("lfpt5", settings)

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        super().begin_task(task, learned)
        self._old = OldModel(self) if learned else None

    def buffer(self, learned: Sequence[TaskData]) -> list[Example]:
        return answered(self, [row for task in learned for row in self.bench.kept(task)])

    def objective(self, step: Step) -> Tensor:
        k, lm = self.options.kl_share, self.options.lm_weight
        loss = step.loss + lm * self.token_loss(self.generation(step.batch))
        batch = self.replayed(step.number)
        if batch is None or self._old is None:
            return (1 - k) * loss
        old, _ = self._old.token_logits(batch)
        new, labels = self.token_logits(batch)
        loss = loss + F.cross_entropy(new, labels) + lm * self.token_loss(self.generation(batch))
        return (1 - k) * loss + k * softened_kl(old, new)

    def generation(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns a batch with `__gen__` as input and prompt and answer as targets."""
        tokenizer: Any = self.bench.tokenizer
        start = list(tokenizer(_GENERATE, add_special_tokens=False)["input_ids"])
        rows = []
        for ids, mask, labels in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        ):
            seen = mask.bool()
            if self.bench.causal:
                text = ids[seen].tolist()
                unlabelled = [LABEL_PADDING] * len(start)
                rows.append({"input_ids": start + text, "labels": unlabelled + text})
                continue
            ends = torch.tensor([tokenizer.eos_token_id], device=ids.device)
            prompt = ids[seen & ~torch.isin(ids, ends)].tolist()
            target = prompt + labels[labels != LABEL_PADDING].tolist()
            rows.append({"input_ids": [*start, tokenizer.eos_token_id], "labels": target})
        return self.bench.collate(rows)
