"""The folder of a continual run: its description, its progress and its checkpoints."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sapt_fast.continual.run import processes
from sapt_fast.continual.stored_settings import differences
from sapt_fast.files import reading as _reading
from sapt_fast.files.directories import require_unused, whole_directory
from sapt_fast.files.locks import FolderLock
from sapt_fast.files.writing import write_json
from sapt_fast.storage.description import CONFIG_FILE, STRATEGY_FILE

__all__ = ["RunFolder", "last_checkpoint"]

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"


class RunFolder:
    """Files of one run; each is complete or absent, even if the process is killed.

        run.json                    description of the run: settings, tasks, model
        state.json                  scores and attention of the tasks learned so far
        checkpoints/<n>-<task>/     adapters and router after the n-th task, and the strategy's
                                    own state in strategy.safetensors
        training/<n>-<task>/        the Trainer's checkpoints of the task being learned

    Attributes:
        scores: `scores[i]`, the scores after task i, of tasks 0 to i.
        attention: `attention[i]`, the mean weights of task i's dev inputs when it was learned.
        seconds: seconds of training and evaluation of each stage.
        peaks: peak memory of each stage in bytes; None if it is not known.
        trained: the number of trained parameters of each stage.
        resumed: whether the run was interrupted.
        complete_with: name of the file that every complete checkpoint contains.
    """

    complete_with = CONFIG_FILE

    def __init__(self, path: Path, tasks: Sequence[str]) -> None:
        self.path = path
        self.tasks = tuple(tasks)
        self.scores: list[list[float]] = []
        self.attention: list[list[float]] = []
        self.seconds: list[float] = []
        self.peaks: list[int | None] = []
        self.trained: list[int] = []
        self.resumed = False
        self._lock: FolderLock | None = None

    @classmethod
    def open(
        cls, path: Path, tasks: Sequence[str], description: Mapping[str, Any], *, resume: bool
    ) -> RunFolder:
        """Opens the run in `path`, or starts a new one, and locks the folder.

        Args:
            path: the folder; it is created if it is missing.
            tasks: names of the tasks, in learning order.
            description: JSON-ready; two runs are the same if theirs are, except under "source".
            resume: whether an existing run may be resumed.

        Raises:
            FileExistsError: if there is a run and `resume` is False, or there are other files.
            ValueError: if the run in the folder has another description (the message says which
                entries differ), a file of it is damaged, or another process runs in this folder.
        """
        folder = cls(path, tasks)
        folder._occupy()
        try:
            folder._begin(description, resume)
        except BaseException:
            folder.close()
            raise
        return folder

    def _occupy(self) -> None:
        """Locks the folder; of several processes that share a run, the first one does."""
        if not processes.is_first():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.path)
        if self._lock.acquire() is False:
            holder = self._lock.holder()
            self.close()
            raise ValueError(
                f"output_dir: {holder} already runs in {self.path}; wait for it or choose another "
                "folder"
            )

    def close(self) -> None:
        """Unlocks the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _begin(self, description: Mapping[str, Any], resume: bool) -> None:
        path = self.path
        run_file = path / "run.json"
        if not run_file.exists():
            # Tasks learned alone may exist already, and hidden files of an interrupted run.
            require_unused("output_dir", path, run_file.name, ("alone",))
            write_json(run_file, description)
            return
        if not resume:
            raise FileExistsError(
                f"output_dir: {path} holds a run; resume it or choose another folder"
            )
        stored = read_json(run_file)
        ours = json.loads(json.dumps(description))
        found = differences(_compared(stored), _compared(ours))
        if found:
            raise ValueError(
                f"output_dir: {path} holds a run with different settings: {'; '.join(found)}. "
                "Use another folder, or the stored settings."
            )
        self.read()
        self.resumed = self.resumed or not (path / "results.json").exists()

    def read(self) -> None:
        """Reads state.json, if there is one."""
        path = self.path / "state.json"
        if path.exists():
            state = read_json(path, "scores", "attention")
            self.scores = _rows(state["scores"], path)
            self.attention = _rows(state["attention"], path)
            self.read_costs()

    def read_costs(self) -> None:
        """Reads from state.json the time, memory and parameters of the run so far."""
        path = self.path / "state.json"
        state = read_json(path, "seconds")
        peaks = state.get("peaks", [])
        known = [peak for peak in peaks if peak is not None] if isinstance(peaks, list) else peaks
        trained = state.get("trained", [])
        _rows([state["seconds"], known, trained], path)
        self.seconds, self.peaks, self.trained = state["seconds"], peaks, trained
        self.resumed = bool(state.get("resumed", False))

    def write(self) -> None:
        """Writes state.json; of several processes, the first one does."""
        if not processes.is_first():
            return
        names = ("scores", "attention", "seconds", "peaks", "trained", "resumed")
        write_json(self.path / "state.json", {name: getattr(self, name) for name in names})

    def checkpoint(self, index: int) -> Path:
        """Returns the folder of the adapters after task `index`."""
        return self.path / "checkpoints" / self._name(index)

    def has_checkpoint(self, index: int) -> bool:
        """Returns whether the training of task `index` was finished."""
        try:
            whole_directory(self.checkpoint(index), self.complete_with)
        except FileNotFoundError:
            return False
        return True

    def forget_unfinished(self, index: int) -> None:
        """Deletes the strategy's state of a checkpoint of task `index` that has no adapters, which
        an interrupted run of an earlier version leaves."""
        if processes.is_first() and not self.has_checkpoint(index):
            (self.checkpoint(index) / STRATEGY_FILE).unlink(missing_ok=True)

    def training(self, index: int) -> Path:
        """Returns the Trainer's output folder for task `index`."""
        return self.path / "training" / self._name(index)

    def _name(self, index: int) -> str:
        return f"{index + 1}-{self.tasks[index]}"


def read_json(path: Path, *fields: str) -> dict[str, Any]:
    """Reads a JSON object of a run.

    Args:
        path: the file.
        fields: names that the object must have.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is damaged.
    """
    try:
        content = _reading.read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); choose another output_dir") from error
    missing = [name for name in fields if not isinstance(content, dict) or name not in content]
    if not isinstance(content, dict) or missing:
        what = f"no {missing[0]}" if missing else "no object"
        raise ValueError(f"{path} is damaged ({what}); choose another output_dir")
    return content


def read_alone(path: Path, count: int) -> list[float] | None:
    """Reads the scores of the tasks learned alone from a results.json; None if it has none.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is damaged, or does not have `count` scores.
    """
    stored = read_json(path).get("alone")
    if stored is None:
        return None
    (alone,) = _rows([stored], path)
    if len(alone) != count or not all(map(math.isfinite, alone)):
        raise ValueError(f"{path}: alone: got {str(stored)[:200]}, expected {count} finite scores")
    return alone


def _rows(value: Any, path: Path) -> list[list[float]]:
    """`value` as a list of lists of numbers; raises ValueError if it is anything else."""
    try:
        return [[math.nan if x is None else float(x) for x in row] for row in value]
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); choose another output_dir") from error


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest complete checkpoint of a Trainer; incomplete ones are deleted.

    The Trainer writes trainer_state.json last, so a checkpoint is complete if it can be read.
    """
    newest = None
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])):
        try:
            _reading.read_json(path / TRAINER_STATE)
        except (OSError, ValueError):
            logger.warning("%s is incomplete and is not used", path)
            shutil.rmtree(path)
        else:
            newest = path
    return newest


def _compared(description: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in description.items() if name != "source"}
