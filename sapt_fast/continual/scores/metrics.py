"""Scores of predictions, and the continual-learning metrics of a score matrix.

Prediction scores follow the original SAPT code (circle-hit/SAPT `src/compute_metrics.py`). The
matrix metrics follow their definitions; variant "released" gives the arithmetic of its `score.py`.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "BENCHMARK_METRICS",
    "ContinualMetrics",
    "average_performance",
    "backward_transfer",
    "check_score_matrix",
    "continual_metrics",
    "exact_match",
    "forgetting_rate",
    "forward_transfer",
    "normalize_answer",
    "rouge_l",
    "score_predictions",
]

Metric = Literal["rouge_l", "exact_match"]
Variant = Literal["definition", "released"]

BENCHMARK_METRICS: dict[str, Metric] = {"SuperNI": "rouge_l", "Long_Sequence": "exact_match"}

# score.py subtracts it instead of the mean score of the tasks learned alone.
_RELEASED_ALONE_MEAN = 50.94

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class ContinualMetrics:
    """The four metrics, in the unit of the scores (percent here).

    Attributes:
        ap: average performance after the last task.
        forgetting: F.Ra, the mean fall from each earlier task's best score; nan for one task.
        fwt: forward transfer; nan if the scores of the tasks learned alone are not given.
        bwt: backward transfer; nan for one task.
    """

    ap: float
    forgetting: float
    fwt: float
    bwt: float

    def as_dict(self) -> dict[str, float]:
        """Returns the metrics by their names in the paper: AP, F.Ra, FWT and BWT."""
        return dict(zip(("AP", "F.Ra", "FWT", "BWT"), asdict(self).values(), strict=True))


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, white space squeezed to single blanks.

    Articles stay, unlike in SQuAD's normalisation.
    """
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def exact_match(prediction: str, references: str | Sequence[str]) -> float:
    """1.0 if the prediction equals one of the references after `normalize_answer`, else 0.0.

    Raises:
        TypeError: if `prediction` or a reference is not a string.
        ValueError: if there is no reference.
    """
    answer = normalize_answer(_text(prediction, "prediction"))
    return float(any(answer == normalize_answer(text) for text in _references(references)))


def rouge_l(prediction: str, references: str | Sequence[str]) -> float:
    """ROUGE-L F-measure in [0, 1], best over the references (rouge-score, Porter stemmer).

    Raises:
        ImportError: if rouge-score is not installed.
        TypeError: if `prediction` or a reference is not a string.
        ValueError: if there is no reference.
    """
    return _rouge_l_scorer()(prediction, references)


def score_predictions(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    metric: Metric,
) -> float:
    """Mean score of a task's predictions, in percent.

    Args:
        predictions: N decoded answers.
        references: N accepted outputs, each a string or a sequence of strings.
        metric: "rouge_l" (SuperNI) or "exact_match" (Long Sequence); see `BENCHMARK_METRICS`.

    Returns:
        100 times the mean over the N pairs of the best score over a pair's references.

    Raises:
        ImportError: if the metric is "rouge_l" and rouge-score is not installed.
        TypeError: if a prediction or reference is not a string.
        ValueError: if the metric is unknown, there are no predictions, the numbers differ, or a
            pair has no reference.

    Example:
        >>> score_predictions(["The cat.", "dog"], ["the cat", ["cow", "hen"]], "exact_match")
        50.0
    """
    if metric not in get_args(Metric):
        raise ValueError(f"metric: got {metric!r}, expected one of {', '.join(get_args(Metric))}")
    if isinstance(predictions, str) or isinstance(references, str):
        raise TypeError(
            "predictions, references: got a string, expected sequences with one entry per row"
        )
    if len(predictions) != len(references):
        raise ValueError(
            f"predictions, references: got {len(predictions)} and {len(references)} entries, "
            "expected the same number"
        )
    if not len(predictions):
        raise ValueError("predictions: got none, expected at least one")
    score = exact_match if metric == "exact_match" else _rouge_l_scorer()
    scores = [score(text, accepted) for text, accepted in zip(predictions, references, strict=True)]
    return 100.0 * math.fsum(scores) / len(scores)


def check_score_matrix(scores: ArrayLike) -> NDArray[np.float64]:
    """Checks a score matrix and converts it to float64.

    Args:
        scores: `[T, T]`, `scores[i][j]` on task j after learning task i, both in learning order.
            Above the diagonal are tasks not learned yet: a score, or nan if none was taken.

    Returns:
        A new `[T, T]` array.

    Raises:
        ValueError: if it is not square, empty, not numeric or infinite, or has nan on or below the
            diagonal.
    """
    try:
        matrix = np.array(scores, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"scores: expected a square matrix of numbers: {error}") from error
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"scores: got shape {list(matrix.shape)}, expected [T, T] with T >= 1")
    if np.isinf(matrix).any():
        row, column = np.argwhere(np.isinf(matrix))[0]
        raise ValueError(f"scores[{row}][{column}]: got {matrix[row, column]}, expected a number")
    missing = np.argwhere(np.isnan(np.tril(matrix)))
    if len(missing):
        row, column = missing[0]
        raise ValueError(
            f"scores[{row}][{column}]: got nan, expected a number, as task {column} was already "
            "learned; nan is for tasks above the diagonal only"
        )
    return matrix


