"""A call of `model.mome.memorise` that `kill.py` kills, with the save of the memory behind it."""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
from functools import partial
from pathlib import Path
from typing import Any

import dying
import forked
import torch

import sapt_fast
from sapt_fast.demo.backbone import load_backbone
from sapt_fast.methods.mome import MomeConfig

__all__ = ["Memory"]

PATIENCE = 120.0
FACTS = [([5 + i, 6, 7 + 2 * i], [9 + i, 20, 1]) for i in range(6)]


class Memory:
    """Six facts in three groups, memorised into a folder and saved; and what this comes to.

    Args:
        work: an empty folder.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self._numbers = itertools.count()
        config = MomeConfig(num_experts=256, k=4, components=6, epochs=100, learning_rate=0.1)
        self.model = sapt_fast.patch(load_backbone(), config)
        generator = torch.Generator().manual_seed(0)
        self.model.mome.fit_router([*torch.randint(3, 60, (20, 5), generator=generator)])
        self.ways = dying.Ways(lambda: self.run(self.work / f"measured{os.getpid()}"))
        whole = self.folder()
        self.expected = ""
        self.expected = self._finished(whole)

    def folder(self) -> Path:
        """A new folder."""
        return self.work / f"run{next(self._numbers)}"

    def run(self, folder: Path) -> None:
        """Memorises, or resumes what was killed, and saves the memory."""
        model: Any = copy.deepcopy(self.model)
        model.mome.memorise(FACTS, until=0.3, batch_size=2, folder=folder / "run", progress=False)
        model.mome.save_pretrained(folder / "saved")

    def broken_checkpoint(self, folder: Path) -> str:
        """What is wrong with a memory that was saved already."""
        if not (folder / "saved" / "mome_config.json").exists():
            return ""
        ended = forked.run(partial(digest, folder / "saved"), timeout=PATIENCE)
        if ended.problem:
            return f"the saved memory does not load: {ended.problem}"
        return "" if ended.value == self.expected else "the saved memory is another one"

    def finished(self, folder: Path) -> str:
        """Resumes to the end; what is wrong with what it comes to."""
        try:
            found = self._finished(folder)
        except RuntimeError as error:
            return str(error)
        return "" if found == self.expected else "comes to other experts"

    def _finished(self, folder: Path) -> str:
        for call in (partial(self.run, folder), partial(digest, folder / "saved")):
            ended = forked.run(call, timeout=PATIENCE)
            if ended.problem:
                raise RuntimeError(f"cannot be resumed: {ended.problem}")
        return str(ended.value)


def digest(folder: Path) -> str:
    """Of the bits of experts, keys and facts of a saved memory."""
    model = sapt_fast.load_pretrained(load_backbone(), folder)
    found = hashlib.sha256()
    for bank in model.mome.banks:
        order = bank.touched.argsort()
        ids = bank.touched[order]
        for tensor in (ids, *bank.master_rows(ids)):
            found.update(tensor.numpy().tobytes())
    for part in model.mome.parts().values():
        for name, tensor in sorted(part.state_dict().items()):
            found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()
