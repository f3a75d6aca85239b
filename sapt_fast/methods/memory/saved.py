"""Saves and loads `model.mome`: facts and keys in files of its own, banks in folders."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.methods.base import handles
from sapt_fast.methods.edits.handle import LoggedHandle
from sapt_fast.methods.memory.bank_folders import read_banks, remove_other_banks, save_banks
from sapt_fast.methods.memory.building import make_bank
from sapt_fast.pools.experts import ExpertBank
from sapt_fast.pools.sharded_experts import RowShards, ShardedExperts
from sapt_fast.pools.sharded_index import ShardedIndex
from sapt_fast.storage.description import writes
from sapt_fast.storage.method_files import write_method

__all__ = ["SavedMemory"]


class SavedMemory(LoggedHandle):
    """The base class of a handle with banks of experts.

    A subclass defines `parts`, `lookup`, `sharded_index` and `clear`, and fills `_banks`.

    Attributes:
        shards: which experts this process has.
    """

    shards: RowShards
    _banks: nn.ModuleList

    @property
    def banks(self) -> list[ExpertBank]:
        """The banks of experts: one, or one for each layer; of a sharded memory this process's."""
        held: list[Any] = [*self._banks]
        return [bank.bank if isinstance(bank, ShardedExperts) else bank for bank in held]

    @property
    def sharded_index(self) -> ShardedIndex | None:
        """The keys of a sharded memory; None of another one."""
        raise NotImplementedError

    def clear(self) -> None:
        """Removes all facts, keys and experts."""
        raise NotImplementedError

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        is_main_process: bool | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Saves the memory; each bank in shards in a folder of its own, whose name changes.

        So a kill leaves the earlier memory complete. Of a sharded memory all processes call this
        together; the first one writes what all have.
        """
        for one in handles(self._model):
            one.require_unmerged()
        folder, group, names = Path(directory), self.shards.group, {}
        sharded = self.sharded_index is not None
        if sharded and state is not None:
            raise ValueError(
                "state_dict: got one for a sharded memory, of which it has only this process's "
                "experts; call model.mome.save_pretrained(directory) on all processes"
            )
        tensors, values = self.content(state)
        first = group.rank == 0 if sharded else writes(self._model, is_main_process)
        if first or sharded:
            held: Any = self._banks
            if state is not None:
                held = [self._copy_of(bank, state) for bank in self.banks]
            names = save_banks(folder, held, self.sharded_index)

        def write() -> None:
            write_method(self, directory, tensors, {**values, "banks": names}, first)
            if first:
                remove_other_banks(folder, names)

        group.together(write)

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the state of router, look-ups and log, without the keys of a sharded memory."""
        tensors, values = super().stored()
        return {name: t for name, t in tensors.items() if not self._in_shards(name)}, values

    def _in_shards(self, name: str) -> bool:
        return self.sharded_index is not None and ":index." in name

    def _copy_of(self, bank: ExpertBank, state: Mapping[str, Tensor]) -> Any:
        """Returns a bank with the rows in a state_dict of the model."""
        paths = {module: path for path, module in self._model.named_modules()}
        widths = bank.in_features, bank.out_features
        copied: Any = make_bank(self.config, widths, torch.device("cpu"), "device")
        copied.restore({name: state[f"{paths[bank]}.{name}"] for name in bank.stored()})
        return copied

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Restores what `stored` returned; of a sharded memory once its keys are read."""
        if self.sharded_index is None:
            super().restore(tensors, values)
        else:
            self._unread = tensors, values

    def restore_files(self, folder: Path, values: Mapping[str, Any]) -> None:
        """Reads the banks of a saved folder, and the keys of a sharded memory.

        Raises:
            FileNotFoundError: if a bank is missing.
            ValueError: if a file is damaged; the message names it.
        """
        try:
            index = self.sharded_index
            held: Any = [*self._banks]
            unread = vars(self).pop("_unread", None)
            read_banks(folder, values["banks"], held, self.config_file, index)
            if unread is not None:
                tensors, values = unread
                keys = {n: t for n, t in super().stored()[0].items() if self._in_shards(n)}
                super().restore({**tensors, **keys}, values)
        except BaseException:
            self.clear()
            raise

    def restore_values(self, directory: str | os.PathLike[str]) -> None:
        """Sets the facts to those in a saved folder; errors as `sapt_fast.load_pretrained`.

        After an error the memory is as before, and a sharded one without facts.
        """
        stored = self.read_stored(directory)
        folder = stored.source.parent
        if self.sharded_index is not None:
            self.clear()
            self.restore(stored.tensors, stored.values)
            self.restore_files(folder, stored.values)
            return
        before = copy.deepcopy(self._state())
        banks = [(bank, bank._rows, bank.seed) for bank in self.banks]
        self.restore(stored.tensors, stored.values)
        try:
            read_banks(folder, stored.values["banks"], self.banks, self.config_file)
        except BaseException:
            for bank, rows, seed in banks:
                bank.adopt(rows, seed)
            self._restore_state(before)
            raise