def average_performance(scores: ArrayLike) -> float:
    """AP: mean over j of a[T, j]. `scores` as in `check_score_matrix`."""
    return float(check_score_matrix(scores)[-1].mean())


def forgetting_rate(scores: ArrayLike, *, variant: Variant = "definition") -> float:
    """F.Ra: mean over j < T of (max over k < T of a[k, j]) - a[T, j]; nan for one task.

    Scores taken before a task was learned count in the maximum; variant "released" counts them as
    0, as score.py does.
    """
    _check_variant(variant)
    matrix = check_score_matrix(scores)
    if len(matrix) == 1:
        return math.nan
    if variant == "released":
        matrix = np.tril(matrix)
    best = np.nanmax(matrix[:-1, :-1], axis=0)
    return float((best - matrix[-1, :-1]).mean())


def forward_transfer(
    scores: ArrayLike, alone: ArrayLike | None = None, *, variant: Variant = "definition"
) -> float:
    """FWT: mean over j of a[j, j] - a0[j], a0[j] being the score of task j learned alone.

    Args:
        scores: as in `check_score_matrix`.
        alone: `[T]` scores a0; None gives nan.
        variant: "released" subtracts the constant 50.94 of score.py instead and ignores `alone`.

    Raises:
        ValueError: if the matrix or the variant is not valid, or `alone` is not T finite numbers.
    """
    _check_variant(variant)
    matrix = check_score_matrix(scores)
    if variant == "released":
        return float(matrix.diagonal().mean() - _RELEASED_ALONE_MEAN)
    if alone is None:
        return math.nan
    try:
        base = np.array(alone, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"alone: expected {len(matrix)} numbers: {error}") from error
    if base.shape != (len(matrix),) or not np.isfinite(base).all():
        raise ValueError(
            f"alone: got shape {list(base.shape)}: {base.tolist()}, expected {len(matrix)} finite "
            "numbers, one per task"
        )
    return float((matrix.diagonal() - base).mean())


def backward_transfer(scores: ArrayLike, *, variant: Variant = "definition") -> float:
    """BWT: sum over j < T of a[T, j] - a[j, j], divided by T - 1; nan for one task.

    Variant "released" divides by T, as score.py does (0 for one task).
    """
    _check_variant(variant)
    matrix = check_score_matrix(scores)
    tasks = len(matrix)
    divisor = tasks if variant == "released" else tasks - 1
    if not divisor:
        return math.nan
    return float((matrix[-1] - matrix.diagonal())[:-1].sum() / divisor)


def continual_metrics(
    scores: ArrayLike, alone: ArrayLike | None = None, *, variant: Variant = "definition"
) -> ContinualMetrics:
    """All four metrics of a score matrix.

    Args:
        scores: `[T, T]` as in `check_score_matrix`; `scores[:t, :t]` gives the metrics after t
            tasks.
        alone: `[T]` scores of the tasks learned alone, for FWT.
        variant: "definition", or "released" for the arithmetic of the original score.py.

    Raises:
        ValueError: if the matrix, `alone` or the variant is not valid.

    Example:
        >>> continual_metrics([[80.0, 0.0], [60.0, 70.0]], alone=[80.0, 72.0]).as_dict()
        {'AP': 65.0, 'F.Ra': 20.0, 'FWT': -1.0, 'BWT': -20.0}
    """
    return ContinualMetrics(
        ap=average_performance(scores),
        forgetting=forgetting_rate(scores, variant=variant),
        fwt=forward_transfer(scores, alone, variant=variant),
        bwt=backward_transfer(scores, variant=variant),
    )


def _check_variant(variant: str) -> None:
    if variant not in get_args(Variant):
        raise ValueError(
            f"variant: got {variant!r}, expected one of {', '.join(get_args(Variant))}"
        )


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a string")
    return value


def _references(references: str | Sequence[str]) -> list[str]:
    texts = [references] if isinstance(references, str) else list(references)
    if not texts:
        raise ValueError("references: got none, expected at least one accepted output")
    return [_text(text, "references") for text in texts]


def _rouge_l_scorer() -> Callable[[str, str | Sequence[str]], float]:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE-L needs rouge-score: pip install rouge-score") from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)

    def score(prediction: str, references: str | Sequence[str]) -> float:
        text = _text(prediction, "prediction")
        return max(
            float(scorer.score(target=reference, prediction=text)["rougeL"].fmeasure)
            for reference in _references(references)
        )

    return score
