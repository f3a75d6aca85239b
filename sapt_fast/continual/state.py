"""The folder of a continual run: what was asked for, how far it came, its checkpoints."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sapt_fast._files import whole_directory
from sapt_fast.continual.report import write_json
from sapt_fast.continual.settings import differences

__all__ = ["RunFolder", "last_checkpoint"]

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"


class RunFolder:
    """Files of one run; each is whole or absent, whenever the process dies.

        run.json                    what was asked for
        state.json                  scores and attention of the tasks learned so far
        checkpoints/<n>-<task>/     adapters and router after the n-th task
        training/<n>-<task>/        the Trainer's checkpoints of the task being learned

    Attributes:
        scores: `scores[i]`, the scores after task i, of tasks 0 to i.
        attention: `attention[i]`, the mean weights of task i's dev inputs when it was learned.
        seconds: of training and evaluation, for each task.
    """

    def __init__(self, path: Path, tasks: Sequence[str]) -> None:
        self.path = path
        self.tasks = tuple(tasks)
        self.scores: list[list[float]] = []
        self.attention: list[list[float]] = []
        self.seconds: list[float] = []

    @classmethod
    def open(
        cls, path: Path, tasks: Sequence[str], description: Mapping[str, Any], *, resume: bool
    ) -> RunFolder:
        """The run that is in `path`, or a new one.

        Args:
            description: JSON-ready; two runs are the same if theirs are, except under "source".

        Raises:
            FileExistsError: there is a run and `resume` is False, or there are other files.
            ValueError: the run that is there was asked for something else; the message says what.
        """
        folder = cls(path, tasks)
        run_file = path / "run.json"
        if not run_file.exists():
            # Tasks learned alone may be there already, and hidden leftovers of a kill.
            names = [p.name for p in path.iterdir()] if path.is_dir() else []
            others = sorted(name for name in names if name != "alone" and name[0] != ".")
            if others:
                raise FileExistsError(
                    f"output_dir: {path} has no run.json but holds {', '.join(others[:5])}; "
                    "choose an empty folder"
                )
            write_json(run_file, description)
            return folder
        if not resume:
            raise FileExistsError(f"output_dir: {path} holds a run; resume it or choose another")
        stored = read_json(run_file)
        ours = json.loads(json.dumps(description))
        found = differences(_compared(stored), _compared(ours))
        if found:
            raise ValueError(
                f"output_dir: {path} holds a run with other settings: " + "; ".join(found)
            )
        folder.read()
        return folder

    def read(self) -> None:
        """Takes over state.json, if there is one."""
        path = self.path / "state.json"
        if path.exists():
            state = read_json(path)
            self.scores, self.attention = state["scores"], state["attention"]
            self.seconds = state["seconds"]

    def write(self) -> None:
        """Writes state.json."""
        state = {"scores": self.scores, "attention": self.attention, "seconds": self.seconds}
        write_json(self.path / "state.json", state)

    def checkpoint(self, index: int) -> Path:
        """Where the adapters after task `index` are, or will be."""
        return self.path / "checkpoints" / self._name(index)

    def has_checkpoint(self, index: int) -> bool:
        """Whether task `index` was trained to the end."""
        try:
            whole_directory(self.checkpoint(index), "sapt_config.json")
        except FileNotFoundError:
            return False
        return True

    def training(self, index: int) -> Path:
        """The Trainer's output folder for task `index`."""
        return self.path / "training" / self._name(index)

    def _name(self, index: int) -> str:
        return f"{index + 1}-{self.tasks[index]}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a run.

    Raises:
        ValueError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); choose another output_dir") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (no object); choose another output_dir")
    return content


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a Trainer; those that a kill left half-written are deleted.

    The Trainer writes trainer_state.json last, so a checkpoint is whole when that can be read.
    """
    newest = None
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])):
        try:
            json.loads((path / TRAINER_STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s is incomplete and is not used", path)
            shutil.rmtree(path)
        else:
            newest = path
    return newest


def _compared(description: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in description.items() if name != "source"}
