"""What commands print."""

from __future__ import annotations

import os
from typing import Any

import typer

__all__ = ["is_first_process", "show"]


def is_first_process() -> bool:
    """Whether this is the only process, or the first that torchrun or accelerate has started."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return not several or int(os.environ.get("RANK", "0")) == 0


def show(*results: Any) -> None:
    """Prints lines and `rich` tables; of several processes, only the first one prints."""
    from rich.console import Console

    if not is_first_process():
        return
    for result in results:
        if isinstance(result, str):
            typer.echo(result)
        else:
            Console().print(result)
