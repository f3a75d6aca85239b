"""The progress bar of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(
    total: int, done: int, shown: bool
) -> Iterator[Callable[[int, float | None], None]]:
    """Yields a function that is told the number of edits and their success so far.

    Args:
        total: the number of edits.
        done: how many an earlier process has made.
        shown: whether to show the bar, on the standard error.
    """
    if not shown:
        yield lambda done, success: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("edits"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[success]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("edits", total=total, completed=done, success="")

        def advance(done: int, success: float | None) -> None:
            shown = "" if success is None else f"success {success:.1%}"
            bar.update(task, completed=done, success=shown)

        yield advance
