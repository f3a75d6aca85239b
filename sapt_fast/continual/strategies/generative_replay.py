"""Generative replay: trains on pseudo-samples of earlier tasks, with the old model's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from sapt_fast.continual.data.rows import Example, TaskData
from sapt_fast.continual.run.evaluate import answers
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.strategies.base import Strategy, require
from sapt_fast.continual.strategies.replay import Replay

__all__ = ["GenerativeReplay", "GenerativeReplayOptions", "answered", "require_pseudo_samples"]


@dataclass(frozen=True)
class GenerativeReplayOptions:
    """Options of `GenerativeReplay`."""

    weight: float = field(default=1.0, metadata={"help": "Weight of the replayed loss."})

    def __post_init__(self) -> None:
        require(self.weight >= 0, "weight", self.weight, "at least 0")


class GenerativeReplay(Replay):
    """Replay on generated samples (Shin et al., NeurIPS 2017).

        L = CE(new) + weight CE(pseudo-samples of all earlier tasks)

    The setting `replay` names the samples. As in the paper, the old model answers them: if a sample
    has no output, it gets the greedy answer of the model before the new task. An output that was
    generated with the input is kept.
    """

    Options: ClassVar[Any] = GenerativeReplayOptions
    pseudo = True

    @classmethod
    def check(cls, settings: ContinualSettings) -> None:
        require_pseudo_samples("generative_replay", settings)

    def buffer(self, learned: Sequence[TaskData]) -> list[Example]:
        return answered(self, [row for task in learned for row in self.bench.kept(task)])


def require_pseudo_samples(strategy: str, settings: ContinualSettings) -> None:
    """Raises ValueError if settings.replay names no pseudo-samples."""
    if settings.replay in ("real", "none"):
        raise ValueError(
            f"replay: got {settings.replay!r}, expected pseudo-samples for strategy {strategy!r}"
        )


def answered(strategy: Strategy, rows: Sequence[Example]) -> list[Example]:
    """Returns the examples; those without an output get the model's current answer."""
    open_rows = [row for row in rows if not row.output]
    if not open_rows:
        return list(rows)
    bench = strategy.bench
    made = answers(
        bench.model, bench.tokenizer, open_rows, bench.settings, strategy.mixture, bench.space
    )
    texts = iter(made)
    return [row if row.output else replace(row, output=next(texts)) for row in rows]
