"""The results of a continual run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sapt_fast.continual.scores.metrics import ContinualMetrics

__all__ = ["Results"]


@dataclass(frozen=True)
class Results:
    """The results of a run.

    Attributes:
        tasks: T names in learning order.
        scores: [T, T] in percent, row i after learning task i; nan above the diagonal. If all tasks
            are learned at once, every row is the last one.
        alone: [T] scores of the tasks learned alone; None if they were not given.
        metrics: AP, F.Ra, FWT, BWT.
        training_attention: [T, T], row i: mean weights of task i's dev inputs when it was
            learned, nan for later adapters; None unless there is one adapter per task.
        testing_attention: [T, T], mean weights of each task's test inputs after the last task
            (of its dev inputs if those are scored).
        seconds: seconds of training and evaluation of each stage (a task, or all at once).
        trained_parameters: the most parameters that a stage trains.
        peak_memory: the most bytes of a stage: those that torch allocated on a GPU, those of the
            whole process on a CPU; None if it is not known.
        resumed: whether the run was interrupted; `seconds` then exclude the work lost.
        folder: the run's folder.
    """

    tasks: tuple[str, ...]
    scores: NDArray[np.float64]
    alone: tuple[float, ...] | None
    metrics: ContinualMetrics
    training_attention: NDArray[np.float64] | None
    testing_attention: NDArray[np.float64] | None
    seconds: tuple[float, ...]
    trained_parameters: int
    peak_memory: int | None
    resumed: bool
    folder: Path

    def deviation(self, stored: Mapping[str, Any]) -> float:
        """Returns the largest difference to the scores and metrics of a results.json."""
        scores = np.array(stored["scores"], dtype=np.float64)
        gaps = [np.nanmax(np.abs(self.scores - scores))]
        for name, value in self.metrics.as_dict().items():
            before = stored["metrics"][name]
            if before is not None and not np.isnan(value):
                gaps.append(abs(value - before))
        return float(max(gaps))
