"""Replay: trains on examples of earlier tasks again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from sapt_fast.continual.data.rows import Example, TaskData
from sapt_fast.continual.objective import Step
from sapt_fast.continual.reflection import RowStream
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.strategies.base import require
from sapt_fast.continual.strategies.shared import SeqLora

__all__ = ["BUFFERS", "Replay", "ReplayOptions"]

BUFFERS = ("share", "all", "balanced", "reservoir")


@dataclass(frozen=True)
class ReplayOptions:
    """Options of `Replay`."""

    buffer: str = field(
        default="share",
        metadata={
            "help": "Examples to keep: 'share' (replay_share of each task), 'all', or `size` "
            "examples in total: 'balanced' over the classes, or a 'reservoir' sample."
        },
    )
    size: int = field(
        default=200, metadata={"help": "Number of examples of a balanced buffer or reservoir."}
    )
    weight: float = field(default=1.0, metadata={"help": "Weight of the replayed loss."})
    batch_per_task: bool = field(
        default=False,
        metadata={
            "help": "Replay a batch for each earlier task, as SAPT's reflection loss does; "
            "otherwise one batch in all."
        },
    )

    def __post_init__(self) -> None:
        require(self.buffer in BUFFERS, "buffer", self.buffer, f"one of {', '.join(BUFFERS)}")
        require(self.size >= 1, "size", self.size, "at least 1")
        require(self.weight >= 0, "weight", self.weight, "at least 0")


class Replay(SeqLora):
    """One adapter, trained on the new task and on a buffer of earlier examples (experience replay).

        L = CE(new) + weight CE(buffer)

    Every micro-batch draws `replay_batch_size` examples (by default the batch size) from one buffer
    of all earlier tasks, in seeded permutations; with `batch_per_task`, as many for each earlier
    task, at most the whole buffer. A balanced buffer contains the same number of
    examples of each class. Classes are a task's outputs if it has labels; otherwise the task is one
    class. A reservoir is a uniform sample of all earlier examples (Vitter's algorithm R). Both are
    functions of the seed and the earlier tasks, so nothing is stored.
    """

    data = ("text",)
    Options: ClassVar[Any] = ReplayOptions

    @classmethod
    def check(cls, settings: ContinualSettings) -> None:
        if settings.replay != "real":
            raise ValueError(
                f"replay: got {settings.replay!r}, expected 'real' for strategy 'replay'; for "
                "pseudo-samples use strategy 'generative_replay'"
            )

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        rows = self.buffer(learned)
        super().begin_task(task, learned)
        self._rows = self.bench.encode(rows)
        self._batches = len(learned) if getattr(self.options, "batch_per_task", False) else 1
        self._stream = RowStream(len(rows), f"{self.bench.settings.seed}/{task.name}/buffer")

    def objective(self, step: Step) -> Tensor:
        batch = self.replayed(step.number)
        if batch is None:
            return step.loss
        return step.loss + self.options.weight * self.token_loss(batch)

    def replayed(self, number: int) -> dict[str, Tensor] | None:
        """Returns the batch that a micro-batch replays; None before the second task.

        Args:
            number: of the micro-batch, as in `Step`.
        """
        if not self._rows:
            return None
        return self.bench.collate([self._rows[i] for i in self.drawn(number)])

    def drawn(self, number: int) -> list[int]:
        """Returns the rows of the buffer that a micro-batch replays, by place."""
        settings = self.bench.settings
        size = self._batches * (settings.replay_batch_size or settings.batch_size)
        size = min(size, len(self._rows))
        return self._stream.batch(number, size)

    def buffer(self, learned: Sequence[TaskData]) -> list[Example]:
        """Returns the examples that are kept of the earlier tasks."""
        kind, size = self.options.buffer, self.options.size
        if kind == "share":
            return [row for task in learned for row in self.bench.kept(task)]
        rows = [row for task in learned for row in task.train]
        draw = random.Random(f"{self.bench.settings.seed}/{kind}")
        if kind == "reservoir":
            return _reservoir(rows, size, draw)
        return rows if kind == "all" else _balanced(learned, size, draw)


def _reservoir(rows: Sequence[Example], size: int, draw: random.Random) -> list[Example]:
    kept: list[Example] = []
    for number, row in enumerate(rows):
        if number < size:
            kept.append(row)
        elif (place := draw.randrange(number + 1)) < size:
            kept[place] = row
    return kept


def _balanced(learned: Sequence[TaskData], size: int, draw: random.Random) -> list[Example]:
    classes: dict[tuple[str, str], list[Example]] = {}
    for task in learned:
        for row in task.train:
            name = "" if task.labels is None else row.output
            classes.setdefault((task.name, name), []).append(row)
    queues = list(classes.values())
    for rows in queues:
        draw.shuffle(rows)
    # Rarest first: places that a small class does not use go to the larger ones.
    queues.sort(key=len)
    kept: list[Example] = []
    for index, rows in enumerate(queues):
        kept += rows[: (size - len(kept)) // (len(queues) - index)]
    return kept
