"""The folder of a continual run: what was asked for, how far it came, its checkpoints."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from sapt_fast._files import atomic_write_bytes, whole_directory
from sapt_fast.continual import processes
from sapt_fast.continual.report import write_json
from sapt_fast.continual.settings import differences

__all__ = ["RunFolder", "last_checkpoint"]

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"
STRATEGY_STATE = "strategy.safetensors"


class RunFolder:
    """Files of one run; each is whole or absent, whenever the process dies.

        run.json                    what was asked for
        state.json                  scores and attention of the tasks learned so far
        checkpoints/<n>-<task>/     adapters and router after the n-th task, and in
                                    strategy.safetensors what else the strategy remembers
        training/<n>-<task>/        the Trainer's checkpoints of the task being learned

    Attributes:
        scores: `scores[i]`, the scores after task i, of tasks 0 to i.
        attention: `attention[i]`, the mean weights of task i's dev inputs when it was learned.
        seconds: of training and evaluation, for each stage.
        peaks: bytes of memory at most, for each stage; None where it is not known.
        trained: numbers of parameters that were trained.
        resumed: whether the run was interrupted.
    """

    def __init__(self, path: Path, tasks: Sequence[str]) -> None:
        self.path = path
        self.tasks = tuple(tasks)
        self.scores: list[list[float]] = []
        self.attention: list[list[float]] = []
        self.seconds: list[float] = []
        self.peaks: list[int | None] = []
        self.trained: list[int] = []
        self.resumed = False

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
        folder.resumed = folder.resumed or not (path / "results.json").exists()
        return folder

    def read(self) -> None:
        """Takes over state.json, if there is one."""
        path = self.path / "state.json"
        if path.exists():
            state = read_json(path)
            self.scores, self.attention = state["scores"], state["attention"]
            self.read_costs()

    def read_costs(self) -> None:
        """Takes over from state.json what the run has cost so far."""
        state = read_json(self.path / "state.json")
        self.seconds, self.peaks = state["seconds"], state.get("peaks", [])
        self.trained, self.resumed = state.get("trained", []), state.get("resumed", False)

    def write(self) -> None:
        """Writes state.json; of several processes the first does."""
        if not processes.is_first():
            return
        names = ("scores", "attention", "seconds", "peaks", "trained", "resumed")
        write_json(self.path / "state.json", {name: getattr(self, name) for name in names})

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

    def save_strategy(self, index: int, state: Mapping[str, Tensor]) -> None:
        """Puts what a strategy remembers where the checkpoint of task `index` will be.

        The checkpoint counts once its adapters are there, which are written afterwards.
        """
        if state and processes.is_first():
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
            atomic_write_bytes(self.checkpoint(index) / STRATEGY_STATE, save(tensors))

    def strategy_state(self, index: int) -> dict[str, Tensor]:
        """What `save_strategy` was given for that task."""
        path = whole_directory(self.checkpoint(index), "sapt_config.json") / STRATEGY_STATE
        return load_file(path) if path.is_file() else {}

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
