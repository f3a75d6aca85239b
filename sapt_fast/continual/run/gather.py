"""Gathers the results of a run from its folder, and writes its report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sapt_fast.continual.run.state import RunFolder
from sapt_fast.continual.scores.metrics import continual_metrics
from sapt_fast.continual.scores.results import Results
from sapt_fast.continual.scores.run_report import write_report
from sapt_fast.continual.strategies import Strategy

__all__ = ["gather_results", "write_results"]


def gather_results(
    folder: RunFolder,
    stages: Sequence[int],
    strategy: type[Strategy],
    alone: Sequence[float] | None,
    testing_attention: NDArray[np.float64] | None,
) -> Results:
    """Gathers the results of a finished run.

    Args:
        folder: has the scores and costs of every stage.
        stages: the tasks after which the model was scored.
        strategy: the class; F.Ra and BWT are not defined if it learns all tasks at once.
        alone: [T] scores of the tasks learned alone; None if they were not given.
        testing_attention: [T, T] as in `Results`.
    """
    count = len(folder.tasks)
    scores = np.full((count, count), np.nan)
    for index, row in zip(stages, folder.scores, strict=True):
        scores[index, : len(row)] = row
    if strategy.together:
        scores[:] = scores[-1]
    metrics = continual_metrics(scores, alone)
    if strategy.together:
        metrics = replace(metrics, forgetting=math.nan, bwt=math.nan)
    training = None
    if testing_attention is not None:
        training = np.full((count, count), np.nan)
        for index, row in enumerate(folder.attention):
            training[index, : index + 1] = row
    return Results(
        tasks=folder.tasks,
        scores=scores,
        alone=None if alone is None else tuple(alone),
        metrics=metrics,
        training_attention=training,
        testing_attention=testing_attention,
        seconds=tuple(folder.seconds),
        trained_parameters=max(folder.trained, default=0),
        peak_memory=max((p for p in folder.peaks if p is not None), default=None),
        resumed=folder.resumed,
        folder=folder.path,
    )


def write_results(
    results: Results, strategy: str, metrics: Sequence[str], further: Mapping[str, Any]
) -> None:
    """Writes results.json, results.md and, with attention, attention.png into the run's folder.

    Args:
        results: results of the run.
        strategy: name of the strategy.
        metrics: names of the metrics that score the tasks.
        further: more entries of results.json.
    """
    write_report(
        results.folder,
        results.tasks,
        results.scores,
        results.alone,
        training_attention=results.training_attention,
        testing_attention=results.testing_attention,
        title=f"{strategy} on {len(results.tasks)} tasks",
        extra={
            "strategy": strategy,
            "metric": list(metrics),
            "seconds": results.seconds,
            "trained_parameters": results.trained_parameters,
            "peak_memory": results.peak_memory,
            "resumed": results.resumed,
            **further,
        },
        metrics=results.metrics,
    )
