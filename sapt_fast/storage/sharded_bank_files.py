"""Saves banks that are sharded over processes, for any other number of processes.

torch.distributed.checkpoint writes the rows of all processes as DTensors, in safetensors files. A
saved table has the rows of trained experts only, in the order of their numbers, and is divided
evenly; loading sends each row to the process that stores its expert.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sapt_fast.files.directories import replace_directory, whole_directory
from sapt_fast.files.reading import read_json
from sapt_fast.pools.collectives import Group
from sapt_fast.pools.key_index import KeyIndex
from sapt_fast.pools.row_optimizers import ROW_OPTIMIZERS, RowOptimizer
from sapt_fast.pools.row_table import RowTable
from sapt_fast.pools.sharded_experts import RowShards, ShardedExperts
from sapt_fast.storage.bank_files import sizes_of
from sapt_fast.storage.description import require_fields, require_own_digest, write_sealed
from sapt_fast.storage.tensors import digest_of_file, require_finite
from sapt_fast.version import __version__

__all__ = ["SHARDED_BANK_FILE", "load_sharded_bank", "save_sharded_bank"]

SHARDED_BANK_FILE = _FILE = "sharded_bank.json"
_FORMAT_VERSION = 1
_FIELDS = frozenset(
    {
        *("format_version", "sapt_fast_version", "num_experts", "r", "in_features"),
        *("out_features", "dtype", "seed", "rows", "optimizer", "files", "digest"),
    }
)
_Result = TypeVar("_Result")
_Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def save_sharded_bank(
    directory: str | os.PathLike[str],
    experts: ShardedExperts,
    optimizer: RowOptimizer | None = None,
    index: KeyIndex | None = None,
) -> None:
    """Saves a bank, its optimizer and its keys; all processes call this together.

    The folder, which all of them have to reach, is replaced as a whole: after an error or a kill
    the earlier content is complete.

    Args:
        directory: the folder; an earlier bank in it is replaced, other files stay.
        experts: the bank.
        optimizer: the optimizer of `experts.bank`.
        index: this process's keys, of a kind that stores a table of keys.

    Raises:
        ValueError: if the optimizer is another bank's.
        TypeError, ValueError: if the index has product keys, or another number of keys.
        OSError: if the folder cannot be written; on every process.
    """
    bank, group = experts.bank, experts.shards.group
    if optimizer is not None and optimizer.bank is not bank:
        raise ValueError("optimizer: got one of another bank, expected that of experts.bank")
    if index is not None:
        experts.shards.require_keys(index)
    parts: dict[str, tuple[Tensor, dict[str, Tensor]]] = {"bank": _rows_of(bank.stored_rows)}
    if optimizer is not None:
        parts["optimizer"] = _rows_of(optimizer.stored_rows)
    if index is not None:
        keys, rows = index.present_keys()
        parts["keys"] = rows, {"keys": keys}
    tensors: dict[str, Tensor] = {}
    totals: dict[str, int] = {}
    for part, (ids, tables) in parts.items():
        even, totals[part] = _divided(ids, tables, experts.shards)
        tensors |= {f"{part}.{name}": _global(table, group) for name, table in even.items()}
    description = {
        "format_version": _FORMAT_VERSION,
        "sapt_fast_version": __version__,
        "num_experts": experts.num_experts,
        **sizes_of(bank),
        "seed": bank.seed,
        "rows": totals,
        "optimizer": None
        if optimizer is None
        else {"name": optimizer.name, "options": optimizer.options()},
    }
    with ExitStack() as stack:
        folder = _on_first(group, lambda: stack.enter_context(replace_directory(directory, _files)))
        _write(tensors, folder, group)
        _on_first(group, lambda: write_sealed(folder, _FILE, description))
        _on_first(group, stack.close)


def load_sharded_bank(
    directory: str | os.PathLike[str],
    experts: ShardedExperts,
    index: KeyIndex | None = None,
) -> RowOptimizer | None:
    """Loads a bank that any number of processes saved; all processes call this together.

    Args:
        directory: the folder.
        experts: a bank of the same N, r, widths and dtype; its rows and seed are replaced.
        index: this process's keys, which are replaced; needed if keys were saved.

    Returns:
        The optimizer of `experts.bank`, if its state was saved.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if a file is damaged; the message names it.
        TypeError, ValueError: if the bank or the index does not fit. After any error nothing has
            changed; all processes raise.
    """
    bank, shards = experts.bank, experts.shards
    group = shards.group
    folder = whole_directory(directory, _FILE)
    stated = read_json(folder / _FILE)
    _require_fits(stated, folder / _FILE, experts, index)
    _require_files(stated, folder, group)
    optimizer = None
    if stated["optimizer"] is not None:
        optimizer = ROW_OPTIMIZERS[stated["optimizer"]["name"]](
            bank, **stated["optimizer"]["options"]
        )
    shapes: dict[str, _Shapes] = {"bank": bank.shapes()}
    if optimizer is not None:
        shapes["optimizer"] = optimizer.stored_rows.shapes
    if "keys" in stated["rows"] and index is not None:
        shapes["keys"] = {"keys": ((index.width,), index.present_keys()[0].dtype)}
    found = {
        part: _collected(part, stated["rows"][part], tables, folder, shards, bank.home)
        for part, tables in shapes.items()
    }
    rows = RowTable(bank.num_experts, bank.shapes(), bank.home)
    _fill(rows, *found["bank"])
    if optimizer is not None:
        _fill(optimizer.stored_rows, *found["optimizer"])
    bank.adopt(rows, stated["seed"])
    if "keys" in found and index is not None:
        ids, tables = found["keys"]
        index.remove_rows(index.present_keys()[1])
        index.set_rows(ids, tables["keys"])
    return optimizer


# --- rows between processes ---


def _rows_of(rows: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return rows.used_ids(), {name: rows.used(name) for name in rows.shapes}


def _divided(
    ids: Tensor, tables: dict[str, Tensor], shards: RowShards
) -> tuple[dict[str, Tensor], int]:
    """Divides the rows of all processes evenly, in the order of their experts.

    Rows without an expert (id -1) are added, so that every process has as many.

    Returns:
        This process's part, with the column "ids"; and the number of rows over all processes.
    """
    group = shards.group
    order = ids.argsort()
    counts = group.counts(len(ids), ids.device)
    each = max(1, -(-sum(counts) // group.size))
    ends = [sum(counts[: rank + 1]) for rank in range(group.size)]

    def overlap(source: int, target: int) -> int:
        first, end = ends[source] - counts[source], ends[source]
        return max(0, min(end, (target + 1) * each) - max(first, target * each))

    sent = [overlap(group.rank, target) for target in range(group.size)]
    received = [overlap(source, group.rank) for source in range(group.size)]
    columns = {"ids": ids + shards.first, **tables}
    part = {name: group.exchange(t[order], sent, received) for name, t in columns.items()}
    missing = each - sum(received)
    padded = {
        name: torch.cat([t, t.new_full((missing, *t.shape[1:]), -1 if name == "ids" else 0)])
        for name, t in part.items()
    }
    return padded, each * group.size


def _collected(
    part: str, rows: int, shapes: _Shapes, folder: Path, shards: RowShards, device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """Reads an even part of the rows, and sends each to the process that stores its expert.

    Returns:
        Experts of this process, numbered from 0, and their rows.
    """
    group = shards.group
    each = -(-rows // group.size)
    count = max(0, min(each, rows - group.rank * each))
    columns: _Shapes = {"ids": ((), torch.int64), **shapes}
    local = {
        name: torch.empty(count, *shape, dtype=dtype, device=device)
        for name, (shape, dtype) in columns.items()
    }
    _read({f"{part}.{name}": _global(t, group, rows) for name, t in local.items()}, folder, group)
    kept = local["ids"] >= 0
    owners = shards.owner(local["ids"][kept])
    sent = torch.bincount(owners, minlength=group.size)
    received = group.exchange(sent).tolist()
    found = {name: group.exchange(t[kept], sent.tolist(), received) for name, t in local.items()}
    ids = found.pop("ids") - shards.first
    for name, table in found.items():
        require_finite(f"{folder}: {part}", {name: table})
    return ids, found


def _fill(rows: RowTable, ids: Tensor, tables: dict[str, Tensor]) -> None:
    rows.reserve(len(ids))
    rows.write(rows.add(ids), tables)


def _global(local: Tensor, group: Group, rows: int | None = None) -> Tensor:
    """Returns the DTensor of which the processes have these parts."""
    if group.group is None:
        return local
    from torch.distributed.tensor import DeviceMesh, DTensor, Shard

    mesh = DeviceMesh.from_group(group.group, local.device.type)
    shape = (len(local) * group.size if rows is None else rows, *local.shape[1:])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size(shape), stride=stride)


# --- files ---


def _write(tensors: dict[str, Any], folder: Path, group: Group) -> None:
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _unwarned(group), _raised_as(OSError, folder):
        dcp.save(tensors, storage_writer=writer, **_processes(group))


def _read(tensors: dict[str, Any], folder: Path, group: Group) -> None:
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder))
    with _unwarned(group), _raised_as(ValueError, folder):
        dcp.load(tensors, storage_reader=reader, **_processes(group))


@contextmanager
def _raised_as(kind: type[Exception], folder: Path) -> Iterator[None]:
    """Raises torch's CheckpointException, which is no `Exception`, as one."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        causes = [f"process {rank}: {cause[0]}" for rank, cause in error.failures.items()]
        raise kind(f"{folder}: {'; '.join(causes[:4])}") from error


