"""How methods of continual learning share adapters between tasks.

A strategy says which adapter a task trains and what of the earlier tasks is replayed; model,
trainer and loop are the same for all. To add one, subclass `Strategy` and name it in `STRATEGIES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sapt_fast.continual.collate import pad_rows
from sapt_fast.continual.trainer import Replay

__all__ = ["STRATEGIES", "Learned", "Strategy"]

_ROWS_FOR_KEY = 64


class Learned(NamedTuple):
    """An earlier task: its name and the inputs that are kept of it, as token ids."""

    name: str
    inputs: Sequence[Sequence[int]]


class Strategy:
    """What one method does differently.

    Attributes:
        alone: every task starts from the base model and is scored on itself only.
        replays: inputs of earlier tasks are kept for it.
    """

    alone = False
    replays = False

    def begin_task(
        self, model: Any, name: str, inputs: Sequence[Sequence[int]], padding: int
    ) -> None:
        """Readies a patched model for training on a task.

        Args:
            name: of the task.
            inputs: token ids of the task's training prompts.
            padding: the id that pads them.
        """
        raise NotImplementedError

    def replay(self, model: Any, learned: Sequence[Learned]) -> list[Replay]:
        """What the trainer replays beside the task that `begin_task` began."""
        return []


class Sapt(Strategy):
    """SAPT: an adapter and a key for each task, routing held in place by the reflection loss."""

    replays = True

    def begin_task(
        self, model: Any, name: str, inputs: Sequence[Sequence[int]], padding: int
    ) -> None:
        model.sapt.add_task(name)
        if model.sapt.config.key_init == "mean_query":
            ids, mask = pad_rows(inputs[:_ROWS_FOR_KEY], padding)
            device = model.get_input_embeddings().weight.device
            model.sapt.init_key(ids.to(device), mask.to(device))

    def replay(self, model: Any, learned: Sequence[Learned]) -> list[Replay]:
        targets = model.sapt.targets
        return [Replay(task.name, task.inputs, targets[task.name]) for task in learned]


class SeqLora(Strategy):
    """One LoRA fine-tuned on every task in turn; with a single key its weight is always one."""

    adapter = "shared"

    def begin_task(
        self, model: Any, name: str, inputs: Sequence[Sequence[int]], padding: int
    ) -> None:
        if not model.sapt.tasks:
            model.sapt.add_task(self.adapter)


class Single(Strategy):
    """Every task alone on the base model: the reference for forward transfer."""

    alone = True

    def begin_task(
        self, model: Any, name: str, inputs: Sequence[Sequence[int]], padding: int
    ) -> None:
        model.sapt.add_task(name)


STRATEGIES: dict[str, type[Strategy]] = {"sapt": Sapt, "seqlora": SeqLora, "single": Single}
