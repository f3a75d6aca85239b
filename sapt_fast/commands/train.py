"""`sapt-fast train`: a continual run on a model and tasks from files.

The run is imported when it starts, so that the help of the command does not load transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

import typer

from sapt_fast.checks import require_folder, require_number
from sapt_fast.commands.config_file import read_config
from sapt_fast.commands.options import (
    PANELS,
    given,
    is_from_file,
    is_given,
    option,
    with_fields,
)
from sapt_fast.commands.output import show
from sapt_fast.commands.source_options import source_of
from sapt_fast.continual.data.orders import ORDERS
from sapt_fast.continual.data.sources import Source
from sapt_fast.continual.scores.results import Results
from sapt_fast.continual.scores.tables import results_table
from sapt_fast.continual.settings import PRESETS, ContinualSettings, parse_values
from sapt_fast.files import reading as _reading
from sapt_fast.methods.task_config import TaskConfig

__all__ = ["train", "train_alone", "train_command"]

_KINDS = (ContinualSettings, TaskConfig, Source)
_FIELDS = {field.name for kind in _KINDS for field in fields(kind)}
_OFFERED = [name for names in PANELS.values() for name in names if name in _FIELDS]


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Makes the options in a file the defaults of the command line."""
    if path is not None:
        known = {parameter.name for parameter in context.command.params} - {"config"}
        context.default_map = read_config(path, {name for name in known if name})
    return path


@with_fields(["model", "kind", *_OFFERED], *_KINDS, panels=PANELS)
def train_command(
    context: typer.Context,
    output: Annotated[
        Path, option("Folder of the run; an existing run in this folder is resumed.")
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of these options (max_train: 400); options on the command line "
            "override the file.",
            callback=_read_config,
            is_eager=True,
        ),
    ] = None,
    order: Annotated[
        str | None, option(f"A published order of tasks: {', '.join(ORDERS)}.", panel="Data")
    ] = None,
    tasks: Annotated[
        str | None,
        option("Task names separated by commas, instead of --order.", panel="Data"),
    ] = None,
    preset: Annotated[
        str | None,
        option(
            f"Settings of the original SAPT code, instead of the defaults: {', '.join(PRESETS)}. "
            "They train under bfloat16 and imply --dev released.",
            panel="Training",
        ),
    ] = None,
    fwt: Annotated[
        bool, option("Learn every task alone first, to compute FWT.", panel="Training")
    ] = False,
    alone: Annotated[
        Path | None,
        option("Take the FWT reference scores from an earlier run's alone.json.", panel="Training"),
    ] = None,
    resume: Annotated[
        bool, option("Resume the run in --output if there is one.", panel="Machine")
    ] = True,
    **values: Any,
) -> None:
    """Runs `train` or `train_alone` with the options of the command line."""
    chosen = given(context, values)
    _check_together(context, chosen, fwt, alone)
    if order is not None and tasks is not None:
        order, tasks = _without_the_one_in_the_file(context, order=order, tasks=tasks).values()
    if "steps" in chosen and "epochs" in chosen:
        chosen |= _without_the_one_in_the_file(
            context, steps=chosen["steps"], epochs=chosen["epochs"]
        )
    if values["target_modules"] is not None:
        chosen["target_modules"] = [n.strip() for n in values["target_modules"].split(",")]
    for name, shown in (("strategy_options", "strategy-option"), ("generator", "generator")):
        chosen[name] = parse_values(values[name] or (), shown) or None
    source = source_of(values, preset, tasks=order if tasks is None else tasks, seed=values["seed"])
    settings = ContinualSettings.of(
        preset, **{n: v for n, v in chosen.items() if n in ContinualSettings.names()}
    )
    if settings.strategy == "single":
        scores = train_alone(source, settings, output, resume=resume)
        show(*(f"{name}: {value:.2f}" for name, value in scores.items()))
    else:
        results = train(source, settings, output, resume=resume, alone=alone or fwt)
        show(results_table(results.tasks, results.scores, results.alone, metrics=results.metrics))
    show(f"written to {output}")


