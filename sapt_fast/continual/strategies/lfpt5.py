"""LFPT5: one adapter learns to solve tasks and to generate examples, and keeps its old answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
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

logger = logging.getLogger(__name__)

_GENERATE, _ANSWER = "__gen__", "__ans__"


@dataclass(frozen=True)
class Lfpt5Options:
    """Options of `Lfpt5`."""

    kl_share: float = field(default=0.01, metadata={"help": "k, weight of the divergence."})
    lm_weight: float = field(default=0.25, metadata={"help": "Weight of the generator's loss."})
    kl_sum: bool = field(
        default=False,
        metadata={"help": "Sum the divergence over tokens, as the authors' code does; or average."},
    )
    task_markers: bool = field(
        default=False,
        metadata={
            "help": "Generate from a marker of each task, with `__ans__` before the answer, as the "
            "authors' code does; or all tasks from `__gen__`, without `__ans__`."
        },
    )
    generate: bool = field(
        default=False,
        metadata={
            "help": "Let the adapter generate replay_share of each earlier task's rows, as in the "
            "paper; needs task_markers, and replay 'none'."
        },
    )
    top_k: int = field(
        default=20, metadata={"help": "Sample from this many of the most likely tokens."}
    )

    def __post_init__(self) -> None:
        require(self.top_k >= 1, "top_k", self.top_k, "at least 1")
        require(
            self.task_markers or not self.generate,
            "generate", True, "False without task_markers: it needs to know the task",
        )  # fmt: skip
        require(0 <= self.kl_share <= 1, "kl_share", self.kl_share, "a number in [0, 1]")
        require(self.lm_weight >= 0, "lm_weight", self.lm_weight, "at least 0")


class Lfpt5(Replay):
    """LFPT5 (Qin and Joty, ICLR 2022) of one adapter.

        L = (1 - k) (CE + 0.25 CE_LM) + k KL(p_old || p_new)

    - CE is the loss on the new task's examples and on the pseudo-samples of earlier tasks.
    - CE_LM is the loss of generating prompt and answer of both from the input `__gen__`; with
      `task_markers` from `__gen_<task>__`, with `__ans__` between prompt and answer.
    - The divergence is at the answer tokens of the pseudo-samples; p_old is the model before the
      new task. Ours is a mean over the tokens. The authors' code sums it (`kl_sum`), so its k of
      0.01 weighs the divergence by the number of tokens more; with `kl_sum`, k is theirs.

    The defaults differ from the paper, and options come nearer to it:

    - The setting `replay` names the pseudo-samples, and the old model answers those that have no
      output. With `generate`, the adapter writes both before the new task, `replay_share` of each
      earlier task's rows. What has no answer is dropped.
    - Markers are read as text; no token is added to the vocabulary.
    - The adapter is the configured one, while the paper uses a soft prompt.
    """

    Options: ClassVar[Any] = Lfpt5Options
    pseudo = True
    generates = True

    @classmethod
    def check(cls, settings: ContinualSettings) -> None:
        if not settings.strategy_options.get("generate"):
            require_pseudo_samples("lfpt5", settings)
        elif settings.replay != "none":
            raise ValueError(
                f"replay: got {settings.replay!r}, expected 'none' with generate=True: the adapter "
                "generates the samples"
            )

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        super().begin_task(task, learned)
        self._task = task.name
        self._old = OldModel(self) if learned else None

    def buffer(self, learned: Sequence[TaskData]) -> list[Example]:
        if self.options.generate:
            rows = [row for task in learned for row in self.generated(task, len(learned))]
        else:
            rows = answered(self, [row for task in learned for row in self.bench.kept(task)])
        self._owners = [row.task for row in rows]
        return rows

    def objective(self, step: Step) -> Tensor:
        k, lm = self.options.kl_share, self.options.lm_weight
        names = [self._task] * len(step.batch["input_ids"])
        loss = step.loss + lm * self.token_loss(self.generation(step.batch, names))
        batch = self.replayed(step.number)
        if batch is None or self._old is None:
            return (1 - k) * loss
        old, _ = self._old.token_logits(batch)
        new, labels = self.token_logits(batch)
        owners = [self._owners[i] for i in self.drawn(step.number)]
        generation = self.token_loss(self.generation(batch, owners))
        loss = loss + F.cross_entropy(new, labels) + lm * generation
        divergence = softened_kl(old, new) * (len(new) if self.options.kl_sum else 1)
        return (1 - k) * loss + k * divergence

    def generation(self, batch: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Returns a batch with markers as input and prompt and answer as targets.

        Args:
            batch: B examples.
            names: of their tasks.
        """
        tokenizer: Any = self.bench.tokenizer
        marked = self.options.task_markers
        middle = self._ids(_ANSWER) if marked else []
        rows = []
        for ids, mask, labels, name in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], names, strict=True
        ):
            start = self._start(name)
            seen = mask.bool()
            if self.bench.causal:
                answer = labels[seen] != LABEL_PADDING
                text = ids[seen][~answer].tolist() + middle + ids[seen][answer].tolist()
                unlabelled = [LABEL_PADDING] * len(start)
                rows.append({"input_ids": start + text, "labels": unlabelled + text})
                continue
            ends = torch.tensor([tokenizer.eos_token_id], device=ids.device)
            prompt = ids[seen & ~torch.isin(ids, ends)].tolist()
            target = prompt + middle + labels[labels != LABEL_PADDING].tolist()
            rows.append({"input_ids": [*start, tokenizer.eos_token_id], "labels": target})
        return self.bench.collate(rows)

    @torch.no_grad()
    def generated(self, task: TaskData, learned: int) -> list[Example]:
        """Samples pseudo-samples of an earlier task from the adapter; the unusable ones are lost.

        One is usable if it has a prompt, `__ans__` and an answer. It is at most as long as the
        task's longest row.

        Args:
            task: the earlier task.
            learned: the number of tasks that the adapter has learned; each draws anew.
        """
        bench = self.bench
        tokenizer: Any = bench.tokenizer
        count = max(1, int(bench.settings.replay_share * len(task.train)))
        longest = max(
            len(row["input_ids"]) + len(row["labels"]) for row in bench.encode(task.train)
        )
        end = [] if bench.causal else [tokenizer.eos_token_id]
        ids = torch.tensor([self._start(task.name) + end] * count, device=bench.device)
        self.model.eval()
        with torch.random.fork_rng([ids.device] if ids.is_cuda else []):
            torch.manual_seed(_seed(f"{bench.settings.seed}/{learned}/{task.name}/generate"))
            drawn: Tensor = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=longest + len(self._ids(_ANSWER)),
                do_sample=True,
                top_k=self.options.top_k,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = drawn[:, ids.shape[1] :] if bench.causal else drawn[:, 1:]
        found = [self._parsed(task.name, row) for row in new.tolist()]
        usable = [row for row in found if row is not None]
        if len(usable) < count:
            logger.warning("%s: %d of %d samples are usable", task.name, len(usable), count)
        return usable

    def _parsed(self, name: str, ids: list[int]) -> Example | None:
        tokenizer: Any = self.bench.tokenizer
        middle = self._ids(_ANSWER)
        places = range(len(ids) - len(middle) + 1)
        place = next((i for i in places if ids[i : i + len(middle)] == middle), None)
        if place is None:
            return None
        before, after = ids[:place], ids[place + len(middle) :]
        stop = tokenizer.eos_token_id
        after = after[: after.index(stop)] if stop in after else after
        prompt, output = (
            tokenizer.decode(part, skip_special_tokens=True).strip() for part in (before, after)
        )
        return Example(name, prompt, prompt, output, (output,)) if prompt and output else None

    def _start(self, name: str) -> list[int]:
        return self._ids(f"__gen_{name}__" if self.options.task_markers else _GENERATE)

    def _ids(self, text: str) -> list[int]:
        tokenizer: Any = self.bench.tokenizer
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _seed(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:4], "big")
