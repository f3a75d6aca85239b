"""Shows an answer while it is written: points side by side on a terminal, else a line for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sapt_fast.generation.events import (
    Event,
    PlainToken,
    PointDone,
    PointFailed,
    PointRestarted,
    PointToken,
    SkeletonDone,
    SkeletonToken,
)

__all__ = ["AnswerView", "event_line", "progress_of"]

_PANEL_WIDTH, _PANEL_HEIGHT = 34, 4  # the least of a point, in characters and lines


class AnswerView:
    """What has been written so far, for `rich` to render.

    Attributes:
        text: the skeleton, or the answer by ordinary decoding, so far.
        titles: of the points, once the skeleton is complete.
        points: text of each point so far.
        finished: index of each point that has ended, and whether it has an answer.
    """

    def __init__(self) -> None:
        self.text = ""
        self.titles: tuple[str, ...] = ()
        self.points: list[str] = []
        self.finished: dict[int, bool] = {}

    def add(self, event: Event) -> None:
        """Takes an event in."""
        match event:
            case SkeletonToken() | PlainToken():
                self.text += event.text
            case SkeletonDone():
                self.points = [""] * len(event.points)  # first: another thread renders
                self.titles, self.text = event.points, ""
            case PointToken():
                self.points[event.index] += event.text
            case PointRestarted():
                self.points[event.index] = ""
            case PointDone():
                self.points[event.index], self.finished[event.index] = event.text, True
            case PointFailed():
                self.points[event.index], self.finished[event.index] = event.error, False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, options.height or console.height
        if self.text or not self.titles:
            yield _tail(console, self.text, width, height - 1)
            return
        columns = max(1, min(len(self.titles), width // _PANEL_WIDTH))
        rows = max(1, min(-(-len(self.titles) // columns), (height - 1) // _PANEL_HEIGHT))
        # Points that end make room for those that do not fit.
        order = sorted(range(len(self.titles)), key=lambda index: index in self.finished)
        shown = sorted(order[: columns * rows])
        grid = Table.grid(expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1)
        inner, lines = width // columns - 4, max(1, (height - 1) // rows - 2)
        for start in range(0, len(shown), columns):
            part = shown[start : start + columns]
            texts = [_tail(console, self.points[index], inner, lines) for index in part]
            height = 3 + max(text.plain.count("\n") for text in texts)
            panels = zip(part, texts, strict=True)
            grid.add_row(*(self._panel(index, text, inner, height) for index, text in panels))
        hidden = len(self.titles) - len(shown)
        yield Group(grid, Text(f"and {hidden} more points")) if hidden else grid

    def _panel(self, index: int, text: Text, width: int, height: int) -> Panel:
        state = self.finished.get(index)
        style = "cyan" if state is None else "green" if state else "red"
        title = Text(f"{index + 1}. {_printable(self.titles[index])}", style="bold")
        title.truncate(width - 2, overflow="ellipsis")
        return Panel(text, title=title, title_align="left", border_style=style, height=height)


def event_line(event: Event, view: AnswerView) -> str | None:
    """Returns what an event says in one line; None for single tokens.

    Args:
        event: the event.
        view: has taken it in.
    """
    match event:
        case SkeletonDone():
            return f"skeleton: {len(event.points)} points"
        case PointDone() | PointFailed():
            title = " ".join(_printable(view.titles[event.index]).split())
            number = f"{len(view.finished)}/{len(view.titles)}"
            ending = f" failed: {event.error}" if isinstance(event, PointFailed) else ""
            return f"{number} point {event.index + 1}, {title}{ending}"
    return None


@contextmanager
def progress_of(shown: bool) -> Iterator[Callable[[Event], None]]:
    """Yields a function that is told every event and shows it on the standard error.

    Args:
        shown: whether to show anything. On a terminal the view disappears at the end.
    """
    view, console = AnswerView(), Console(stderr=True)
    if not shown:
        yield lambda event: None
        return
    if console.is_terminal:
        with Live(view, console=console, transient=True, refresh_per_second=8):
            yield view.add
        return

    def line(event: Event) -> None:
        view.add(event)
        text = event_line(event, view)
        if text is not None:
            console.print(Text(text), soft_wrap=True)

    yield line


def _tail(console: Console, text: str, width: int, lines: int) -> Text:
    """The last lines of a text."""
    wrapped: Any = Text(_printable(text)).wrap(console, max(1, width))
    return Text("\n").join(wrapped[-max(1, lines) :])


def _printable(text: str) -> str:
    """Without control characters, which would move the terminal's cursor."""
    return "".join(char for char in text if char.isprintable() or char == "\n")
