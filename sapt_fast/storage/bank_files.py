"""The files of a bank of experts: trained rows in shards, and the state of their optimizer.

A folder has
- `bank.json`: sizes, dtype, seed, options of the optimizer, and a digest of every file;
- `index.safetensors`: the trained experts, and a checksum of each row;
- `experts-*.safetensors`: A (`down`) and B (`up`) of `shard_rows` experts each;
- `rest-*.safetensors`: of a bank in bfloat16, what rounding took (`pools.split_floats`);
- `optimizer-*.safetensors`: the moments of as many experts.

Untouched experts are not stored: they follow from the seed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sapt_fast.checks import require_count
from sapt_fast.files.directories import read_directory, replace_directory
from sapt_fast.files.mapped import MappedTensors
from sapt_fast.files.reading import read_json
from sapt_fast.pools.experts import ExpertBank
from sapt_fast.pools.mapped_rows import MappedRows, row_checks
from sapt_fast.pools.row_optimizers import ROW_OPTIMIZERS, RowOptimizer
from sapt_fast.pools.row_table import RowTable, require_ids
from sapt_fast.storage.description import (
    require_fields,
    require_file_digest,
    require_own_digest,
    write_sealed,
)
from sapt_fast.storage.tensors import StoredFiles, write_tensors
from sapt_fast.version import __version__

__all__ = ["BANK_FILE", "load_bank", "read_bank", "save_bank", "sizes_of", "write_bank"]

BANK_FILE = "bank.json"
_INDEX = "index.safetensors"
_FORMAT_VERSION = 1
_FIELDS = frozenset(
    {
        *("format_version", "sapt_fast_version", "num_experts", "r", "in_features"),
        *("out_features", "dtype", "seed", "rows", "shard_rows", "optimizer", "files", "digest"),
    }
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SHARD_BYTES = 2**30


# --- writing ---


def save_bank(
    directory: str | os.PathLike[str],
    bank: ExpertBank,
    optimizer: RowOptimizer | None = None,
    *,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Saves a bank, and the state of its optimizer, in a folder that is replaced as a whole.

    After an error or a kill, the earlier content is complete. A bank of storage "mapped" then reads
    from the new files, and frees the memory of the rows that had changed. It keeps its rows if
    another process has replaced the folder in the meantime.

    Args:
        directory: the folder; an earlier bank in it is replaced, other files stay.
        bank: the bank.
        optimizer: its optimizer; without one, training can be continued with a new one only.
        shard_bytes: size of the largest file, but at least one expert.

    Raises:
        ValueError: if the optimizer is another bank's, or the bank is a part of a larger one.
        ValueError: if a shard of a mapped bank is damaged.
        OSError: if the folder cannot be written, for example on a full disk.
    """
    with replace_directory(directory, bank_files) as folder:
        write_bank(folder, bank, optimizer, shard_bytes=shard_bytes)
        written = read_json(folder / BANK_FILE)["digest"]

    def reopen(folder: Path) -> None:
        stated, _, rows = _read_rows(folder, bank)
        if stated["digest"] == written:
            bank.adopt(rows, stated["seed"])

    if bank.storage == "mapped":
        read_directory(directory, BANK_FILE, reopen)


