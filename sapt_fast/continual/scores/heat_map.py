"""Heat maps of the mean attention of tasks' inputs on adapters."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sapt_fast.continual.scores.tables import short_name
from sapt_fast.files.directories import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["attention_heat_map", "write_attention_heat_map"]

# Cells are numbered up to this many adapters; beyond it the figures would overlap.
_MAX_NUMBERED = 16


def attention_heat_map(
    tasks: Sequence[str],
    *,
    training: ArrayLike | None = None,
    testing: ArrayLike | None = None,
) -> Figure:
    """Draws the mean attention of every task's inputs on every adapter, one panel for each phase.

    Args:
        tasks: T task names in learning order.
        training: `[T, T]`, row i: mean weights over task i's inputs when task i was learned, on
            adapters 0..i in learning order; later adapters nan (drawn blank).
        testing: `[T, T]`, row i: mean weights over task i's test inputs after the last task.

    Returns:
        A matplotlib figure with its own canvas; matplotlib's global state is not changed.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if no phase is given, or a matrix has another shape or values outside [0, 1].
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
        raise ValueError("training, testing: got None for both, expected at least one matrix")
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
    """Writes `attention_heat_map` as a PNG file, atomically.

    Returns:
        `path` as a `Path`.
    """
    figure = attention_heat_map(tasks, training=training, testing=testing)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return atomic_write_bytes(path, buffer.getvalue())


def _attention_matrix(values: ArrayLike, tasks: Sequence[str], name: str) -> NDArray[np.float64]:
    try:
        matrix = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected a matrix of numbers: {error}") from error
    expected = (len(tasks), len(tasks))
    if matrix.shape != expected or not matrix.size:
        raise ValueError(
            f"{name}: got shape {list(matrix.shape)}, expected {list(expected)} (tasks x adapters, "
            "T >= 1)"
        )
    outside = ~np.isnan(matrix) & ~((matrix >= -1e-6) & (matrix <= 1 + 1e-6))
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise ValueError(
            f"{name}[{row}][{column}]: got {matrix[row, column]}, expected a weight in [0, 1] or "
            "nan"
        )
    return matrix


def _draw_panel(axis: Axes, matrix: NDArray[np.float64], tasks: Sequence[str], title: str) -> None:
    names = [short_name(task) for task in tasks]
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
