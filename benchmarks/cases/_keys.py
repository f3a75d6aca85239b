"""Sizes of the searches over a table of keys."""

from __future__ import annotations

from dataclasses import dataclass

# An l2 score is a difference of squares.
FLOOR = 1e-5


@dataclass(frozen=True)
class Search:
    """Sizes of a search of M queries in N keys of width D, for k of them.

    Attributes:
        kept: pairs that a pass over the keys finds; more take several passes.
        splits: shares of the keys. found: different nearest keys, at most M.
    """

    m: int
    n: int
    d: int
    k: int = 1
    metric: str = "dot"
    kept: int = 32
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
