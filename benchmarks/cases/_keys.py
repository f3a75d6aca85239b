"""Sizes of the searches over a table of keys."""

from __future__ import annotations

from dataclasses import dataclass

# An l2 score is a difference of squares.
FLOOR = 1e-5


@dataclass(frozen=True)
class Search:
    """Sizes of a search of M queries in N keys of width D, for k of them.

    Attributes:
        tile_m: queries of a tile. tile_n: keys of a tile.
        group: keys of a group, 1 where all scores are stored.
        step: queries at a time, None for all.
        splits: shares of the keys. found: different keys that are read once more, at most M for the
            nearest; None for as many as there can be.
    """

    m: int
    n: int
    d: int
    k: int = 1
    metric: str = "dot"
    tile_m: int = 64
    tile_n: int = 512
    group: int = 32
    step: int | None = None
    splits: int = 1
    found: int | None = None
    itemsize: int = 2

    @property
    def query(self) -> int:
        """Bytes of the queries."""
        return self.m * self.d * self.itemsize

    @property
    def keys(self) -> int:
        """Bytes of the keys."""
        return self.n * self.d * self.itemsize

    @property
    def tiles_m(self) -> int:
        """Tiles of queries."""
        return -(-self.m // self.tile_m)

    def rereads(self, tiles_n: int) -> dict[str, int]:
        """What the tiles of a product read again: keys by tiles of queries, and queries by those
        of keys, of which the last reads another key where it has none."""
        keys = self.tiles_m * tiles_n * self.tile_n * self.d * self.itemsize
        return {"keys": keys - self.keys, "query": (tiles_n - 1) * self.query}
