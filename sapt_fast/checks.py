"""Checks options; errors have the form `name: got X, expected Y`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

__all__ = ["MOST", "require_choice", "require_count", "require_folder", "require_number"]

MOST = 2**31 - 1
MOST_SEED = 2**32 - 1  # numpy takes no larger one


def require_count(name: str, value: Any, *, least: int = 1, most: int = MOST) -> None:
    """Raises ValueError unless the value is an int in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(
            f"{name}: got {_shown(value)}, expected a whole number of at least {least} and at most "
            f"{most}"
        )


def require_number(
    name: str, value: Any, *, least: float = 0.0, most: float = float(MOST), positive: bool = False
) -> None:
    """Raises ValueError unless the value is a number in [least, most], above 0 if `positive`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not least <= value <= most or (positive and value <= 0):  # NaN is in no range
        lowest = "above 0" if positive else f"of at least {least:g}"
        raise ValueError(
            f"{name}: got {_shown(value)}, expected a number {lowest} and at most {most:g}"
        )


def require_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises ValueError unless the value is one of the choices."""
    allowed = list(choices)
    if not any(value == choice and type(value) is type(choice) for choice in allowed):
        raise ValueError(
            f"{name}: got {_shown(value)}, expected one of {', '.join(map(str, allowed))}"
        )


def require_folder(name: str, path: str | os.PathLike[str]) -> None:
    """Checks a path at which a folder will be written.

    Args:
        name: the option's name, for the message.
        path: the path.

    Raises:
        ValueError: if the path is empty or has a NUL character.
        NotADirectoryError: if it, or one of its parents, is a file.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise ValueError(f"{name}: got {text!r}, expected a folder")
    place = os.path.abspath(text)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise NotADirectoryError(f"{name}: got {text!r}, but {place} is not a folder")


def _shown(value: Any) -> str:
    """Returns the repr of a value, shortened in the middle."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:40]}...{text[-20:]}"
