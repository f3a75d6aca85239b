"""How often a router is right, and the threshold for a rate of false positives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sapt_fast.checks import require_number

__all__ = ["Confusion", "choose_threshold"]


@dataclass(frozen=True)
class Confusion:
    """Counts of questions by label and decision; "positive" is Skeleton-of-Thought.

    Attributes:
        true_positives, false_positives, true_negatives, false_negatives: numbers of questions.
    """

    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int

    @classmethod
    def of(cls, scores: Sequence[float], labels: Sequence[int], threshold: float) -> Confusion:
        """Counts the questions of which the score is above the threshold."""
        pairs = [
            (score > threshold, bool(label)) for score, label in zip(scores, labels, strict=True)
        ]
        return cls(
            pairs.count((True, True)),
            pairs.count((True, False)),
            pairs.count((False, False)),
            pairs.count((False, True)),
        )

    def rates(self) -> dict[str, float | None]:
        """Returns accuracy, false_positive_rate, false_negative_rate, precision, recall and F1.

        A rate of nothing (such as precision without a positive decision) is None.
        """
        tp, fp, tn, fn = (
            self.true_positives, self.false_positives, self.true_negatives, self.false_negatives,
        )  # fmt: skip

        def rate(part: int, whole: int) -> float | None:
            return part / whole if whole else None

        return {
            "accuracy": rate(tp + tn, tp + fp + tn + fn),
            "false_positive_rate": rate(fp, fp + tn),
            "false_negative_rate": rate(fn, fn + tp),
            "precision": rate(tp, tp + fp),
            "recall": rate(tp, tp + fn),
            "f1": rate(2 * tp, 2 * tp + fp + fn),
        }


def choose_threshold(scores: Sequence[float], labels: Sequence[int], rate: float) -> float:
    """Returns the lowest threshold with at most this rate of false positives.

    A question is a positive if its score is above the threshold. The threshold is halfway between
    two scores, so that rounding changes no decision.

    Args:
        scores: in [0, 1].
        labels: 0 or 1 for each score.
        rate: the largest share of questions with label 0 that may be positives, in [0, 1].

    Raises:
        ValueError: if the rate is not in [0, 1], or no question has label 0.
    """
    require_number("false_positive_rate", rate, most=1.0)
    negatives = sorted(
        (score for score, label in zip(scores, labels, strict=True) if not label), reverse=True
    )
    if not negatives:
        raise ValueError("threshold: 'auto' needs questions with label 0, and there is none")
    allowed = math.floor(rate * len(negatives) + 1e-9)  # 0.29 * 100 is below 29
    if allowed >= len(negatives):
        return 0.0
    highest = negatives[allowed]  # the first score that is refused
    return (highest + min((score for score in scores if score > highest), default=1.0)) / 2
