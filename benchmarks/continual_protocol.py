"""How the continual-learning experiments choose settings on dev rows, and what they record."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import measure

from sapt_fast.continual.compare.cells import Comparison
from sapt_fast.continual.compare.compare import compare
from sapt_fast.continual.compare.report import summary
from sapt_fast.continual.data.sources import Source
from sapt_fast.continual.run.evaluate import metric_of
from sapt_fast.continual.scores.metrics import score_predictions
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.strategies import STRATEGIES

__all__ = [
    "Grid",
    "constant_answers",
    "known_rows",
    "one_seed_more",
    "record",
    "report",
    "tune",
    "with_value",
]

# By row and the setting's name, the AP on dev rows of each value.
Tuning = dict[str, dict[str, dict[float, float]]]


@dataclass(frozen=True)
class Grid:
    """Values of a setting that are tried on dev rows.

    Attributes:
        name: a field of ContinualSettings or SaptConfig, or an option of the strategy.
        values: all that may be tried, rising.
        first: those that are tried at first, a part of `values` without gaps.
    """

    name: str
    values: tuple[float, ...]
    first: tuple[float, ...]

    def tried(self, scores: Mapping[float, float]) -> Iterator[float]:
        """Yields the values to try, until the best has worse ones on both sides or none is left.

        Args:
            scores: by value, higher is better; the caller adds that of each value it is given.
        """
        yield from self.first
        while True:
            tried = sorted(scores)
            best = max(scores.values())
            low, high = self.values.index(tried[0]), self.values.index(tried[-1])
            if scores[tried[0]] == best and low > 0:
                yield self.values[low - 1]
            elif scores[tried[-1]] == best and high < len(self.values) - 1:
                yield self.values[high + 1]
            else:
                return


def tune(
    source: Source,
    rows: Mapping[str, ContinualSettings],
    grids: Mapping[str, Sequence[Grid]],
    work: Path,
    at: Callable[[ContinualSettings, str, float], ContinualSettings] | None = None,
) -> tuple[dict[str, ContinualSettings], Tuning]:
    """Chooses settings by the AP on dev rows.

    The grids of a row are tried one after the other. The first runs use the middle of the first
    values of the grids that follow. A grid grows until the best value has worse ones on both sides
    or `values` ends.

    Args:
        source: the tasks of the tuning runs; one run for each setting.
        rows: by the name that stands in the table.
        grids: of each row; a row without any keeps its settings.
        work: gets the runs.
        at: returns settings with a value; defaults to `with_value`.

    Returns:
        The rows at the best settings, and what was tried.
    """
    put = with_value if at is None else at
    found: Tuning = {row: {} for row in rows}
    chosen: dict[str, ContinualSettings] = {}
    for row, settings in rows.items():
        here = settings.but(scored="dev")
        for grid in grids.get(row, ()):
            here = put(here, grid.name, grid.first[len(grid.first) // 2])
        for grid in grids.get(row, ()):
            scores = found[row][grid.name] = {}
            for value in grid.tried(scores):
                folder = work / f"{grid.name}-{value:g}"
                # A folder holds one run of each row: the grids of a row have different names.
                made = {row: put(here, grid.name, value)}
                cell = compare(source, made, folder).cells[0]
                scores[value] = cell.results["metrics"]["AP"]
                print(f"{row} {grid.name} {value:g}: {scores[value]:.1f} on dev rows", flush=True)
            here = put(here, grid.name, max(scores, key=lambda value: scores[value]))
        chosen[row] = here.but(scored="test")
    return chosen, found


def with_value(settings: ContinualSettings, name: str, value: float) -> ContinualSettings:
    """Returns settings with another value of a field, or of an option of the strategy."""
    if name in ContinualSettings.names():
        return settings.but(**{name: value})
    return settings.but(strategy_options={**settings.strategy_options, name: value})


def known_rows(rows: Mapping[str, Mapping[str, Any]], asked: str | None) -> list[str]:
    """Returns the names of rows to run: those asked for, or all whose strategy exists.

    Args:
        rows: settings by row, with `strategy` where it is not the row's name.
        asked: names separated by commas; None for all.

    Raises:
        SystemExit: if a name or its strategy is unknown.
    """
    exists = [name for name in rows if rows[name].get("strategy", name) in STRATEGIES]
    names = exists if asked is None else asked.split(",")
    unknown = sorted(set(names) - set(exists))
    if unknown:
        raise SystemExit(f"got unknown rows {unknown}, expected among {exists}")
    return names


def constant_answers(
    source: Source, seeds: Sequence[int], settings: ContinualSettings
) -> dict[str, Any]:
    """Scores the answer that a task's training rows have most often, for every test row.

    Nobody could do so without being told the task: it is what a method reaches that knows the task
    and nothing else.

    Returns:
        `metrics`, AP as in `summary`, and `tasks`, the mean score of each over the seeds.
    """
    by_task: dict[str, list[float]] = {}
    for seed in seeds:
        for task in replace(source, seed=seed).load_tasks():
            (answer, _), *_ = Counter(row.output for row in task.train).most_common(1)
            expected = [row.outputs for row in task.test]
            metric = metric_of(task.benchmark, settings)
            score = score_predictions([answer] * len(expected), expected, metric)
            by_task.setdefault(task.name, []).append(score)
    values = [fmean(scores) for scores in zip(*by_task.values(), strict=True)]
    deviation = stdev(values) if len(values) > 1 else None
    return {
        "metrics": {"AP": {"mean": fmean(values), "deviation": deviation, "values": values}},
        "tasks": {name: fmean(scores) for name, scores in by_task.items()},
    }


def one_seed_more(seeds: str) -> Iterator[list[int]]:
    """Yields the first seed, then the first two, ...: a table stands after each."""
    known = [int(seed) for seed in seeds.split(",")]
    return (known[:count] for count in range(1, len(known) + 1))


def report(
    comparison: Comparison,
    rows: Mapping[str, ContinualSettings],
    base: ContinualSettings,
    tuning: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Means and deviations of each row with every run's matrices, JSON-ready.

    Args:
        base: the row's settings are noted where they differ from these.
        tuning: by row, as from `tune`.
    """
    return {
        row: {
            "settings": _differences(settings, base),
            "dev_ap": (tuning or {}).get(row),
            **summary(comparison.of(row)),
            "cells": [
                {"order": cell.order, "seed": cell.seed, **cell.results}
                for cell in comparison.of(row)
            ],
        }
        for row, settings in rows.items()
    }


def record(
    only: str, given: Sequence[str] | None, comparison: Comparison, out: Path, **found: Any
) -> Path:
    """Saves what was found with the command and the machine, and prints the file's name.

    Args:
        only: name of the experiment.
        given: the script's arguments; None for those of the command line.
        found: JSON-ready.
    """
    result = {
        "only": only,
        "command": shlex.join(["python", *(sys.argv if given is None else given)]),
        "environment": measure.environment("cpu"),
        **found,
    }
    path = measure.save(result, out)
    print(f"{comparison.folder / 'compare.md'}\n{path}", flush=True)
    return path


def _differences(settings: ContinualSettings, base: ContinualSettings) -> dict[str, Any]:
    ours, theirs = ({**d, **d.pop("sapt")} for d in (settings.to_dict(), base.to_dict()))
    return {name: value for name, value in ours.items() if theirs[name] != value}
