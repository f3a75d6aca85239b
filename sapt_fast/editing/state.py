"""The folder of a run: its description and its progress."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sapt_fast.continual.stored_settings import differences
from sapt_fast.editing.data import Tokens
from sapt_fast.files.directories import read_directory, replace_directory, require_unused
from sapt_fast.files.locks import FolderLock
from sapt_fast.files.reading import read_json
from sapt_fast.files.writing import write_json
from sapt_fast.storage.description import require_digest, write_sealed
from sapt_fast.storage.tensors import StoredFiles, write_tensors

__all__ = ["EDITED", "Progress", "RunFolder"]

# Within a folder of their own: replacing one locks its parent, and the run locks its own folder.
EDITED = "saved/edited"
_STATE, _PROGRESS, _TENSORS = "saved/state", "progress.json", "tensors.safetensors"
_ADVICE = "Choose another output folder, or restore this one from a backup"


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        done: the number of edits so far, those that failed among them.
        before: (prompt, answer) pairs from before the first edit.
        records: what became of each edit: its place, outcome, success at once, seconds.
        points: the measurements, each with the number of edits before it.
        edit_seconds, measure_seconds: without what an interruption lost.
        resumed: whether the run was interrupted.
    """

    done: int = 0
    before: list[tuple[Tokens, Tokens]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)
    edit_seconds: float = 0.0
    measure_seconds: float = 0.0
    resumed: bool = False


class RunFolder:
    """Files of one run; each is complete or absent, even if the process is killed.

        run.json          description: method, options, settings, digests of the data, the model
        saved/state/      replaced as a whole: progress.json and tensors.safetensors
        saved/edited/     of a finished run, for `load_pretrained`, if the method can save
        report.json, report.md, curves.png

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: FolderLock | None = None

    def open(self, description: Mapping[str, Any], *, resume: bool) -> None:
        """Starts a run, or finds the one that is there, and locks the folder.

        Args:
            description: JSON-ready; two runs are the same if theirs are, except under "source".
            resume: whether an existing run may be resumed.

        Raises:
            FileExistsError: if there is a run and `resume` is False, or there are other files.
            ValueError: if the run in the folder has another description, or another process works
                on it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.path)
        try:
            if self._lock.acquire() is False:
                raise ValueError(
                    f"output: {self._lock.holder()} already runs in {self.path}; wait for it or "
                    "choose another folder"
                )
            self._begin(description, resume)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unlocks the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _begin(self, description: Mapping[str, Any], resume: bool) -> None:
        file = self.path / "run.json"
        if not file.exists():
            require_unused("output", self.path, file.name)
            write_json(file, description)
            return
        if not resume:
            raise FileExistsError(f"output: {self.path} holds a run; resume it or choose another")
        stored = read_json(file)
        if not isinstance(stored, dict):
            raise ValueError(f"{file} is damaged; {_ADVICE}")
        ours = json.loads(json.dumps(description))
        found = differences(_compared(stored), _compared(ours))
        if found:
            raise ValueError(
                f"output: {self.path} holds a run with different settings: {'; '.join(found)}. "
                "Use another folder, or the stored settings."
            )

    def load(self) -> tuple[Progress, dict[str, Tensor]] | None:
        """Returns the saved progress and the editor's state; None if nothing was saved.

        Raises:
            ValueError: if a file is damaged.
        """

        def read(folder: Path) -> tuple[Progress, dict[str, Tensor]]:
            files = StoredFiles(folder)
            files.take(_PROGRESS)
            files.take(_TENSORS)
            content, source = files.json(_PROGRESS), folder / _PROGRESS
            try:
                require_digest(content, files, [_TENSORS], source, _ADVICE)
                values = {k: v for k, v in content.items() if k not in ("digest", "files")}
                progress = Progress(**values)
            except (AttributeError, KeyError, TypeError) as error:
                raise ValueError(f"{source} is damaged ({error}); {_ADVICE}") from None
            progress.before = [(tuple(p), tuple(a)) for p, a in progress.before]
            tensors, _ = files.tensors(_TENSORS)
            return progress, tensors

        try:
            return read_directory(self.path / _STATE, _PROGRESS, read)
        except FileNotFoundError:
            return None

    def save(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Replaces the saved progress and state together."""
        names = (_PROGRESS, _TENSORS)

        def written(folder: Path) -> list[str]:
            return [name for name in names if (folder / name).exists()]

        with replace_directory(self.path / _STATE, written) as folder:
            write_tensors(folder / _TENSORS, tensors)
            write_sealed(folder, _PROGRESS, asdict(progress))


def _compared(description: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in description.items() if name != "source"}
