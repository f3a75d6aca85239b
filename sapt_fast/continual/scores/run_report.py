"""What a continual run leaves to look at: attention heat maps, a table, JSON and Markdown."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sapt_fast.continual.scores.metrics import (
    ContinualMetrics,
    check_score_matrix,
    continual_metrics,
)
from sapt_fast.files.directories import atomic_write_bytes, atomic_write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

__all__ = [
    "attention_heat_map",
    "markdown_table",
    "matrix_markdown",
    "results_markdown",
    "results_table",
    "write_attention_heat_map",
    "write_json",
    "write_report",
]

# Cells are numbered up to this many adapters; beyond it the figures would overlap.
_MAX_NUMBERED = 16


def attention_heat_map(
    tasks: Sequence[str],
    *,
    training: ArrayLike | None = None,
    testing: ArrayLike | None = None,
) -> Figure:
    """Mean attention of every task's inputs on every adapter, one panel for each phase given.

    Args:
        tasks: T task names in learning order.
        training: `[T, T]`, row i: mean weights over task i's inputs when task i was learned, on
            adapters 0..i in learning order; later adapters nan (drawn blank).
        testing: `[T, T]`, row i: mean weights over task i's test inputs after the last task.

    Returns:
        A matplotlib figure of its own canvas; nothing of matplotlib's global state is touched.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no phase given, or a matrix of another shape, infinite, or outside [0, 1].
    """
    panels = [
        (title, _attention_matrix(values, tasks, name))
        for title, name, values in (
            ("training", "training", training),
            ("test, after the last task", "testing", testing),
        )
        if values is not None
    ]
    if not panels:
        raise ValueError("training and testing are both None, expected at least one matrix")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("heat maps need matplotlib: pip install matplotlib") from error

    side = 2.2 + 0.42 * len(tasks)
    figure = Figure(figsize=((side + 0.6) * len(panels), side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, matrix) in zip(axes, panels, strict=True):
        _draw_panel(axis, matrix, tasks, title)
    figure.colorbar(axes[-1].images[0], ax=list(axes), label="mean attention weight")
    return figure


def write_attention_heat_map(
    path: str | os.PathLike[str],
    tasks: Sequence[str],
    *,
    training: ArrayLike | None = None,
    testing: ArrayLike | None = None,
    dpi: int = 150,
) -> Path:
    """`attention_heat_map` as a PNG file, written atomically.

    Returns:
        `path` as a `Path`.
    """
    figure = attention_heat_map(tasks, training=training, testing=testing)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return atomic_write_bytes(path, buffer.getvalue())


def results_table(
    tasks: Sequence[str],
    scores: ArrayLike,
    alone: ArrayLike | None = None,
    *,
    title: str = "Score on each task (column) after learning a task (row)",
    metrics: ContinualMetrics | None = None,
) -> Table:
    """The score matrix with its metrics as a `rich` table.

    Args:
        tasks: T task names in learning order.
        scores: `[T, T]` as in `metrics.check_score_matrix`.
        alone: `[T]` scores of the tasks learned alone; adds a row.
        title: heading; the metrics stand in the caption.
        metrics: in place of those of `scores`, where some are not defined.

    Raises:
        ImportError: rich is not installed.
        ValueError: names and matrix do not fit, or a bad matrix.
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
    """The metrics and the score matrix as Markdown; arguments and errors as `results_table`.

    `metrics` stand in for those of `scores`.
    """
    _, _, computed = _cells(tasks, scores, alone)
    named = (computed if metrics is None else metrics).as_dict()
    summary = markdown_table(list(named), [[_number(value) for value in named.values()]])
    return (
        f"# {title}\n\n{summary}\n\nScore on each task (column) after learning a task (row):\n\n"
        f"{matrix_markdown(tasks, scores, alone)}\n"
    )


def matrix_markdown(tasks: Sequence[str], scores: ArrayLike, alone: ArrayLike | None = None) -> str:
    """The score matrix as a Markdown table; arguments and errors as `results_table`."""
    header, rows, _ = _cells(tasks, scores, alone)
    return markdown_table(header, rows)


def write_json(path: str | os.PathLike[str], data: Any) -> Path:
    """Standard JSON, indented, written atomically; nan and infinities become null.

    Args:
        path: target file.
        data: mappings with string keys, sequences, numbers, strings, None, paths and numpy values.

    Returns:
        `path` as a `Path`.

    Raises:
        TypeError: a value JSON cannot hold.
    """
    text = json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False)
    return atomic_write_text(path, text + "\n")


