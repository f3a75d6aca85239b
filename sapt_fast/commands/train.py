"""Runs from raw files, as the command line starts them."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from sapt_fast.checks import require_folder, require_number
from sapt_fast.continual.data.sources import Source
from sapt_fast.continual.run.loop import ALONE_NAME, Results, evaluate_run, run_alone, run_continual
from sapt_fast.continual.run.processes import require_device
from sapt_fast.continual.run.state import read_json
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.files import reading as _reading

__all__ = ["evaluate", "train", "train_alone"]


def train(
    source: Source,
    settings: ContinualSettings,
    output_dir: str | PathLike[str],
    *,
    resume: bool = True,
    alone: bool | str | PathLike[str] = False,
) -> Results:
    """`run_continual` on the model and the tasks of `source`.

    Args:
        alone: for FWT. True learns every task alone first, in `output_dir/alone`; or the
            alone.json of an earlier run.

    Raises:
        FileNotFoundError, ValueError: as `Source` and `run_continual`.
    """
    _check(source, settings, output_dir)
    scores = None if isinstance(alone, bool) else _scores(Path(alone))
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
    """`run_alone` on the model and the tasks of `source`."""
    _check(source, settings, output_dir)
    tasks = source.load_tasks()
    model, tokenizer = source.load_model()
    return run_alone(
        model, tokenizer, tasks, output_dir, settings, resume=resume, source=source.to_dict()
    )


def _check(source: Source, settings: ContinualSettings, output_dir: str | PathLike[str]) -> None:
    """Raises for what can be known to fail before anything is loaded."""
    require_folder("output_dir", output_dir)
    require_device(settings.device)
    source.check_files()


def _scores(path: Path) -> dict[str, Any]:
    """An alone.json; whose tasks they are is checked by `run_continual`."""
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


def evaluate(
    output_dir: str | PathLike[str],
    *,
    model: str | None = None,
    data: str | None = None,
    device: str | None = None,
    eval_batch_size: int | None = None,
    progress: bool = True,
) -> tuple[Results, dict[str, Any]]:
    """The results of a finished run computed again from its checkpoints, and the stored ones.

    Args:
        output_dir: of the run.
        model, data: where they are now, if they have moved.
        device, eval_batch_size: in place of the run's.

    Raises:
        FileNotFoundError: there is no finished run, or a file of it is missing.
        ValueError: the run is one of single tasks, was not started from files, or model or tasks
            are other ones.
    """
    folder = Path(output_dir)
    if (folder / ALONE_NAME).exists():
        raise ValueError(f"{folder} holds tasks learned alone, which have no sequence to evaluate")
    for name in ("run.json", "results.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no finished run: there is no {name}")
    run = read_json(folder / "run.json", "settings")
    if not run.get("source"):
        raise ValueError(f"{folder / 'run.json'} notes no source; use evaluate_run from Python")
    try:
        source = Source(**run["source"])
        settings = ContinualSettings.from_dict(run["settings"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'run.json'} is damaged ({error})") from error
    source = replace(
        source,
        model=source.model if model is None else model,
        data=source.data if data is None else data,
    )
    source.check_files()
    settings = replace(
        settings,
        device=settings.device if device is None else device,
        eval_batch_size=settings.eval_batch_size if eval_batch_size is None else eval_batch_size,
        progress=progress,
    )
    require_device(settings.device)
    tasks = source.load_tasks()
    loaded, tokenizer = source.load_model()
    results = evaluate_run(loaded, tokenizer, tasks, folder, settings)
    return results, read_json(folder / "results.json", "scores", "metrics")
