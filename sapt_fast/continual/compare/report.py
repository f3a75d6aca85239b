"""The report of a comparison: one table, score matrices, forgetting curves, attention heat maps."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sapt_fast.continual.compare.cells import Cell, Comparison
from sapt_fast.continual.run.state import read_json
from sapt_fast.continual.scores.heat_map import write_attention_heat_map
from sapt_fast.continual.scores.metrics import average_performance, forgetting_rate
from sapt_fast.continual.scores.tables import markdown_table, matrix_markdown
from sapt_fast.continual.strategies import STRATEGIES
from sapt_fast.files.directories import atomic_write_bytes, atomic_write_text
from sapt_fast.files.writing import write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

__all__ = ["comparison_table", "forgetting_curves", "summary", "write_comparison"]

METRICS = ("AP", "F.Ra", "FWT", "BWT")
_HEADER = ("method", "runs", *METRICS, "trained", "time", "memory")
_CAPTION = (
    "Mean and standard deviation over seeds and orders. AP: mean score after the last task. "
    "F.Ra: score lost since its best. FWT: gain over each task learned alone. BWT: change since a "
    "task was learned. trained: parameters that one task trains. time: of a whole run with its "
    "evaluations; * excludes work lost in an interruption. memory: peak; on a CPU, of the whole "
    "process."
)


def summary(cells: Sequence[Cell]) -> dict[str, Any]:
    """Summarises the runs of one row.

    Returns:
        `runs`, their number; `metrics`, for each metric `mean`, `deviation` (of the sample; None
        for one run) and `values`, which are None if the metric is not defined;
        `trained_parameters`, `seconds` and `peak_memory`, the means; `resumed`, whether a run was
        interrupted.
    """
    memory = [c.results["peak_memory"] for c in cells if c.results["peak_memory"] is not None]
    return {
        "runs": len(cells),
        "metrics": {name: _spread([c.results["metrics"][name] for c in cells]) for name in METRICS},
        "trained_parameters": round(fmean(c.results["trained_parameters"] for c in cells)),
        "seconds": fmean(math.fsum(c.results["seconds"]) for c in cells),
        "peak_memory": round(fmean(memory)) if memory else None,
        "resumed": any(c.results["resumed"] for c in cells),
    }


def comparison_table(comparison: Comparison) -> Table:
    """Returns a `rich` table with one row for each row of the comparison."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{len(comparison.cells)} runs, scores in %", caption=Text(_CAPTION))
    for index, name in enumerate(_HEADER):
        table.add_column(name, justify="right" if index else "left")
    for row in comparison.rows:
        table.add_row(*(Text(cell) for cell in _line(row, summary(comparison.of(row)))))
    return table


