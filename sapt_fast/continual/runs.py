"""Runs from raw files, as the command line starts them."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from sapt_fast.continual.loop import ALONE_NAME, Results, evaluate_run, run_alone, run_continual
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.sources import Source
from sapt_fast.continual.state import read_json

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
    model, tokenizer = source.load_model()
    tasks, note = source.load_tasks(), source.to_dict()
    scores = None
    if isinstance(alone, bool):
        if alone:
            folder = Path(output_dir) / "alone"
            scores = run_alone(
                model, tokenizer, tasks, folder, settings, resume=resume, source=note
            )
    else:
        scores = read_json(Path(alone))
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
    model, tokenizer = source.load_model()
    return run_alone(
        model, tokenizer, source.load_tasks(), output_dir, settings,
        resume=resume, source=source.to_dict(),
    )  # fmt: skip


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
    source = replace(source, model=model or source.model, data=data or source.data)
    settings = replace(
        settings,
        device=device or settings.device,
        eval_batch_size=eval_batch_size or settings.eval_batch_size,
        progress=progress,
    )
    loaded, tokenizer = source.load_model()
    results = evaluate_run(loaded, tokenizer, source.load_tasks(), folder, settings)
    return results, read_json(folder / "results.json", "scores", "metrics")
