"""Checks of a run's tasks and settings before it starts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sapt_fast.continual.data.rows import SPLITS, TaskData
from sapt_fast.continual.run import processes
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.strategies import STRATEGIES, Strategy
from sapt_fast.continual.workbench import Workbench
from sapt_fast.files.names import require_folder_name
from sapt_fast.methods.registry import handle_type

__all__ = [
    "check_alone",
    "check_kind",
    "check_processes",
    "check_replay",
    "check_sites",
    "check_tasks",
]

_APPENDED = 40  # bytes at most that a checkpoint's folder, and hidden ones, add to a task's name


def check_tasks(tasks: Sequence[TaskData]) -> None:
    """Raises ValueError unless there are tasks, each with a distinct name and rows to use."""
    if not tasks:
        raise ValueError("tasks: got none, expected at least one")
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"tasks: got {', '.join(twice)} more than once, expected distinct names")
    for place, task in enumerate(tasks):
        require_folder_name("tasks: got the name", task.name, names[:place], appended=_APPENDED)
        for split in SPLITS:
            if not getattr(task, split):
                raise ValueError(
                    f"tasks: got {task.name!r} without {split} rows, expected at least one"
                )


def check_alone(alone: Mapping[str, float], names: Sequence[str]) -> None:
    """Raises ValueError unless `alone` has a finite score for every task."""
    missing = sorted(set(names) - set(alone))
    if missing:
        raise ValueError(f"alone: got no score for {', '.join(missing)}")
    for name in names:
        score = alone[name]
        if not isinstance(score, (int, float)) or not abs(score) <= sys.float_info.max:
            shown = str(score)[:40]
            raise ValueError(f"alone: got {shown} for {name}, expected a score in percent")


def check_replay(bench: Workbench, strategy: Strategy, tasks: Sequence[TaskData]) -> None:
    """Reads every file of pseudo-samples now, not when a task that needs it has trained.

    Raises:
        ValueError: if one cannot be read, or if an encoder should generate them.
    """
    settings = bench.settings
    if settings.replay in ("none", "real") or not strategy.pseudo:
        return
    if settings.replay == "generated":
        if not bench.writes:
            raise ValueError(
                f"replay: got 'generated', but {type(bench.model).__name__} does not generate "
                "text; expected 'real', 'none' or a folder of pseudo-samples"
            )
        return
    for task in tasks[:-1]:
        try:
            bench.kept(task)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"replay: got {settings.replay!r}, expected 'real', 'generated', 'none' "
                f"or a folder of pseudo-samples; {error}"
            ) from error


def check_kind(strategy: str, has_images: bool) -> None:
    """Raises ValueError if a strategy does not support images, or only images."""
    kind, names = STRATEGIES[strategy], "images" if has_images else "text"
    if names not in kind.data:
        others = [name for name, other in STRATEGIES.items() if names in other.data]
        raise ValueError(
            f"strategy: got {strategy!r}, which does not support {names}, expected one of "
            f"{', '.join(others)}"
        )


def check_sites(model: Any, config: Any) -> None:
    """Raises ValueError if the model cannot be patched with this config; changes nothing."""
    kind = handle_type(config.method, "config").of_model(model)
    kind.sites(model, kind.settled(model, config))


def check_processes(settings: ContinualSettings) -> None:
    """Raises ValueError if several processes would not train as one process does."""
    count, kind = processes.count(), STRATEGIES[settings.strategy]
    if settings.batch_size % count:
        raise ValueError(
            f"batch_size: got {settings.batch_size}, expected a multiple of {count}, the number of "
            "processes, each of which gets an equal part"
        )
    if count > 1 and settings.replay == "generated":
        raise ValueError(
            "replay: got 'generated' in several processes, expected a folder of pseudo-samples; "
            "generate them in one process"
        )
    options = kind.options_of(settings.strategy, settings.strategy_options)
    if count > 1 and kind.adds_to_loss(options):
        raise ValueError(
            f"strategy: {settings.strategy!r} does not support several processes: each would add "
            "its loss term separately. Run it in one."
        )