def _processes(group: Group) -> dict[str, Any]:
    return {"process_group": group.group, "no_dist": group.group is None}


@contextmanager
def _unwarned(group: Group) -> Iterator[None]:
    """Leaves out torch's warning that one process alone is meant, which it is."""
    with warnings.catch_warnings():
        if group.group is None:
            warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
        yield


def _files(folder: Path) -> list[str]:
    """Returns the files of a folder that `save_sharded_bank` wrote."""
    try:
        stated = read_json(folder / _FILE)
    except (FileNotFoundError, ValueError):
        return []
    ours = isinstance(stated, dict) and set(stated) == _FIELDS
    return [_FILE, *stated["files"]] if ours else []


def _require_fits(
    stated: Any, source: Path, experts: ShardedExperts, index: KeyIndex | None
) -> None:
    require_fields(stated, _FORMAT_VERSION, _FIELDS, source)
    require_own_digest(stated, stated["files"], source)
    for name, value in {"num_experts": experts.num_experts, **sizes_of(experts.bank)}.items():
        if stated[name] != value:
            raise ValueError(f"{source}: {name}: got {stated[name]}, expected {value}")
    if ("keys" in stated["rows"]) != (index is not None):
        saved = "was" if "keys" in stated["rows"] else "was not"
        raise ValueError(f"index: got {index}, but an index {saved} saved in {source}")
    if index is not None:
        experts.shards.require_keys(index)


