"""How the continual-learning experiments choose settings on dev rows, and what they record."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import measure

from sapt_fast.continual.compare.cells import Comparison
from sapt_fast.continual.compare.compare import compare
from sapt_fast.continual.compare.report import summary
from sapt_fast.continual.data.sources import Source
from sapt_fast.continual.settings import ContinualSettings


def tune(
    source: Source,
    rows: Mapping[str, ContinualSettings],
    rates: Mapping[str, Sequence[float]],
    work: Path,
    at_rate: Callable[[ContinualSettings, float], ContinualSettings],
    weights: Mapping[str, tuple[str, Sequence[float]]] | None = None,
) -> tuple[dict[str, ContinualSettings], dict[str, dict[str, dict[float, float]]]]:
    """The rows at the settings with the best AP on dev rows, and that AP by row and setting.

    Args:
        source: the tasks of the tuning runs; one run for each setting.
        rows: by the name that stands in the table.
        rates: learning rates to choose from, by row.
        work: gets the runs.
        at_rate: settings at a learning rate.
        weights: by row, what weighs its second loss and the values to choose from, compared at
            the middle rate; the rates are then compared at the best one.
    """
    weights = {row: known for row, known in (weights or {}).items() if row in rows}
    middle = {row: sorted(rates[row])[len(rates[row]) // 2] for row in rows}
    tried = {row: at_rate(rows[row], middle[row]).but(scored="dev") for row in rows}
    found: dict[str, dict[str, dict[float, float]]] = {row: {} for row in rows}

    def choose(name: str, options: Mapping[str, Mapping[float, ContinualSettings]]) -> None:
        for value in dict.fromkeys(value for row in options.values() for value in row):
            having = {
                row: by[value]
                for row, by in options.items()
                if value in by and value not in found[row].setdefault(name, {})
            }
            if having:
                for cell in compare(source, having, work / f"{name}-{value:g}").cells:
                    found[cell.row][name][value] = cell.results["metrics"]["AP"]
        for row, by in options.items():
            scores = found[row][name]
            tried[row] = by[max(scores, key=lambda value: scores[value])]

    for name in dict.fromkeys(name for name, _ in weights.values()):
        options = {
            row: {value: _weighted(tried[row], name, value) for value in values}
            for row, (own, values) in weights.items()
            if own == name
        }
        choose(name, options)
        for row in options:
            found[row]["learning_rate"] = {middle[row]: max(found[row][name].values())}
    choose(
        "learning_rate",
        {row: {rate: at_rate(tried[row], rate) for rate in rates[row]} for row in rows},
    )
    return {row: settings.but(scored="test") for row, settings in tried.items()}, found


def _weighted(settings: ContinualSettings, name: str, value: float) -> ContinualSettings:
    """With another weight of the second loss, which is an option of the strategy or of SAPT."""
    if name in ContinualSettings.names():
        return settings.but(**{name: value})
    return settings.but(strategy_options={**settings.strategy_options, name: value})


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
    """Saves what was found with the command and the machine, and says where it lies.

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
    print(f"{comparison.folder / 'compare.md'}\n{path}")
    return path


def _differences(settings: ContinualSettings, base: ContinualSettings) -> dict[str, Any]:
    ours, theirs = ({**d, **d.pop("sapt")} for d in (settings.to_dict(), base.to_dict()))
    return {name: value for name, value in ours.items() if theirs[name] != value}