def write_report(
    folder: str | os.PathLike[str],
    tasks: Sequence[str],
    scores: ArrayLike,
    alone: ArrayLike | None = None,
    *,
    training_attention: ArrayLike | None = None,
    testing_attention: ArrayLike | None = None,
    title: str = "Results",
    extra: Mapping[str, Any] | None = None,
    metrics: ContinualMetrics | None = None,
) -> dict[str, Path]:
    """Everything about a run in one folder: results.json, results.md and, given one, attention.png.

    Args:
        folder: target folder, created if missing; files of the same names are replaced.
        tasks: T task names in learning order.
        scores: `[T, T]` as in `metrics.check_score_matrix`.
        alone: `[T]` scores of the tasks learned alone.
        training_attention: `[T, T]` as in `attention_heat_map`.
        testing_attention: `[T, T]` as in `attention_heat_map`.
        title: heading of the Markdown file.
        extra: further entries of results.json (settings, versions, times).
        metrics: in place of those of `scores`, where some are not defined.

    Returns:
        The paths written, by kind: "json", "markdown", "attention".

    Raises:
        ValueError: matrices or names do not fit, or `extra` has a key of the report itself.
    """
    target = Path(folder)
    _, _, computed = _cells(tasks, scores, alone)
    metrics = computed if metrics is None else metrics
    content: dict[str, Any] = {
        "tasks": list(tasks),
        "scores": check_score_matrix(scores),
        "alone": alone,
        "metrics": metrics.as_dict(),
        "metrics_released": continual_metrics(scores, alone, variant="released").as_dict(),
        "training_attention": training_attention,
        "testing_attention": testing_attention,
    }
    clash = sorted(content.keys() & (extra or {}).keys())
    if clash:
        raise ValueError(f"extra must not hold keys of the report itself, got {', '.join(clash)}")
    markdown = results_markdown(tasks, scores, alone, title=title, metrics=metrics)
    written: dict[str, Path] = {}
    if training_attention is not None or testing_attention is not None:
        written["attention"] = write_attention_heat_map(
            target / "attention.png",
            tasks,
            training=training_attention,
            testing=testing_attention,
        )
        markdown += "\n![Mean attention of each task's inputs on each adapter](attention.png)\n"
    written["markdown"] = atomic_write_text(target / "results.md", markdown)
    written["json"] = write_json(target / "results.json", {**content, **(extra or {})})
    return written


def _attention_matrix(values: ArrayLike, tasks: Sequence[str], name: str) -> NDArray[np.float64]:
    try:
        matrix = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a matrix of numbers: {error}") from error
    expected = (len(tasks), len(tasks))
    if matrix.shape != expected or not matrix.size:
        raise ValueError(
            f"{name} must have shape {list(expected)} (tasks x adapters, T >= 1), "
            f"got {list(matrix.shape)}"
        )
    outside = ~np.isnan(matrix) & ~((matrix >= -1e-6) & (matrix <= 1 + 1e-6))
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise ValueError(
            f"{name}[{row}][{column}] is {matrix[row, column]}, expected a weight in [0, 1] or nan"
        )
    return matrix


def _draw_panel(axis: Axes, matrix: NDArray[np.float64], tasks: Sequence[str], title: str) -> None:
    names = [_short(task) for task in tasks]
    axis.imshow(matrix, vmin=0.0, vmax=1.0, cmap="Blues")
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set(title=title, xlabel="adapter", ylabel="inputs of")
    if len(names) <= _MAX_NUMBERED:
        for (row, column), weight in np.ndenumerate(matrix):
            if not math.isnan(weight):
                axis.text(
                    column,
                    row,
                    f"{weight:.2f}",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="white" if weight > 0.5 else "black",
                )


def _short(task: str) -> str:
    return task if len(task) <= 22 else f"{task[:21]}…"


def _cells(
    tasks: Sequence[str], scores: ArrayLike, alone: ArrayLike | None
) -> tuple[list[str], list[list[str]], ContinualMetrics]:
    matrix = check_score_matrix(scores)
    if isinstance(tasks, str) or len(tasks) != len(matrix):
        raise ValueError(f"tasks must be {len(matrix)} names, one per row of scores, got {tasks!r}")
    metrics = continual_metrics(matrix, alone)
    rows = [
        [name, *(_number(value) for value in row)] for name, row in zip(tasks, matrix, strict=True)
    ]
    if alone is not None:
        rows.append(["learned alone", *(_number(value) for value in np.array(alone, dtype=float))])
    return ["after", *(_short(task) for task in tasks)], rows, metrics


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"data must have string keys, got {key!r}")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value
