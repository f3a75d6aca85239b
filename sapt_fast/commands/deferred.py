"""Commands whose options are made when they are needed, not when the program starts."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import typer
from typer.core import TyperCommand

__all__ = ["DeferredCommand"]


class DeferredCommand(TyperCommand):
    """A command whose function returns the function that runs, with its options.

    The function imports the dataclasses that the options are made from, and with them torch. It is
    called when the command's options are needed, so that other commands and
    `sapt-fast --help` start without torch.
    """

    @cached_property
    def _command(self) -> Any:
        assert self.callback is not None
        app = typer.Typer(add_completion=False)
        app.command(name=self.name)(self.callback())
        return typer.main.get_command(app)

    @property
    def params(self) -> Any:
        """The options of the function that runs."""
        return self._command.params

    @params.setter
    def params(self, value: Any) -> None:
        """Ignores the options of the function that returns it, which has none."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the function with the options of the command line."""
        return self._command.invoke(ctx)
