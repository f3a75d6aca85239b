"""The banks in a saved folder of `model.mome`, each in shards in a folder of its own.

The folder of the first bank of a sharded memory has the keys too.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from sapt_fast.pools.experts import ExpertBank
from sapt_fast.pools.key_index.table import TableIndex
from sapt_fast.pools.sharded_experts import ShardedExperts
from sapt_fast.pools.sharded_index import ShardedIndex
from sapt_fast.storage.bank_files import BANK_FILE, read_bank, save_bank
from sapt_fast.storage.sharded_bank_files import (
    SHARDED_BANK_FILE,
    load_sharded_bank,
    save_sharded_bank,
)
from sapt_fast.storage.tensors import digest_of_file

__all__ = ["read_banks", "remove_other_banks", "save_banks"]

_BANKS = "mome_bank_"  # what the names of their folders begin with


def save_banks(
    folder: Path, banks: Iterable[ExpertBank | ShardedExperts], index: ShardedIndex | None = None
) -> dict[str, str]:
    """Saves banks under new names; returns the digests of their descriptions by these names.

    Args:
        folder: the saved folder.
        banks: the banks. Of a sharded memory, all processes call this together.
        index: of a sharded memory, the keys.
    """
    mark, names = secrets.token_hex(6), {}
    if index is not None:
        mark = index.shards.group.values(mark)[0]
    for place, bank in enumerate(banks):
        name = f"{_BANKS}{mark}_{place}"
        if isinstance(bank, ShardedExperts):
            save_sharded_bank(folder / name, bank, None, _keys(place, index))
            names[name] = digest_of_file(folder / name / SHARDED_BANK_FILE)
        else:
            save_bank(folder / name, bank)
            names[name] = digest_of_file(folder / name / BANK_FILE)
    return names


def _keys(place: int, index: ShardedIndex | None) -> TableIndex | None:
    return index.local if index is not None and place == 0 else None


def remove_other_banks(folder: Path, names: Collection[str]) -> None:
    """Deletes banks of earlier saves, with other names than those of `save_banks`."""
    for old in folder.glob(f"{_BANKS}*"):
        if old.name not in names:
            shutil.rmtree(old)


def read_banks(
    folder: Path,
    names: Mapping[str, str],
    banks: Sequence[ExpertBank | ShardedExperts],
    source: str,
    index: ShardedIndex | None = None,
) -> None:
    """Reads banks.

    Args:
        folder: the saved folder.
        names: the return value of `save_banks`.
        banks: in the order in which they were saved; those before a damaged one are read.
        source: the file with the digests, for messages.
        index: of a sharded memory, the keys, which are read too.

    Raises:
        FileNotFoundError: if a bank is missing.
        ValueError: if a file is damaged; the message names it.
    """
    if len(names) != len(banks):
        raise ValueError(f"{folder}: got {len(names)} banks, expected {len(banks)}")
    for place, (bank, (name, digest)) in enumerate(zip(banks, names.items(), strict=True)):
        sharded = isinstance(bank, ShardedExperts)
        file = folder / name / (SHARDED_BANK_FILE if sharded else BANK_FILE)
        if digest_of_file(file) != digest:
            raise ValueError(
                f"{file}: its SHA-256 does not match the one in {source}: it was damaged or copied "
                "from another folder"
            )
        if isinstance(bank, ShardedExperts):
            load_sharded_bank(folder / name, bank, _keys(place, index))
        else:
            read_bank(folder / name, bank)