def _check_together(
    context: typer.Context, chosen: Mapping[str, Any], fwt: bool, alone: Path | None
) -> None:
    """Raises ValueError for options that contradict each other."""
    if alone is not None and fwt:
        raise ValueError("alone: give --alone or --fwt, not both")
    if chosen.get("strategy") == "single" and (alone is not None or fwt):
        name = "fwt" if fwt else "alone"
        raise ValueError(f"{name}: got --{name}, but strategy 'single' has no forward transfer")
    if is_given(context, "generator") and chosen.get("replay") != "generated":
        raise ValueError(
            f"generator: got {chosen['generator']}, expected --replay generated with it"
        )


def _without_the_one_in_the_file(context: typer.Context, **values: Any) -> dict[str, Any]:
    """Two options that exclude each other, the one in the file of --config as None.

    Raises:
        ValueError: if both are on the command line, or both in the file.
    """
    by_file = [name for name in values if is_from_file(context, name)]
    if len(by_file) != 1:
        first, second = values
        raise ValueError(f"{first}: give --{first} or --{second}, not both")
    return {**values, by_file[0]: None}


def train(
    source: Source,
    settings: ContinualSettings,
    output_dir: str | PathLike[str],
    *,
    resume: bool = True,
    alone: bool | str | PathLike[str] = False,
) -> Results:
    """Calls `run_continual` on the model and the tasks of `source`.

    Args:
        source: the model and the tasks.
        settings, output_dir, resume: as in `run_continual`.
        alone: reference scores for FWT: True learns every task alone first, in
            `output_dir/alone`; a path names the alone.json of an earlier run.

    Raises:
        FileNotFoundError, ValueError: as `Source` and `run_continual`.
    """
    _check(source, settings, output_dir)
    scores = None if isinstance(alone, bool) else _scores(Path(alone))
    from sapt_fast.continual.run.loop import run_alone, run_continual

    tasks, note = source.load_tasks(), source.to_dict()
    model, tokenizer = source.load_model()
    if alone is True:
        folder = Path(output_dir) / "alone"
        scores = run_alone(model, tokenizer, tasks, folder, settings, resume=resume, source=note)
    return run_continual(
        model, tokenizer, tasks, output_dir, settings, resume=resume, alone=scores, source=note
    )


def train_alone(
    source: Source,
    settings: ContinualSettings,
    output_dir: str | PathLike[str],
    *,
    resume: bool = True,
) -> dict[str, float]:
    """Calls `run_alone` on the model and the tasks of `source`."""
    from sapt_fast.continual.run.loop import run_alone

    _check(source, settings, output_dir)
    tasks = source.load_tasks()
    model, tokenizer = source.load_model()
    return run_alone(
        model, tokenizer, tasks, output_dir, settings, resume=resume, source=source.to_dict()
    )


def _check(source: Source, settings: ContinualSettings, output_dir: str | PathLike[str]) -> None:
    """Checks folders, device and files before anything is loaded."""
    from sapt_fast.continual.run.processes import require_device

    require_folder("output_dir", output_dir)
    require_device(settings.device)
    source.check_files()


def _scores(path: Path) -> dict[str, Any]:
    """Reads an alone.json; `run_continual` checks its tasks."""
    if not path.is_file():
        raise FileNotFoundError(f"alone: got {str(path)!r}, which is no file; expected alone.json")
    try:
        scores = _reading.read_json(path)
    except ValueError as error:
        raise ValueError(f"alone: {error}") from error
    if not isinstance(scores, dict):
        raise ValueError(f"alone: {path} holds {type(scores).__name__}, expected scores by task")
    for task, score in scores.items():
        require_number(f"alone: {path}: {task}", score, most=100)
    return scores