def write_bank(
    folder: Path,
    bank: ExpertBank,
    optimizer: RowOptimizer | None = None,
    *,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Writes the files of a bank into an empty folder, as `save_bank`, but not atomically.

    Use it inside of `replace_directory`, for a bank that is saved with other files.
    """
    require_count("shard_bytes", shard_bytes, most=2**40)
    _require_whole(bank)
    if optimizer is not None and optimizer.bank is not bank:
        raise ValueError("optimizer: got one of another bank, expected this bank's")
    rows, ids = bank.stored_rows, bank.touched.cpu()
    row_bytes = sum(
        torch.Size(shape).numel() * dtype.itemsize for shape, dtype in rows.shapes.values()
    )
    shard_rows = max(1, shard_bytes // row_bytes)
    checks: dict[str, list[Tensor]] = {name: [] for name in rows.shapes}
    for number, part in _shards(len(ids), shard_rows):
        at = rows.find(ids[part].to(rows.device))
        for kind, names in _kinds(bank).items():
            tensors = {name: rows.gather(name, at).cpu() for name in names}
            for name, tensor in tensors.items():
                checks[name].append(row_checks(tensor))
            write_tensors(folder / _shard_file(kind, number), tensors)
    empty = [torch.empty(0, dtype=torch.int64)]
    joined = {f"{name}_checks": torch.cat(empty + parts) for name, parts in checks.items()}
    write_tensors(folder / _INDEX, {"ids": ids, **joined})
    description = {
        "format_version": _FORMAT_VERSION,
        "sapt_fast_version": __version__,
        "num_experts": bank.num_experts,
        **sizes_of(bank),
        "seed": bank.seed,
        "rows": len(ids),
        "shard_rows": shard_rows,
        "optimizer": None,
    }
    if optimizer is not None:
        description["optimizer"] = _write_optimizer(folder, optimizer, shard_rows)
    write_sealed(folder, BANK_FILE, description)


def _write_optimizer(folder: Path, optimizer: RowOptimizer, shard_rows: int) -> dict[str, Any]:
    state = optimizer.state_dict()
    ids = state["ids"]
    for number, part in _shards(len(ids), shard_rows):
        tensors = {name: tensor[part] for name, tensor in state["tensors"].items()}
        write_tensors(folder / _shard_file("optimizer", number), {"ids": ids[part], **tensors})
    return {"name": state["name"], "options": state["options"], "rows": len(ids)}


def bank_files(folder: Path) -> list[str]:
    """Returns the files of a folder that `write_bank` wrote; none if it has no bank."""
    try:
        description = read_json(folder / BANK_FILE)
    except (FileNotFoundError, ValueError):
        return []
    if not isinstance(description, dict) or not set(description) >= _FIELDS:
        return []
    return [BANK_FILE, *description["files"]]


# --- reading ---


def load_bank(
    directory: str | os.PathLike[str],
    *,
    storage: str = "device",
    cache_rows: int = 4096,
    device: torch.device | str = "cpu",
) -> tuple[ExpertBank, RowOptimizer | None]:
    """Loads a bank that `save_bank` wrote.

    Args:
        directory: the folder.
        storage, cache_rows, device: as for `ExpertBank`. With "mapped", rows stay in the files, and
            each is compared with its checksum when it is read; else all files are compared with
            their digests.

    Returns:
        The bank, and its optimizer if its state was saved.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if a file is damaged; the message names it.
        ValueError: if the format version is unknown.
    """

    def read(folder: Path) -> tuple[ExpertBank, RowOptimizer | None]:
        stated = _description(folder)
        bank = ExpertBank(
            stated["num_experts"],
            stated["r"],
            stated["in_features"],
            stated["out_features"],
            dtype=_DTYPES[stated["dtype"]],
            storage=storage,
            cache_rows=cache_rows,
            device=device,
        )
        return bank, read_bank(folder, bank)

    return read_directory(directory, BANK_FILE, read)


def read_bank(folder: Path, bank: ExpertBank) -> RowOptimizer | None:
    """Replaces the rows and the seed of a bank by those of a folder.

    Args:
        folder: which `write_bank` wrote.
        bank: of the same r, widths and dtype. N may differ, if all stored experts are below it.

    Returns:
        The optimizer, if its state was saved.

    Raises:
        FileNotFoundError, ValueError: as `load_bank`.
        ValueError: if the bank does not fit. After any error the bank is unchanged.
    """
    stated, files, rows = _read_rows(folder, bank)
    optimizer = _read_optimizer(files, stated, bank)
    bank.adopt(rows, stated["seed"])
    return optimizer


def _read_rows(
    folder: Path, bank: ExpertBank
) -> tuple[dict[str, Any], StoredFiles, RowTable | MappedRows]:
    """Returns the description and the rows of a folder, whose other files can be taken."""
    _require_whole(bank)
    stated, source = _description(folder), folder / BANK_FILE
    for name, value in sizes_of(bank).items():
        if stated[name] != value:
            raise ValueError(f"{source}: {name}: got {stated[name]}, expected {value}")
    files = StoredFiles(folder)
    index = _taken(files, _INDEX, stated)
    checked = {f"{name}_checks": ((), torch.int64) for name in bank.shapes()}
    _require_tensors(folder / _INDEX, index, {"ids": ((), torch.int64), **checked}, stated["rows"])
    require_ids(f"{folder / _INDEX}: ids", index["ids"], bank.num_experts)
    read = _mapped if bank.storage == "mapped" else _filled
    return stated, files, read(files, index, stated, bank)


def _mapped(
    files: StoredFiles, index: dict[str, Tensor], stated: dict[str, Any], bank: ExpertBank
) -> MappedRows:
    shards: dict[str, list[MappedTensors]] = {name: [] for name in bank.shapes()}
    for number, part in _shards(stated["rows"], stated["shard_rows"]):
        for kind, names in _kinds(bank).items():
            name = _shard_file(kind, number)
            with _named(name, stated):
                shard = MappedTensors(files.folder / name)
            shapes = {name: bank.shapes()[name] for name in names}
            _require_tensors(shard.path, shard.tensors, shapes, part.stop - part.start)
            for table in names:
                shards[table].append(shard)
    checks = {name: index[f"{name}_checks"] for name in bank.shapes()}
    return MappedRows(
        bank.num_experts, bank.shapes(), index["ids"], shards, stated["shard_rows"], checks
    )


def _filled(
    files: StoredFiles, index: dict[str, Tensor], stated: dict[str, Any], bank: ExpertBank
) -> RowTable:
    rows = RowTable(bank.num_experts, bank.shapes(), bank.home)
    rows.reserve(stated["rows"])
    at = rows.add(index["ids"].to(bank.home))
    for number, part in _shards(stated["rows"], stated["shard_rows"]):
        for kind, names in _kinds(bank).items():
            name = _shard_file(kind, number)
            tensors = _taken(files, name, stated)
            shapes = {name: bank.shapes()[name] for name in names}
            _require_tensors(files.folder / name, tensors, shapes, part.stop - part.start)
            rows.write(at[part], tensors)
    return rows


def _read_optimizer(
    files: StoredFiles, stated: dict[str, Any], bank: ExpertBank
) -> RowOptimizer | None:
    kept = stated["optimizer"]
    if kept is None:
        return None
    if kept["name"] not in ROW_OPTIMIZERS:
        raise ValueError(
            f"{files.folder / BANK_FILE}: optimizer: got {kept['name']!r}, expected one of "
            f"{sorted(ROW_OPTIMIZERS)}"
        )
    optimizer = ROW_OPTIMIZERS[kept["name"]](bank, **kept["options"])
    rows = optimizer.stored_rows
    rows.reserve(kept["rows"])
    for number, part in _shards(kept["rows"], stated["shard_rows"]):
        name = _shard_file("optimizer", number)
        tensors, path = _taken(files, name, stated), files.folder / name
        shapes = {"ids": ((), torch.int64), **rows.shapes}
        _require_tensors(path, tensors, shapes, part.stop - part.start)
        ids = tensors.pop("ids")
        require_ids(f"{path}: ids", ids, bank.num_experts)
        rows.write(rows.add(ids.to(rows.device)), tensors)
    return optimizer


def _description(folder: Path) -> dict[str, Any]:
    """Reads and checks bank.json.

    Raises:
        FileNotFoundError, ValueError: as `load_bank`.
    """
    source = folder / BANK_FILE
    stated = read_json(source)
    require_fields(stated, _FORMAT_VERSION, _FIELDS, source)
    require_own_digest(stated, stated["files"], source)  # before its values are used
    kinds = ["experts"] if stated["dtype"] == "float32" else ["experts", "rest"]
    counts = dict.fromkeys(kinds, stated["rows"])
    counts["optimizer"] = stated["optimizer"]["rows"] if stated["optimizer"] else 0
    names = [
        _shard_file(kind, number)
        for kind, rows in counts.items()
        for number, _ in _shards(rows, stated["shard_rows"])
    ]
    require_own_digest(stated, [_INDEX, *names], source)
    return stated


def _taken(files: StoredFiles, name: str, stated: dict[str, Any]) -> dict[str, Tensor]:
    """Reads one file, compares its digest, and returns its tensors.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is damaged.
    """
    with _named(name, stated):
        files.take(name)
    require_file_digest(stated, files, name, files.folder / BANK_FILE)
    return files.tensors(name)[0]


@contextmanager
def _named(name: str, stated: dict[str, Any]) -> Iterator[None]:
    """Adds the stated digest to the message if a file is missing."""
    try:
        yield
    except FileNotFoundError as error:
        digest = stated["files"][name]
        raise FileNotFoundError(f"{error}; {BANK_FILE} states its SHA-256 as {digest}") from None


# --- both ---


def sizes_of(bank: ExpertBank) -> dict[str, Any]:
    """Returns what a folder and a bank must have in common."""
    return {
        "r": bank.r,
        "in_features": bank.in_features,
        "out_features": bank.out_features,
        "dtype": str(bank.dtype).removeprefix("torch."),
    }


def _require_whole(bank: ExpertBank) -> None:
    """Raises ValueError for a part of a larger bank, whose place the files do not state."""
    if bank.first:
        raise ValueError(
            f"bank: got a part of a larger one, from expert {bank.first} on, expected a whole one; "
            "use storage.sharded_bank_files"
        )


def _kinds(bank: ExpertBank) -> dict[str, list[str]]:
    """Returns the tables by the kind of file that has them."""
    rest = [name for name in bank.shapes() if name.endswith("_rest")]
    return {"experts": ["down", "up"], **({"rest": rest} if rest else {})}


def _shards(rows: int, shard_rows: int) -> Iterator[tuple[int, slice]]:
    """Yields number and rows of each shard."""
    for number, start in enumerate(range(0, rows, shard_rows)):
        yield number, slice(start, min(rows, start + shard_rows))


def _shard_file(kind: str, number: int) -> str:
    return f"{kind}-{number:05d}.safetensors"


def _require_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    rows: int,
) -> None:
    """Raises ValueError unless a file has just these tables, with this number of rows."""
    found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    expected = {name: ((rows, *shape), dtype) for name, (shape, dtype) in shapes.items()}
    if found != expected:
        raise ValueError(f"{path}: got tensors {found}, expected {expected}")
