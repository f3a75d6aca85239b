"""The rows of a saved bank, read from its files when they are chosen; changed rows in memory."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sapt_fast.files.mapped import MappedTensors
from sapt_fast.pools.id_map import IdMap
from sapt_fast.pools.row_table import RowTable

__all__ = ["MappedRows", "row_checks"]


class MappedRows:
    """As `RowTable`, but the rows of the start are in files, which are never written.

    A row that is written is kept in memory from then on. A checksum is compared whenever a row is
    read from a file.

    Args:
        num_ids: N; ids are 0 to N - 1.
        shapes: shape and dtype of one row of each table.
        ids: [T] int64, the id of each row in the files.
        shards: by table, its files; each has the next rows of the table, [rows, *shape], in the
            order of `ids`. All but the last have `shard_rows` rows.
        shard_rows: as above.
        checks: by table, [T] int64, the `row_checks` of its rows.

    Attributes:
        device: the CPU.
        shapes: as above.
        rows_read: number of rows of tables that were read from files.
    """

    device = torch.device("cpu")

    @torch.inference_mode(False)
    def __init__(
        self,
        num_ids: int,
        shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        ids: Tensor,
        shards: Mapping[str, Sequence[MappedTensors]],
        shard_rows: int,
        checks: Mapping[str, Tensor],
    ) -> None:
        self.shapes = dict(shapes)
        self._changed = RowTable(num_ids, shapes, self.device)
        self._shards, self._shard_rows, self._checks = dict(shards), shard_rows, dict(checks)
        self._ids = ids
        self._in_file = IdMap(num_ids, self.device)  # without those that have changed since
        self._in_file.set(ids, torch.arange(len(ids)))
        self._unchanged = len(ids)
        self.rows_read = 0

    # The rows of the files are numbered 0 to T - 1, those in memory from T on.

    def __len__(self) -> int:
        return self._unchanged + len(self._changed)

    @property
    def nbytes(self) -> int:
        """Number of bytes in memory: changed rows, and what finds and checks the others."""
        tensors = self._ids, *self._checks.values()
        found = self._changed.nbytes + self._in_file.nbytes
        return found + sum(tensor.nbytes for tensor in tensors)

    def used_ids(self) -> Tensor:
        kept = self._in_file.find(self._ids) >= 0
        return torch.cat([self._ids[kept], self._changed.used_ids()])

    def used(self, name: str) -> Tensor:
        """Returns a copy of the rows of a table, [len, *shape]."""
        return self.gather(name, self.find(self.used_ids()))

    def find(self, ids: Tensor) -> Tensor:
        changed = self._changed.find(ids)
        return torch.where(changed >= 0, changed + len(self._ids), self._in_file.find(ids))

    def add(self, ids: Tensor) -> Tensor:
        """As `RowTable.add`; a row of a file gets one in memory with undefined values."""
        self._leave_out(ids)
        return self._changed.add(ids) + len(self._ids)

    def read(self, at: Tensor) -> dict[str, Tensor]:
        return {name: self.gather(name, at) for name in self.shapes}

    def gather(self, name: str, at: Tensor) -> Tensor:
        shape, dtype = self.shapes[name]
        out = torch.empty(len(at), *shape, dtype=dtype)
        changed = at >= len(self._ids)
        out[changed] = self._changed.gather(name, at[changed] - len(self._ids))
        places = (~changed).nonzero().squeeze(1)
        number = at[places] // self._shard_rows
        for shard in number.unique().tolist():
            here = places[number == shard]
            out[here] = self._from_file(name, shard, at[here])
        return out

    def write(self, at: Tensor, values: Mapping[str, Tensor]) -> None:
        """Writes rows that `add` returned."""
        self._changed.write(at - len(self._ids), values)

    def remove(self, ids: Tensor) -> None:
        self._changed.remove(ids)
        self._leave_out(ids)

    def _leave_out(self, ids: Tensor) -> None:
        self._unchanged -= int((self._in_file.find(ids) >= 0).sum())
        self._in_file.drop(ids)

    def _from_file(self, name: str, shard: int, at: Tensor) -> Tensor:
        """Returns rows of a file after comparing their checksums."""
        file = self._shards[name][shard]
        rows = file.tensors[name][at - shard * self._shard_rows]
        self.rows_read += len(at)
        wrong = row_checks(rows) != self._checks[name][at]
        if wrong.any():
            bad = self._ids[at[wrong]]
            raise ValueError(
                f"{file.path}: {name}: the checksums of {len(bad)} experts ({bad[:8].tolist()}) do "
                "not match: it was damaged or edited by hand. Restore it from a backup"
            )
        return rows


def row_checks(rows: Tensor) -> Tensor:
    """Returns the CRC-32 of each of the rows [U, ...], [U] int64."""
    flat = rows.contiguous().view(len(rows), -1).view(torch.uint8).numpy()
    return torch.tensor([zlib.crc32(row) for row in flat], dtype=torch.int64)
