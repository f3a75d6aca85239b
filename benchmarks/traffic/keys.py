"""Traffic of the searches over a table of keys: `nearest_key` and `topk_keys`."""

from __future__ import annotations

from dataclasses import dataclass

from traffic.passes import INT64, Pass, Passes


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


def nearest_key(c: Search) -> Passes:
    """Every key once, 2 M N D FLOPs and 2 N D for norms; then the winners' distances."""
    best = {"best": INT64 * c.m * c.splits}
    found = c.m if c.found is None else c.found
    return [
        Pass(
            "stream", {"query": c.query, "keys": c.keys}, best, 2 * c.m * c.n * c.d + 2 * c.n * c.d
        ),
        Pass(
            "merge",
            {**best, "query": c.query, "keys": found * c.d * c.itemsize, "radius": 4 * found},
            {"index": INT64 * c.m, "distance": 4 * c.m, "nearest": INT64 * c.m},
            3 * c.m * c.d,
        ),
    ]


def topk_keys(c: Search) -> Passes:
    """Every key once for each `kept` results, 2 M N D FLOPs; M N is never stored.

    What a share keeps is M kept pairs of 8 bytes. Later passes read the bound of the one before.
    Cosine and l2 need squared norms: those of the queries in a pass of their own.
    """
    passes: Passes = []
    squares = {} if c.metric == "dot" else {"squares": 4 * c.m}
    norms = 0 if c.metric == "dot" else 2 * c.n * c.d
    if squares:
        passes.append(Pass("squares", {"query": c.query}, squares, 2 * c.m * c.d))
    pairs = {"pairs": INT64 * c.m * c.kept * c.splits}
    for first in range(0, c.k, c.kept):
        bounds = {"bound": INT64 * c.m} if c.k > c.kept else {}
        results = min(c.kept, c.k - first)
        passes += [
            Pass(
                "stream",
                {"query": c.query, "keys": c.keys, **squares, **(bounds if first else {})},
                pairs,
                2 * c.m * c.n * c.d + norms,
            ),
            Pass(
                "merge",
                pairs,
                {"scores": 4 * c.m * results, "index": INT64 * c.m * results, **bounds},
            ),
        ]
    return passes
