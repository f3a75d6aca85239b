"""The stages of an answer, whatever writes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from typing import NamedTuple

from sapt_fast.generation.events import (
    Done,
    Event,
    PlainToken,
    SkeletonAnswer,
    SkeletonDone,
    SkeletonToken,
)
from sapt_fast.generation.points import parse_points
from sapt_fast.generation.prompts import opening
from sapt_fast.generation.settings import SkeletonSettings


class Written(NamedTuple):
    """A text that was written alone.

    Attributes:
        text: the text, with its opening.
        complete: whether it ended by itself.
    """

    text: str
    complete: bool


class Answering(ABC):
    """One answer to a question.

    Args:
        question: the question.
        settings: the settings.

    Attributes:
        notes: as in `SkeletonAnswer`, like those that follow.
        seconds: time of each stage.
        failed: points that were not answered.
    """

    def __init__(self, question: str, settings: SkeletonSettings) -> None:
        self.question = question
        self.settings = settings
        self.notes: list[str] = []
        self.seconds: dict[str, float] = {}
        self.failed: dict[int, str] = {}

    @abstractmethod
    def write_skeleton(self) -> Generator[str, None, Written]:
        """Writes the skeleton; yields its text piece by piece."""

    @abstractmethod
    def write_points(
        self, skeleton: str, titles: list[str], openings: list[str]
    ) -> Generator[Event, None, list[str]]:
        """Writes the points; returns the text of each, without its opening."""

    @abstractmethod
    def write_plain(self) -> Generator[str, None, Written]:
        """Writes the whole answer; yields its text piece by piece."""

    @abstractmethod
    def counts(self) -> tuple[int, int]:
        """Returns the tokens of prompts that were read, and those that were generated."""

    def plain(self, reason: str, skeleton: str = "") -> Iterator[Event]:
        """Answers by ordinary decoding.

        Args:
            reason: why.
            skeleton: that had no points.
        """
        answer = yield from _wrapped(PlainToken, self.write_plain())
        yield self._done(answer.text.strip(), skeleton, reason=reason)

    def skeleton(self) -> Iterator[Event]:
        """Answers in points."""
        prompts, most = self.settings.prompts, self.settings.max_points
        skeleton = yield from _wrapped(SkeletonToken, self.write_skeleton())
        titles = parse_points(skeleton.text, complete=skeleton.complete)
        text = skeleton.text.rstrip()
        if len(titles) > most:
            self.notes.append(f"max_points: the skeleton has {len(titles)}, of which {most} count")
            titles = titles[:most]
        yield SkeletonDone(tuple(titles))
        if len(titles) < 2:
            yield from self.plain(f"the skeleton has {'one' if titles else 'no'} point", text)
            return
        openings = [opening(prompts, number, title) for number, title in enumerate(titles, 1)]
        texts = yield from self.write_points(text, titles, openings)
        joined = prompts.separator.join(
            (begin + point).strip() for begin, point in zip(openings, texts, strict=True)
        )
        yield self._done(joined, text, tuple(zip(titles, texts, strict=True)))

    def _done(
        self,
        text: str,
        skeleton: str,
        points: tuple[tuple[str, str], ...] = (),
        reason: str = "",
    ) -> Done:
        prefill, generated = self.counts()
        return Done(
            SkeletonAnswer(
                question=self.question,
                skeleton=skeleton,
                points=points,
                text=text,
                mode="skeleton" if points else "plain",
                reason=reason,
                prefill_tokens=prefill,
                generated_tokens=generated,
                seconds=dict(self.seconds),
                notes=tuple(self.notes),
                failed=tuple(sorted(self.failed.items())),
            )
        )


def _wrapped(
    kind: type[PlainToken] | type[SkeletonToken], pieces: Generator[str, None, Written]
) -> Generator[Event, None, Written]:
    """Yields an event for each piece; returns what the generator of pieces returns."""
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            written: Written = end.value
            return written
        if piece:
            yield kind(piece)
