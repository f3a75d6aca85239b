"""The banks in a saved folder of `model.mome`, each in shards in a folder of its own."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from sapt_fast.pools.experts import ExpertBank
from sapt_fast.storage.bank_files import BANK_FILE, read_bank, save_bank
from sapt_fast.storage.tensors import digest_of_file

__all__ = ["read_banks", "remove_other_banks", "save_banks"]

_BANKS = "mome_bank_"  # what the names of their folders begin with


def save_banks(folder: Path, banks: Iterable[ExpertBank]) -> dict[str, str]:
    """Saves banks under new names; returns the digests of their descriptions by these names."""
    mark, names = secrets.token_hex(6), {}
    for place, bank in enumerate(banks):
        name = f"{_BANKS}{mark}_{place}"
        save_bank(folder / name, bank)
        names[name] = digest_of_file(folder / name / BANK_FILE)
    return names


def remove_other_banks(folder: Path, names: Collection[str]) -> None:
    """Deletes banks of earlier saves, with other names than those of `save_banks`."""
    for old in folder.glob(f"{_BANKS}*"):
        if old.name not in names:
            shutil.rmtree(old)


def read_banks(
    folder: Path, names: Mapping[str, str], banks: Sequence[ExpertBank], source: str
) -> None:
    """Reads banks.

    Args:
        folder: the saved folder.
        names: the return value of `save_banks`.
        banks: in the order in which they were saved; those before a damaged one are read.
        source: the file with the digests, for messages.

    Raises:
        FileNotFoundError: if a bank is missing.
        ValueError: if a file is damaged; the message names it.
    """
    if len(names) != len(banks):
        raise ValueError(f"{folder}: got {len(names)} banks, expected {len(banks)}")
    for bank, (name, digest) in zip(banks, names.items(), strict=True):
        if digest_of_file(folder / name / BANK_FILE) != digest:
            raise ValueError(
                f"{folder / name / BANK_FILE}: its SHA-256 does not match the one in "
                f"{source}: it was damaged or copied from another folder"
            )
        read_bank(folder / name, bank)
