"""Runs several strategies over seeds and orders; finished runs are kept."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sapt_fast.checks import require_folder
from sapt_fast.continual.compare.cells import Cell, Comparison
from sapt_fast.continual.compare.report import write_comparison
from sapt_fast.continual.compare.tensorboard import require_tensorboard, write_scalars
from sapt_fast.continual.data.orders import resolve_order
from sapt_fast.continual.data.sources import Source
from sapt_fast.continual.run import processes
from sapt_fast.continual.run.checks import check_kind, check_processes
from sapt_fast.continual.run.loop import ALONE_NAME, run_alone, run_continual
from sapt_fast.continual.run.state import read_json
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.stored_settings import differences
from sapt_fast.continual.strategies import STRATEGIES
from sapt_fast.files.names import require_folder_name
from sapt_fast.methods.base import handles
from sapt_fast.patching import unpatch

__all__ = ["compare", "settings_of_rows"]

logger = logging.getLogger(__name__)

ALONE_ROW = "alone"
_REPORTED = (
    "tasks",
    "scores",
    "metrics",
    "seconds",
    "trained_parameters",
    "peak_memory",
    "resumed",
)
_APPENDED = 40  # the most bytes that a run's folder adds to the name of its order
# Settings that cannot be set for a row, and what sets them.
_SAID_ELSEWHERE = {
    "strategy": "strategies, as NAME=METHOD",
    "strategy_options": "the options by their own names",
    "seed": "seeds",
}


def compare(
    source: Source,
    rows: Mapping[str, ContinualSettings],
    output_dir: str | PathLike[str],
    *,
    orders: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    alone: ContinualSettings | None = None,
    tensorboard: bool = False,
    progress: bool = True,
) -> Comparison:
    """Runs every strategy on every seed and order, and reports them in one table.

    To resume an interrupted comparison, call it again with the same arguments: finished runs are
    read, an unfinished one is resumed. Strategies, seeds, orders and FWT may be added later.
    Several processes (torchrun) share the work of each run, and the first one reports.

    Args:
        source: the model and the tasks; each run sets its `tasks` and `seed`.
        rows: settings by the name of their row in the table; each run sets their `seed`.
        output_dir: gets a folder of each run (`<row>/<order>-seed<n>`), and compare.json,
            compare.md and the plots of `write_comparison`.
        orders: orders of the same tasks, as in `resolve_order`; defaults to that of `source`.
        seeds: distinct seeds.
        alone: settings to learn every task alone first, once for each seed, for FWT; None leaves
            FWT out.
        tensorboard: write the scores of each run for TensorBoard too.
        progress: show a progress bar of the runs.

    Raises:
        ImportError: if `tensorboard` is True and TensorBoard is not installed.
        ValueError: if there are no rows, orders or seeds, one is given twice, or a row's name is
            not valid for a folder.
        ValueError: if `output_dir` holds a run of that name with different settings or data.
        ValueError: if there are several processes and a strategy does not support them. These
            errors are raised before anything runs.
        FileNotFoundError, ValueError: as `Source` and `run_continual`.
    """
    folder = Path(output_dir)
    named = _named_orders(source, orders)
    _check(rows, named, seeds)
    require_folder("output_dir", folder)
    source.check_files()
    if tensorboard:
        require_tensorboard()
    plan = _plan(source, rows, named, seeds, folder)
    singles = {} if alone is None else _singles(plan, alone, folder / ALONE_ROW)
    runs = [*singles.values(), *plan]
    processes.start(plan[0].settings.device)
    for run in runs:
        check_kind(run.settings.strategy, source.has_images)
        check_processes(run.settings)
    _check_stored(runs)
    model = None
    cells: dict[tuple[str, str, int], Cell] = {}
    bar = tqdm(plan, desc="comparison", unit="run", disable=not (progress and processes.is_first()))
    for run in bar:
        bar.set_postfix_str(f"{run.row}, {run.order}, seed {run.seed}")
        board = folder / "tensorboard" / run.row / run.folder.name
        # A run that was finished without FWT is reported again, not trained.
        if not run.done.is_file() or (singles and read_json(run.done, "alone")["alone"] is None):
            model = source.load_model() if model is None else model
            _run(model, run, _alone(model, singles[run.seed]) if singles else None)
            if processes.is_first():
                shutil.rmtree(board, ignore_errors=True)  # of an earlier report
        cell = Cell(run.row, run.order, run.seed, run.folder, read_json(run.done, *_REPORTED))
        cells[run.row, run.order, run.seed] = cell
        if tensorboard and processes.is_first():
            write_scalars(board, cell)
    ordered = [cells[row, order, seed] for row in rows for order in named for seed in seeds]
    comparison = Comparison(tuple(rows), tuple(ordered), folder)
    if processes.is_first():
        write_comparison(comparison)
    processes.wait()
    return comparison


def settings_of_rows(
    base: ContinualSettings,
    names: Sequence[str],
    values: Mapping[str, Any],
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, ContinualSettings]:
    """Makes the settings of a comparison's rows from names and values.

    Args:
        base: the settings that all rows start from.
        names: "<strategy>", or "<row>=<strategy>" for a row with another name.
        values: by "<setting>" for all rows, or "<row>.<setting>" for one; a setting is a field of
            ContinualSettings or SaptConfig, or an option of the row's strategy.
        defaults: values by strategy that override `base`.

    Returns:
        The settings by row.

    Raises:
        ValueError: if a strategy, row or setting is unknown, a row is given twice, or a value does
            not fit.
        ValueError: if `values` has the strategy or the seed, which `names` and `compare` set.

    Example:
        >>> rows = settings_of_rows(
        ...     ContinualSettings(), ["seqlora", "strong=ewc"], {"strong.strength": 9, "steps": 5})
        >>> rows["strong"].strategy_options["strength"], rows["seqlora"].steps
        (9.0, 5)
    """
    strategies: dict[str, str] = {}
    for name in names:
        row, _, strategy = (part.strip() for part in name.partition("="))
        if row in strategies:
            raise ValueError(f"strategies: got {row!r} twice; rename one of them NAME={row}")
        strategies[row] = strategy or row
    unknown = sorted(set(strategies.values()) - set(STRATEGIES))
    if unknown:
        raise ValueError(
            f"strategies: got {', '.join(map(repr, unknown))}, expected some of "
            f"{', '.join(STRATEGIES)}"
        )
    for name in values:
        row, dot, own = name.partition(".")
        if (place := _SAID_ELSEWHERE.get(own or name)) is not None:
            raise ValueError(f"set: got {name!r}, which is set by {place}")
        if dot and row not in strategies:
            raise ValueError(f"set: got {name!r}, expected one of the rows {[*strategies]}")
    return {
        row: _settings_of(base, row, kind, {**(defaults or {}).get(kind, {}), **values})
        for row, kind in strategies.items()
    }


def _settings_of(
    base: ContinualSettings, row: str, strategy: str, values: Mapping[str, Any]
) -> ContinualSettings:
    own = {n.partition(".")[2]: v for n, v in values.items() if n.startswith(f"{row}.")}
    chosen = {**{n: v for n, v in values.items() if "." not in n}, **own}
    settings = set(ContinualSettings.names())
    options = {n: v for n, v in chosen.items() if n not in settings}
    if base.strategy == strategy:
        options = {**base.strategy_options, **options}
    try:
        return base.but(
            strategy=strategy,
            strategy_options=options,
            **{n: v for n, v in chosen.items() if n in settings},
        )
    except ValueError as error:
        raise ValueError(f"{row}: {error}") from error


def _named_orders(source: Source, orders: Sequence[str] | None) -> dict[str, str | None]:
    if orders is None:
        return {"order": source.tasks}
    if not orders:
        raise ValueError("orders: got none, expected at least one")
    named: dict[str, str | None] = {}
    tasks = set(resolve_order(orders[0]))
    for number, order in enumerate(orders, start=1):
        if set(resolve_order(order)) != tasks:
            raise ValueError(f"orders: got {order!r}, expected the tasks of {orders[0]!r}")
        name = f"order{number}" if "," in order else order
        if name in named:
            raise ValueError(f"orders: got {order!r} twice")
        named[name] = order
    return named


def _check(
    rows: Mapping[str, ContinualSettings], orders: Mapping[str, Any], seeds: Sequence[int]
) -> None:
    if not rows or not seeds:
        raise ValueError(f"{'seeds' if rows else 'rows'}: got none, expected at least one")
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds: got {list(seeds)}, expected distinct ones")
    names = [ALONE_ROW, "tensorboard"]
    for row, settings in rows.items():
        require_folder_name("rows: got", row, names)
        names.append(row)
        if STRATEGIES[settings.strategy].alone:
            raise ValueError(f"rows: got 'single' for {row!r}, which has no sequence to compare")
    for place, order in enumerate(orders):
        require_folder_name("orders: got", order, [*orders][:place], appended=_APPENDED)


@dataclass(frozen=True)
class _Planned:
    """A run that the comparison needs."""

    row: str
    order: str
    seed: int
    folder: Path
    source: Source
    settings: ContinualSettings

    @property
    def done(self) -> Path:
        """The file that exists once the run is finished."""
        return self.folder / (ALONE_NAME if self.row == ALONE_ROW else "results.json")


def _plan(
    source: Source,
    rows: Mapping[str, ContinualSettings],
    orders: Mapping[str, str | None],
    seeds: Sequence[int],
    folder: Path,
) -> list[_Planned]:
    return [
        _Planned(
            row, order, seed, folder / row / f"{order}-seed{seed}",
            replace(source, tasks=orders[order], seed=seed), replace(rows[row], seed=seed),
        )
        for order in orders for seed in seeds for row in rows
    ]  # fmt: skip


def _singles(
    plan: Sequence[_Planned], alone: ContinualSettings, folder: Path
) -> dict[int, _Planned]:
    """Returns the runs of tasks learned alone, by seed; they do not depend on the order."""
    alone = replace(alone, strategy="single", strategy_options={})
    return {
        run.seed: replace(
            run,
            row=ALONE_ROW,
            folder=folder / f"seed{run.seed}",
            settings=replace(alone, seed=run.seed),
        )
        for run in reversed(plan)
    }


def _check_stored(runs: Sequence[_Planned]) -> None:
    """Raises ValueError if a folder holds a run, finished or not, other than the planned one."""
    contents: dict[int, dict[str, Any]] = {}  # tasks by seed, on which alone they depend
    for run in runs:
        file = run.folder / "run.json"
        if not file.is_file() and not run.done.is_file():
            continue
        stored = read_json(file, "settings", "source", "tasks")
        asked = {"settings": run.settings.to_dict(), "source": run.source.to_dict()}
        if run.row == ALONE_ROW:  # where the order does not matter
            asked["source"]["tasks"] = stored["source"].get("tasks")
        found = differences({name: stored[name] for name in asked}, asked)
        if found:
            raise ValueError(
                f"output_dir: {run.folder} holds a run with different settings: "
                f"{'; '.join(found)}. Use another folder, or the stored settings."
            )
        if run.seed not in contents:
            contents[run.seed] = {t.name: t.describe() for t in run.source.load_tasks()}
        there = {
            name: {n: v for n, v in task.items() if n not in ("position", "content")}
            for name, task in stored["tasks"].items()
        }
        found = differences({"tasks": there}, {"tasks": contents[run.seed]})
        if found:
            raise ValueError(
                f"output_dir: {run.folder} holds a run on different data: {'; '.join(found)}. "
                "Use another folder, or the stored data."
            )


def _alone(model: tuple[Any, Any], run: _Planned) -> dict[str, float]:
    """Scores of the tasks learned alone."""
    if run.done.is_file():
        return read_json(run.done)
    return run_alone(
        *model, run.source.load_tasks(), run.folder, run.settings, source=run.source.to_dict()
    )


def _run(model: tuple[Any, Any], run: _Planned, alone: Mapping[str, float] | None) -> None:
    base, tokenizer = model
    try:
        run_continual(
            base, tokenizer, run.source.load_tasks(), run.folder, run.settings,
            alone=alone, source=run.source.to_dict(),
        )  # fmt: skip
    finally:
        if handles(base):
            unpatch(base)
