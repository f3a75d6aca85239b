"""Runs slices of the kill and hostile tools, and both once more on something that is broken.

The last line is one JSON object: by the name of each run, its exit status and its summary.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hostile
import hostile_files
import kill
import yaml

SPOILERS = hostile_files.spoilers


def ended(main: Callable[[Sequence[str]], int], *arguments: str) -> tuple[int, dict[str, Any]]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(arguments)
    return code, json.loads(printed.getvalue().splitlines()[-1])


def save_in_place(saves: kill.Saves, number: int, folder: Path) -> None:
    """As `Saves.save`, but not atomic."""
    for path in folder.iterdir():
        if path.name != "notes.txt":
            path.unlink() if path.is_file() else shutil.rmtree(path)
    shutil.copytree(saves.work / f"version{number}", folder, dirs_exist_ok=True)


def trusting(work: Path) -> hostile.Target:
    """A reader that runs what it reads."""
    work.mkdir()
    (work / "options.yaml").write_text("a: 1\n")
    return hostile.Target(
        work,
        ("options.yaml",),
        lambda folder: yaml.unsafe_load((folder / "options.yaml").read_text()),
    )


def only_code(suffix: str) -> list[hostile_files.Spoiler]:
    return [spoiler for spoiler in SPOILERS(suffix) if spoiler.name == "code"]


def main(folder: Path) -> None:
    runs = {
        "kill": ended(kill.main, "--only", "save", "race", "disk", "--kills", "3", "--races", "1"),
        "hostile": ended(hostile.main, "--files", "8", "--seed", "1"),
    }
    kill.Saves.save = save_in_place  # type: ignore[method-assign]
    runs["a save that is not atomic"] = ended(kill.main, "--only", "save", "--kills", "6")
    target = trusting(folder / "whole")
    hostile.targets = lambda _: {"config": target}
    hostile_files.spoilers = only_code
    runs["a reader that runs code"] = ended(hostile.main, "--files", "1", "--only", "config")
    print(json.dumps(runs))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
