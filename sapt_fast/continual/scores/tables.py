"""The score matrix of a run with its metrics, as a `rich` table and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from sapt_fast.continual.scores.metrics import (
    ContinualMetrics,
    check_score_matrix,
    continual_metrics,
)

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "markdown_table",
    "matrix_markdown",
    "results_markdown",
    "results_table",
    "short_name",
]


def results_table(
    tasks: Sequence[str],
    scores: ArrayLike,
    alone: ArrayLike | None = None,
    *,
    title: str = "Score on each task (column) after learning a task (row)",
    metrics: ContinualMetrics | None = None,
) -> Table:
    """Makes a `rich` table of the score matrix and its metrics.

    Args:
        tasks: T task names in learning order.
        scores: `[T, T]` as in `metrics.check_score_matrix`.
        alone: `[T]` scores of the tasks learned alone; adds a row.
        title: the heading; the caption has the metrics.
        metrics: shown instead of those of `scores`, if some are not defined.

    Raises:
        ImportError: if rich is not installed.
        ValueError: if the matrix is not valid, or has another number of tasks than `tasks`.
    """
    header, rows, computed = _cells(tasks, scores, alone)
    metrics = computed if metrics is None else metrics
    try:
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise ImportError("tables need rich: pip install rich") from error

    caption = "  ".join(f"{name} {_number(value)}" for name, value in metrics.as_dict().items())
    table = Table(title=Text(title), caption=Text(caption))
    table.add_column(header[0])
    for name in header[1:]:
        table.add_column(Text(name), justify="right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def results_markdown(
    tasks: Sequence[str],
    scores: ArrayLike,
    alone: ArrayLike | None = None,
    *,
    title: str = "Results",
    metrics: ContinualMetrics | None = None,
) -> str:
    """Formats the metrics and the score matrix as Markdown; arguments and errors as in
    `results_table`."""
    _, _, computed = _cells(tasks, scores, alone)
    named = (computed if metrics is None else metrics).as_dict()
    summary = markdown_table(list(named), [[_number(value) for value in named.values()]])
    return (
        f"# {title}\n\n{summary}\n\nScore on each task (column) after learning a task (row):\n\n"
        f"{matrix_markdown(tasks, scores, alone)}\n"
    )


def matrix_markdown(tasks: Sequence[str], scores: ArrayLike, alone: ArrayLike | None = None) -> str:
    """Formats the score matrix as a Markdown table; arguments and errors as in `results_table`."""
    header, rows, _ = _cells(tasks, scores, alone)
    return markdown_table(header, rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a Markdown table; `|` in cells is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _cells(
    tasks: Sequence[str], scores: ArrayLike, alone: ArrayLike | None
) -> tuple[list[str], list[list[str]], ContinualMetrics]:
    matrix = check_score_matrix(scores)
    if isinstance(tasks, str) or len(tasks) != len(matrix):
        raise ValueError(
            f"tasks: got {tasks!r}, expected {len(matrix)} names, one per row of scores"
        )
    metrics = continual_metrics(matrix, alone)
    rows = [
        [name, *(_number(value) for value in row)] for name, row in zip(tasks, matrix, strict=True)
    ]
    if alone is not None:
        rows.append(["learned alone", *(_number(value) for value in np.array(alone, dtype=float))])
    return ["after", *(short_name(task) for task in tasks)], rows, metrics


def short_name(task: str) -> str:
    """Returns a task's name, cut to 22 characters for headings."""
    return task if len(task) <= 22 else f"{task[:21]}…"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
