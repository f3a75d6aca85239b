"""The folder of `memorise`, in which the groups of facts that are trained are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sapt_fast.files.directories import (
    read_directory,
    replace_directory,
    require_unused,
    whole_directory,
)
from sapt_fast.files.locks import FolderLock
from sapt_fast.files.reading import read_json
from sapt_fast.files.writing import write_json
from sapt_fast.methods.memory.fitting import Outcome
from sapt_fast.pools.experts import ExpertBank
from sapt_fast.storage.description import require_digest, write_sealed
from sapt_fast.storage.tensors import StoredFiles, write_tensors

__all__ = ["FactFolder", "Group"]

_RUN, _GROUP, _ROWS = "memorise.json", "group.json", "rows.safetensors"
_ADVICE = "Delete this group's folder to train it again"


class Group(NamedTuple):
    """A group of facts that is trained.

    Attributes:
        outcome: what became of its facts.
        seconds: how long it took.
    """

    outcome: Outcome
    seconds: float


class FactFolder:
    """Files of one call of `memorise`; each group is complete or absent, even after a kill.

        memorise.json         what is memorised, and how
        groups/00000/         group.json and rows.safetensors, the experts of a group

    Args:
        path: the folder.
        description: JSON-ready; a call with another one is not continued.

    Raises:
        FileExistsError: if the folder has other files.
        ValueError: if it is of another call, or another process works on it.
    """

    def __init__(self, path: Path, description: Mapping[str, Any]) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(path)
        if self._lock.acquire() is False:
            raise ValueError(
                f"folder: {self._lock.holder()} works in {path}; wait for it or choose another"
            )
        try:
            self._begin(description)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unlocks the folder."""
        self._lock.release()

    def _begin(self, description: Mapping[str, Any]) -> None:
        file = self.path / _RUN
        ours = json.loads(json.dumps(description))
        if file.exists():
            stored = read_json(file)
            if stored != ours:
                held = stored if isinstance(stored, dict) else {}
                names = sorted(n for n in {*ours, *held} if ours.get(n) != held.get(n))
                raise ValueError(
                    f"folder: {self.path} is of another call of memorise, which differs in "
                    f"{', '.join(names)}; choose another folder"
                )
            return
        require_unused("folder", self.path, _RUN)
        write_json(file, description)

    def has(self, number: int) -> bool:
        """Returns whether a group is trained."""
        try:
            whole_directory(self._of(number), _GROUP)
        except FileNotFoundError:
            return False
        return True

    def load(self, number: int, banks: Sequence[ExpertBank]) -> Group:
        """Puts the experts of a group that is trained into the banks.

        Raises:
            ValueError: if a file is damaged.
        """

        def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
            files = StoredFiles(folder)
            files.take(_GROUP)
            files.take(_ROWS)
            values, source = files.json(_GROUP), folder / _GROUP
            require_digest(values, files, [_ROWS], source, _ADVICE)
            return values, files.tensors(_ROWS)[0]

        values, tensors = read_directory(self._of(number), _GROUP, read)
        for place, bank in enumerate(banks):
            ids, a, b = (tensors[f"{place}.{name}"] for name in ("ids", "a", "b"))
            bank.write(ids.to(bank.home), a, b)
        outcome = Outcome(tensors["losses"], tensors["fits"], values["epochs"])
        return Group(outcome, values["seconds"])

    def save(
        self, number: int, group: Group, banks: Sequence[ExpertBank], ids: Tensor | None
    ) -> None:
        """Writes a group: the experts `ids` [U] of each bank; None: all that are stored."""
        tensors = {"losses": group.outcome.losses, "fits": group.outcome.fits}
        for place, bank in enumerate(banks):
            rows = bank.touched if ids is None else ids[torch.isin(ids, bank.touched.to(ids))]
            tensors[f"{place}.ids"] = rows
            tensors[f"{place}.a"], tensors[f"{place}.b"] = bank.master_rows(rows)
        values = {"epochs": group.outcome.epochs, "seconds": group.seconds}
        with replace_directory(self._of(number), lambda folder: (_GROUP, _ROWS)) as folder:
            write_tensors(folder / _ROWS, tensors)
            write_sealed(folder, _GROUP, values)

    def _of(self, number: int) -> Path:
        return self.path / "groups" / f"{number:05d}"  # whose parent is locked to replace it
