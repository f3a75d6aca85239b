"""What every router returns, and what it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

__all__ = ["Decision", "Router", "require_question"]


@dataclass(frozen=True)
class Decision:
    """A router's answer for one question.

    Attributes:
        skeleton: whether Skeleton-of-Thought suits the question.
        score: the probability that it suits, in [0, 1]; None if the router has none.
        reason: why, for people.
    """

    skeleton: bool
    score: float | None
    reason: str


@runtime_checkable
class Router(Protocol):
    """Decides for each question whether its answer is written as independent points."""

    def decide(self, question: str) -> Decision:
        """Returns the decision for one question.

        Raises:
            ValueError: if the question is empty.
        """


def require_question(question: Any) -> None:
    """Raises TypeError unless the question is a string, and ValueError if it is blank."""
    if not isinstance(question, str):
        raise TypeError(f"question: got {type(question).__name__}, expected text")
    if not question.strip():
        raise ValueError(f"question: got {question[:20]!r}, expected text")
