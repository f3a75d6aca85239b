"""Traffic of `pool_tokens` and of the router's head, which follows it."""

from __future__ import annotations

from dataclasses import dataclass

from traffic.passes import INT64, Pass, Passes


@dataclass(frozen=True)
class Router:
    """Sizes of one routed batch, from token ids [B, T] of a table [V, D] to weights [B, K].

    Attributes:
        distinct: different ids among those that take part; None for all different.
        kept: tokens that take part; None for all.
        splits: ranges into which the tokens of a sample are cut.
        itemsize: of the table and of every parameter.
    """

    b: int
    t: int
    d: int
    hidden: int = 100
    keys: int = 15
    vocabulary: int = 32128
    distinct: int | None = None
    kept: int | None = None
    masked: bool = False
    splits: int = 1
    itemsize: int = 2

    @property
    def tokens(self) -> int:
        """Tokens that take part."""
        return self.b * self.t if self.kept is None else self.kept

    @property
    def rows(self) -> int:
        """Rows of the table that are read."""
        return min(self.tokens, self.vocabulary) if self.distinct is None else self.distinct


def pool_forward(c: Router, winner: bool = False) -> Passes:
    """Reads an id per token and each row of the table once; B T D is not stored.

    With several splits their float32 results go through memory to a second pass. One comparison
    or addition per element of B T D.
    """
    part = c.splits > 1
    lines = c.b * c.splits * c.d
    reads = {
        "ids": INT64 * c.tokens,
        "table": c.rows * c.d * c.itemsize,
        **({"mask": INT64 * c.b * c.t} if c.masked else {}),
    }
    result = {"pooled": c.b * c.d * c.itemsize, **({"winner": 4 * c.b * c.d} if winner else {})}
    if not part:
        return [Pass("pool", reads, result, c.tokens * c.d)]
    parts = {"part": 4 * lines, "count": 4 * c.b * c.splits}
    if winner:
        parts["part_winner"] = 4 * lines
    return [Pass("pool", reads, parts, c.tokens * c.d), Pass("merge", parts, result, lines)]


def pool_backward(c: Router, pooling: str, elements: int | None = None) -> Passes:
    """A zero table, and the sums of dy over it.

    "max" adds an element of dy to the row of its winner: at most B D, `elements`, different
    places. "mean" sorts the ids and adds B T rows of dy in their order, one sum per distinct id.
    """
    dy = {"dy": c.b * c.d * c.itemsize}
    zero = Pass("zero", {}, {"d_table": c.vocabulary * c.d * c.itemsize}, library=True)
    if pooling == "max":
        places = c.b * c.d if elements is None else elements
        reads = {**dy, "winner": 4 * c.b * c.d}
        return [zero, Pass("max grad", reads, {"d_table": places * c.itemsize}, c.b * c.d)]
    ids = INT64 * c.b * c.t
    return [
        zero,
        Pass("sort", {"ids": ids}, {"sorted": ids, "order": ids, "end": ids}, library=True),
        Pass(
            "mean grad",
            {**dy, "sorted": ids, "order": INT64 * c.tokens, "end": ids, "share": 4 * c.b},
            {"d_table": c.rows * c.d * c.itemsize},
            2 * c.tokens * c.d,
        ),
    ]


def head_forward(c: Router, ranked: bool = False) -> Passes:
    """From the pooled embedding to the weights: 2 B (2 H D + K D) FLOPs over the parameters.

    hidden, query and scores of a sample leave a program's registers to be read by its other
    threads: B (H + D + K) float32, and with top-k the weights once more.
    """
    scratch = {"hidden": 4 * c.b * c.hidden, "query": 4 * c.b * c.d, "scores": 4 * c.b * c.keys}
    weights = {"weights": 4 * c.b * c.keys}
    reads = {
        "pooled": c.b * c.d * c.itemsize,
        **_head_parameters(c),
        **scratch,
        **(weights if ranked else {}),
    }
    flops = 2 * c.b * c.d * (2 * c.hidden + c.keys)
    return [Pass("head", reads, scratch | weights, flops)]


def head_backward(c: Router) -> Passes:
    """Torch's: the query again, then twice its products, and 4 B K D FLOPs for keys and query."""
    parameters = _head_parameters(c)
    weights = 4 * c.b * c.keys
    pooled = c.b * c.d * c.itemsize
    reads = {"pooled": pooled, **parameters, "weights": weights, "d_weights": weights}
    writes = {"d_pooled": pooled, **{f"d_{name}": size for name, size in parameters.items()}}
    flops = 4 * c.b * c.d * (3 * c.hidden + c.keys)
    return [Pass("head grad", reads, writes, flops, library=True)]


def _head_parameters(c: Router) -> dict[str, int]:
    d = c.d * c.itemsize
    return {
        "down": c.hidden * d, "up": c.hidden * d, "norm_weight": d, "norm_bias": d,
        "keys": c.keys * d,
    }  # fmt: skip