def _require_files(stated: dict[str, Any], folder: Path, group: Group) -> None:
    """Compares the digests; each process reads a part of the files, and all raise together."""
    found = []
    for name in sorted(stated["files"])[group.rank :: group.size]:
        expected = stated["files"][name]
        try:
            digest = digest_of_file(folder / name)
        except (OSError, ValueError) as error:
            found.append(f"{error}; {_FILE} states the SHA-256 of {name} as {expected}")
            continue
        if digest != expected:
            found.append(
                f"{folder / name}: its SHA-256 does not match the one in {_FILE}: it was damaged "
                f"or edited by hand (got {digest[:16]}..., expected {expected[:16]}...)"
            )
    everyone = [found]
    if group.group is not None:
        everyone = [[] for _ in range(group.size)]
        dist.all_gather_object(everyone, found, group.group)
    damaged = [message for part in everyone for message in part]
    if damaged:
        raise ValueError("; ".join(damaged[:4]))


def _on_first(group: Group, function: Callable[[], _Result]) -> _Result:
    """Runs a function in the first process; all get its result, or raise its error."""
    outcome: list[Any] = [None, None]
    if group.rank == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    if group.group is not None:
        dist.broadcast_object_list(outcome, group=group.group, group_src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: _Result = outcome[0]
    return result
