"""The report of a run: report.json, report.md and curves.png."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sapt_fast.continual.scores.tables import markdown_table
from sapt_fast.editing.editors.base import GIVEN, MADE
from sapt_fast.editing.metrics import METRICS
from sapt_fast.files.directories import atomic_write_bytes, atomic_write_text
from sapt_fast.files.writing import write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

__all__ = ["curves", "report_table", "write_report"]

_MEANING = {
    "success": "success at once (ES)",
    "retention": "retention of all edits (ERR)",
    "upstream": "upstream answers unchanged (TRR)",
    "paraphrase": "paraphrases answered",
    "locality": "locality answers unchanged",
}
_HEADER = ("metric", "by generation", "teacher forcing")
_NOTE = (
    "By generation: share of prompts whose greedy answer is exactly right. Teacher forcing: share "
    "of the right answer's tokens that are the likeliest behind the true tokens before them."
)


def write_report(folder: Path, content: Mapping[str, Any]) -> dict[str, Path]:
    """Writes report.json, report.md and curves.png.

    Args:
        folder: the run's folder.
        content: what `run_edits` returns.

    Returns:
        The paths written, by kind: "json", "markdown", "curves".

    Raises:
        ImportError: if matplotlib is not installed.
    """
    buffer = io.BytesIO()
    curves(content["points"]).savefig(buffer, format="png", dpi=150)
    return {
        "curves": atomic_write_bytes(folder / "curves.png", buffer.getvalue()),
        "markdown": atomic_write_text(folder / "report.md", _markdown(content)),
        "json": write_json(folder / "report.json", content),
    }


def report_table(content: Mapping[str, Any]) -> Table:
    """Returns a `rich` table of the last measurement."""
    from rich.table import Table
    from rich.text import Text

    count = content["edits"]["count"]
    table = Table(title=Text(f"{content['method']} after {count} edits"), caption=Text(_NOTE))
    for index, name in enumerate(_HEADER):
        table.add_column(name, justify="right" if index else "left")
    for line in _lines(content["points"]):
        table.add_row(*line)
    return table


def curves(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Plots the metrics by generation, and by teacher forcing, over the number of edits.

    Perplexity has a third panel, if it was measured.

    Args:
        points: the measurements, in order.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("curves need matplotlib: pip install matplotlib") from error

    has_text = "perplexity" in points[0]
    count = 3 if has_text else 2
    figure = Figure(figsize=(4.6 * count, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, count)
    edits = [point["edits"] for point in points]
    for axis, kind, title in zip(axes, ("generated", "forced"), _HEADER[1:], strict=False):
        for number, name in enumerate(METRICS):
            values = [point[kind][name] for point in points]
            known = [(x, 100 * y) for x, y in zip(edits, values, strict=True) if y is not None]
            if known:
                axis.plot(*zip(*known, strict=True), marker=".", color=f"C{number}", label=name)
        axis.set(title=title, xlabel="edits", ylabel="%", ylim=(-3, 103))
    if has_text:
        axes[2].plot(edits, [point["perplexity"] for point in points], marker=".", color="k")
        axes[2].set(title="perplexity of plain text", xlabel="edits")
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0].legend(loc="best")
    return figure


def _lines(points: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """The last measurement, a line for each metric."""
    first, last = points[0], points[-1]
    lines = [
        (_MEANING[name], _percent(last["generated"][name]), _percent(last["forced"][name]))
        for name in METRICS
        if last["generated"][name] is not None
    ]
    lines += [
        (f"unchanged in the group {name}", _percent(share), "")
        for name, share in last["groups"].items()
    ]
    if "perplexity" in last:
        change = f"{first['perplexity']:.3f} before, {last['perplexity']:.3f} now"
        lines.append(("perplexity of plain text", "", change))
    return lines


def _markdown(content: Mapping[str, Any]) -> str:
    records, count = content["records"], content["edits"]["count"]
    outcomes = Counter(record["outcome"] for record in records)
    failed = [record for record in records if record["outcome"] not in (MADE, GIVEN)]
    star = " (without what an interruption lost)" if content["resumed"] else ""
    size = ", ".join(f"{value:,} {name}" for name, value in content["size"].items())
    parts = [
        f"# {count} edits by {content['method']}\n",
        markdown_table(_HEADER, _lines(content["points"])),
        f"\n{_NOTE}\n",
        f"- Edits made: {outcomes[MADE]}; given before the edit: {outcomes[GIVEN]}; failed: "
        f"{len(failed)}.",
        f"- Seconds for an edit: {content['edit_seconds'] / count:.3g}; for all measurements: "
        f"{content['measure_seconds']:.3g}{star}.",
        f"- Size: {size}.",
        f"- Upstream prompts: {content['upstream']['count']}.",
        "\n![Metrics over the number of edits](curves.png)\n",
        "## Over the number of edits\n",
        "By generation, in %.\n",
        markdown_table(
            ("edits", *METRICS),
            [
                (str(p["edits"]), *(_percent(p["generated"][name]) for name in METRICS))
                for p in content["points"]
            ],
        ),
    ]
    if failed:
        rows = [(record["place"], record["outcome"]) for record in failed[:50]]
        parts += ["\n## Failed edits\n", markdown_table(("edit", "why"), rows)]
        if len(failed) > 50:
            parts.append(f"\n{len(failed) - 50} more are in report.json.")
    parts += ["\n## Options\n", markdown_table(("option", "value"), _options(content))]
    return "\n".join(parts) + "\n"


def _options(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    options = {**content["options"], **content["settings"]}
    return [(name, str(value)) for name, value in options.items()]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