def forgetting_curves(comparison: Comparison) -> Figure:
    """Plots AP and F.Ra over the tasks seen so far, after each task, with the deviation of a row.

    A strategy without a sequence (joint training) is a dashed horizontal line.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("curves need matplotlib: pip install matplotlib") from error

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    titles = ("mean score on the tasks seen so far", "forgetting on them (F.Ra)")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="tasks learned", ylabel="%")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    for number, row in enumerate(comparison.rows):
        cells = comparison.of(row)
        look: dict[str, Any] = {"color": f"C{number % 10}", "label": row}
        look["linestyle"] = "-" if number < 10 else ":"
        if _has_no_sequence(cells[0]):
            look["linestyle"] = "--"
            axes[0].axhline(fmean(average_performance(c.scores) for c in cells), **look)
            continue
        for axis, metric in zip(axes, (average_performance, forgetting_rate), strict=True):
            values = np.array([_after_each_task(cell.scores, metric) for cell in cells])
            mean, steps = values.mean(0), np.arange(1, values.shape[1] + 1)
            axis.plot(steps, mean, marker=".", **look)
            if len(cells) > 1:
                deviation = values.std(0, ddof=1)
                axis.fill_between(
                    steps, mean - deviation, mean + deviation, color=look["color"], alpha=0.15
                )
    axes[1].legend(*axes[0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def write_comparison(comparison: Comparison) -> dict[str, Path]:
    """Writes compare.json, compare.md, forgetting.png and the heat maps of strategies that route.

    Returns:
        The paths written, by name.
    """
    folder, written = comparison.folder, {}
    buffer = io.BytesIO()
    forgetting_curves(comparison).savefig(buffer, format="png", dpi=150)
    written["forgetting"] = atomic_write_bytes(folder / "forgetting.png", buffer.getvalue())
    lines = [
        "# Comparison\n",
        _conditions(comparison),
        markdown_table(
            _HEADER, [_line(row, summary(comparison.of(row))) for row in comparison.rows]
        ),
        f"\n{_CAPTION}\n",
        "![Score and forgetting after each task](forgetting.png)\n",
    ]
    for row in comparison.rows:
        lines.append(f"## {row}\n")
        for order in dict.fromkeys(cell.order for cell in comparison.of(row)):
            cells = [cell for cell in comparison.of(row) if cell.order == order]
            seeds = ", ".join(str(cell.seed) for cell in cells)
            lines.append(
                f"Order {order}, seeds {seeds}: mean score on each task (column) after learning a "
                "task (row).\n"
            )
            matrix = np.mean([cell.scores for cell in cells], axis=0)
            lines.append(matrix_markdown(cells[0].results["tasks"], matrix) + "\n")
            heat_map = _heat_map(folder, row, order, cells)
            if heat_map is not None:
                written[heat_map.stem] = heat_map
                lines.append(f"![Mean attention in training and at test time]({heat_map.name})\n")
    written["markdown"] = atomic_write_text(folder / "compare.md", "\n".join(lines))
    content = {
        "rows": {row: summary(comparison.of(row)) for row in comparison.rows},
        "cells": [_cell_entry(cell, folder) for cell in comparison.cells],
    }
    written["json"] = write_json(folder / "compare.json", content)
    return written


def _conditions(comparison: Comparison) -> str:
    run = read_json(comparison.cells[0].folder / "run.json")
    source, settings = run["source"], run["settings"]
    tasks = len(comparison.cells[0].results["tasks"])
    return (
        f"Model `{Path(source['model']).name}`, benchmark {source['benchmark']}, {tasks} tasks, "
        f"{settings['scored']} rows scored, weights in {source['dtype']}; the settings of each run "
        "are in compare.json.\n"
    )


def _cell_entry(cell: Cell, folder: Path) -> dict[str, Any]:
    run = read_json(cell.folder / "run.json")
    return {
        "row": cell.row,
        "order": cell.order,
        "seed": cell.seed,
        "folder": cell.folder.relative_to(folder),
        "settings": run["settings"],
        "source": run["source"],
        **cell.results,
    }


def _heat_map(folder: Path, row: str, order: str, cells: Sequence[Cell]) -> Path | None:
    given = [cell.results for cell in cells]
    if any(results["testing_attention"] is None for results in given):
        return None
    training, testing = (
        np.mean([np.array(results[name], dtype=np.float64) for results in given], axis=0)
        for name in ("training_attention", "testing_attention")
    )
    path = folder / f"attention-{row}-{order}.png"
    return write_attention_heat_map(path, given[0]["tasks"], training=training, testing=testing)


def _has_no_sequence(cell: Cell) -> bool:
    run = read_json(cell.folder / "run.json")
    return STRATEGIES[run["settings"]["strategy"]].together


def _after_each_task(scores: NDArray[np.float64], metric: Any) -> list[float]:
    return [metric(scores[:count, :count]) for count in range(1, len(scores) + 1)]


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "deviation": None, "values": list(values)}
    deviation = stdev(known) if len(known) > 1 else None
    return {"mean": fmean(known), "deviation": deviation, "values": list(values)}


def _line(row: str, found: dict[str, Any]) -> list[str]:
    memory = found["peak_memory"]
    return [
        row,
        str(found["runs"]),
        *(with_deviation(found["metrics"][name]) for name in METRICS),
        f"{found['trained_parameters']:,}",
        f"{found['seconds']:.0f} s{'*' if found['resumed'] else ''}",
        "-" if memory is None else f"{memory / 2**20:,.0f} MiB",
    ]


def with_deviation(spread: Mapping[str, Any]) -> str:
    """Formats mean and deviation of a metric of `summary`; "-" if it is not defined."""
    if spread["mean"] is None:
        return "-"
    text = f"{spread['mean']:.1f}"
    return text if spread["deviation"] is None else f"{text} ± {spread['deviation']:.1f}"
