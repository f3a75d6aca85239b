"""`sapt-fast eval`: the metrics of a finished run, computed again from its checkpoints."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from sapt_fast.commands.output import show
from sapt_fast.continual.data.sources import Source
from sapt_fast.continual.run.loop import ALONE_NAME, Results, evaluate_run
from sapt_fast.continual.run.processes import require_device
from sapt_fast.continual.run.state import read_json
from sapt_fast.continual.scores.tables import results_table
from sapt_fast.continual.settings import ContinualSettings

__all__ = ["evaluate", "show_evaluation"]


def show_evaluation(output_dir: str | PathLike[str], **options: Any) -> None:
    """Prints what `evaluate` returns, with the largest difference to the stored results."""
    results, stored = evaluate(output_dir, **options)
    show(results_table(results.tasks, results.scores, results.alone, metrics=results.metrics))
    show(f"largest deviation from results.json: {results.deviation(stored):.3g}")


def evaluate(
    output_dir: str | PathLike[str],
    *,
    model: str | None = None,
    data: str | None = None,
    device: str | None = None,
    eval_batch_size: int | None = None,
    progress: bool = True,
) -> tuple[Results, dict[str, Any]]:
    """Computes the results of a finished run again from its checkpoints.

    Args:
        output_dir: the run's folder.
        model, data: their folders now, if they have moved.
        device, eval_batch_size: override those of the run.
        progress: show progress bars.

    Returns:
        The new results, and the content of the stored results.json.

    Raises:
        FileNotFoundError: if there is no finished run, or a file of it is missing.
        ValueError: if the run learned each task alone or was not started from files, or the model
            or the tasks have changed.
    """
    folder = Path(output_dir)
    if (folder / ALONE_NAME).exists():
        raise ValueError(f"{folder} holds tasks learned alone, which have no sequence to evaluate")
    for name in ("run.json", "results.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no finished run: there is no {name}")
    run = read_json(folder / "run.json", "settings")
    if not run.get("source"):
        raise ValueError(f"{folder / 'run.json'} names no source; use evaluate_run from Python")
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
