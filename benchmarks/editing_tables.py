"""Draws the tables of docs/results/editing.md and its plot from a recorded result.

    python benchmarks/editing_tables.py benchmarks/results/<machine>/<file>-editing-facts.json

Prints the tables as Markdown, and writes docs/images/editing.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from measure import ROOT

IMAGE = ROOT / "docs" / "images" / "editing.png"
UNTOUCHED = ("near names", "other countries", "other questions")
_APART = ("largest city", "former capital")
_PLOTTED = {  # the rows of the plot, and their styles
    "GRACE, projected, radius": ("C0", "-"),
    "GRACE, question, radius": ("C1", "-"),
    "GRACE, own keys": ("C2", "-"),
    "MELO, question, radius": ("C3", "-"),
    "fine-tuning": ("C4", "--"),
    "UltraEdit": ("C5", "--"),
    "fine-tuning, L2": ("C6", "--"),
    "deferral": ("C7", "--"),
    "retraining": ("C8", "--"),
}


def untouched(groups: Mapping[str, float], counts: Mapping[str, int]) -> float:
    """Returns the share of untouched prompts with the same answer, of three groups together."""
    total = sum(counts[group] for group in UNTOUCHED)
    return sum(groups[group] * counts[group] for group in UNTOUCHED) / total


def methods(result: Mapping[str, Any]) -> list[str]:
    """Returns the lines of the table of methods, in per cent."""
    head = ["method", "orders", "success", "retention", "paraphrases", "untouched", "near names"]
    head += ["same country", *_APART, "s an edit"]
    lines = [_line(head), "|" + "---|" * len(head)]
    for row in result["rows"]:
        generated, groups = row["generated"], row["groups"]
        found = [fmean(generated[name]) for name in ("success", "retention", "paraphrase")]
        by_order = [
            dict(zip(groups, shares, strict=True)) for shares in zip(*groups.values(), strict=True)
        ]
        found.append(fmean(untouched(shares, result["prompts"]) for shares in by_order))
        found += [fmean(groups["near names"]), fmean(generated["locality"])]
        found += [fmean(groups[group]) for group in _APART]
        cells = [row["method"], str(len(generated["success"])), *map(_percent, found)]
        lines.append(_line([*cells, _seconds(row)]))
    return lines


def keys(result: Mapping[str, Any]) -> list[str]:
    """Returns the lines of the table of what keys match, in per cent."""
    groups = ("paraphrases", *UNTOUCHED, "same country", *_APART)
    lines = [_line(["keys", "chosen", *groups]), "|" + "---|" * (len(groups) + 2)]
    for name, found in result["keys"].items():
        shares = [_percent(found["shares"][group]) for group in groups]
        lines.append(_line([name, f"{found['value']:.2f}", *shares]))
    return lines


def tuning(result: Mapping[str, Any]) -> list[str]:
    """Returns the lines of the table of values tried, with their scores."""
    lines = ["| method | tried: score |", "|---|---|"]
    for row in result["rows"]:
        if row["tuning"]:
            tried = ", ".join(f"{value}: {score:.2f}" for value, score in row["tuning"].items())
            lines.append(_line([f"{row['method']} ({row['tuned']})", tried]))
    return lines


def draw(result: Mapping[str, Any]) -> None:
    """Plots retention, paraphrases and untouched answers over the edits of the first order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, sharey=True)
    for row in result["rows"]:
        if row["method"] not in _PLOTTED:
            continue
        color, style = _PLOTTED[row["method"]]
        points = [point for point in row["curve"] if point["edits"]]
        edits = [point["edits"] for point in points]
        curves = (
            [point["retention"] for point in points],
            [point["paraphrase"] for point in points],
            [untouched(point["groups"], result["prompts"]) for point in points],
        )
        for axis, values in zip(axes, curves, strict=True):
            shown = [100 * value for value in values]
            axis.plot(edits, shown, style, color=color, marker=".", label=row["method"])
    for axis, title in zip(axes, ("retention", "paraphrases", "untouched"), strict=True):
        axis.set(title=title, xlabel="edits", ylim=(-3, 103))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("%")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGE, dpi=110)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0")


def _seconds(row: Mapping[str, Any]) -> str:
    return f"{fmean(row['seconds_an_edit']):.1f}" if row["seconds_an_edit"] else ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints the tables and draws the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path)
    result = json.loads(parser.parse_args().result.read_text())
    for lines in (methods(result), keys(result), tuning(result)):
        print("\n".join(lines), end="\n\n")
    draw(result)


if __name__ == "__main__":
    main()
