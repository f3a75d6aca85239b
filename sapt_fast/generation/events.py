"""What happens while an answer is written, and the answer."""

from dataclasses import dataclass, field
from typing import Literal

Mode = Literal["skeleton", "plain"]


@dataclass(frozen=True)
class SkeletonAnswer:
    """The answer to a question.

    Attributes:
        question: as it was asked.
        skeleton: the skeleton as the model wrote it; empty if none was asked for.
        points: title and text of each point, in the order of the skeleton. Empty in mode "plain".
        text: the whole answer.
        mode: "skeleton" if the points were written in parallel, "plain" for ordinary decoding.
        reason: why the mode is "plain"; empty otherwise.
        prefill_tokens: tokens of prompts that the model read; those in the shared prefix count
            once. For a server: tokens of the prompts as the server counts them.
        generated_tokens: tokens that were generated, those of the skeleton included.
        seconds: time of each stage, by the names "skeleton", "points" and "plain".
        notes: what was changed to make the answer possible, such as fewer points at a time.
        failed: for each point that a server did not answer, its index and the last error.
    """

    question: str
    skeleton: str
    points: tuple[tuple[str, str], ...]
    text: str
    mode: Mode
    reason: str = ""
    prefill_tokens: int = 0
    generated_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    failed: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class SkeletonToken:
    """A piece of the skeleton's text."""

    text: str


@dataclass(frozen=True)
class SkeletonDone:
    """The skeleton is complete.

    Attributes:
        points: the titles of its points.
    """

    points: tuple[str, ...]


@dataclass(frozen=True)
class PointToken:
    """A piece of a point's text.

    Attributes:
        index: of the point, from 0.
        text: what was added.
    """

    index: int
    text: str


@dataclass(frozen=True)
class PointDone:
    """A point is complete.

    Attributes:
        index: of the point, from 0.
        text: all of its text, without its title.
    """

    index: int
    text: str


@dataclass(frozen=True)
class PointRestarted:
    """A server did not complete a point, which begins again: its text so far is discarded.

    Attributes:
        index: of the point, from 0.
        error: why.
    """

    index: int
    error: str


@dataclass(frozen=True)
class PointFailed:
    """A server did not answer a point.

    Attributes:
        index: of the point, from 0.
        error: the error of the last try.
    """

    index: int
    error: str


@dataclass(frozen=True)
class PlainToken:
    """A piece of an answer that is written by ordinary decoding."""

    text: str


@dataclass(frozen=True)
class Done:
    """The answer is complete; the last event."""

    answer: SkeletonAnswer


Event = (
    SkeletonToken
    | SkeletonDone
    | PointToken
    | PointDone
    | PointRestarted
    | PointFailed
    | PlainToken
    | Done
)
