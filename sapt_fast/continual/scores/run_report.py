"""The report that a continual run writes: results.json, results.md and attention.png."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from sapt_fast.continual.scores.heat_map import write_attention_heat_map
from sapt_fast.continual.scores.metrics import (
    ContinualMetrics,
    check_score_matrix,
    continual_metrics,
)
from sapt_fast.continual.scores.tables import results_markdown
from sapt_fast.files.directories import atomic_write_text
from sapt_fast.files.writing import write_json

__all__ = ["write_report"]


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
    """Writes results.json, results.md and, if attention is given, attention.png.

    Args:
        folder: target folder, created if missing; files of the same names are replaced.
        tasks: T task names in learning order.
        scores: `[T, T]` as in `metrics.check_score_matrix`.
        alone: `[T]` scores of the tasks learned alone.
        training_attention: `[T, T]` as in `attention_heat_map`.
        testing_attention: `[T, T]` as in `attention_heat_map`.
        title: heading of the Markdown file.
        extra: further entries of results.json (settings, versions, times).
        metrics: written instead of those of `scores`, if some are not defined.

    Returns:
        The paths written, by kind: "json", "markdown", "attention".

    Raises:
        ValueError: if matrices or names do not fit, or `extra` has a key of the report itself.
    """
    target = Path(folder)
    metrics = continual_metrics(scores, alone) if metrics is None else metrics
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
        raise ValueError(f"extra: got {', '.join(clash)}, expected no keys of the report itself")
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
