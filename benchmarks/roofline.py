"""Least bytes, FLOPs and time of every op, by formula, on one GPU.

    python benchmarks/roofline.py [--device h200] [--bandwidth TB/s] [--flops TFLOP/s] [--csv]

An op is a sequence of passes, one per launch. A pass reads every byte that it needs once, as if
the cache were perfect, and writes every byte of its results once; what one pass leaves for the
next is written and read. A pass takes its bytes over the bandwidth of a copy or its FLOPs over the
rate of a large bf16 product, whichever is longer, and an op the sum of its passes. Launches take
no time here. `tests/test_roofline.py` compares the bytes with the loads and stores of the kernels.

Letters: M rows, of S samples; I in, O out, R total rank, K adapters, B batch, T tokens, D width,
P prompt length, N keys or experts, V vocabulary; s bytes of an element, 4 unless said otherwise
for ranks, weights and scores.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

RANK_ALIGN = 16  # rows of h, h * w and g * w are padded to so many elements
INT64 = 8


class Device(NamedTuple):
    """What a kernel can reach on a GPU."""

    name: str
    bandwidth: float  # bytes per second of a large copy
    flops: float  # per second of a large bf16 product of random data


DEVICES = {"h200": Device("H200", 4.3e12, 790e12)}


@dataclass(frozen=True)
class Pass:
    """One launch: bytes read and written of each tensor, and its FLOPs.

    Attributes:
        library: cuBLAS or torch does it, not a kernel of ours.
    """

    name: str
    reads: dict[str, int]
    writes: dict[str, int]
    flops: int = 0
    library: bool = False

    @property
    def bytes(self) -> int:
        """All bytes read and written."""
        return sum(self.reads.values()) + sum(self.writes.values())

    def seconds(self, device: Device) -> float:
        """The longer of the times of bytes and FLOPs."""
        return max(self.bytes / device.bandwidth, self.flops / device.flops)

    def is_memory_bound(self, device: Device) -> bool:
        """Bytes take longer than FLOPs."""
        return self.bytes / device.bandwidth >= self.flops / device.flops


Passes = list[Pass]


def total_bytes(passes: Iterable[Pass]) -> int:
    """Bytes of all passes."""
    return sum(p.bytes for p in passes)


def total_flops(passes: Iterable[Pass]) -> int:
    """FLOPs of all passes."""
    return sum(p.flops for p in passes)


def total_seconds(passes: Iterable[Pass], device: Device) -> float:
    """Time of all passes, one after the other."""
    return sum(p.seconds(device) for p in passes)


def bound(passes: Sequence[Pass], device: Device) -> str:
    """What most of the time goes to: "memory" or "arithmetic"."""
    memory = sum(p.seconds(device) for p in passes if p.is_memory_bound(device))
    return "memory" if 2 * memory >= total_seconds(passes, device) else "arithmetic"


def padded(rank: int) -> int:
    """Columns of a tensor in rank space."""
    return -(-rank // RANK_ALIGN) * RANK_ALIGN


# --- mixed LoRA --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """A projection of the group: its output width, total rank, and rank rows that train."""

    o: int
    r: int
    train: tuple[int, int] = (0, 0)
    bias: bool = False

    @property
    def window(self) -> tuple[int, int]:
        """Columns of the rows that train, widened to whole groups."""
        start, stop = self.train
        return start // RANK_ALIGN * RANK_ALIGN, padded(stop)


@dataclass(frozen=True)
class MixedLora:
    """Sizes of `mixed_lora` on a group of projections of one x [M, I].

    Attributes:
        itemsize: of x, weights and results. factor_itemsize: of lora_a and lora_b.
        tile_rows: rows over which a partial sum of the mixture's gradient goes; it divides M / S.
    """

    m: int
    i: int
    samples: int
    adapters: int
    members: tuple[Member, ...]
    itemsize: int = 2
    factor_itemsize: int = 2
    tile_rows: int = 128

    @property
    def mixture(self) -> int:
        """Bytes of the weights [S, K]."""
        return 4 * self.samples * self.adapters

    def of_rows(self, j: int) -> dict[str, int]:
        """Adapter and scale of each rank row of member j."""
        rows = 4 * self.members[j].r
        return {f"row_adapter{j}": rows, f"row_scale{j}": rows}


def base_linear(c: MixedLora) -> Passes:
    """y = x W^T of every member by cuBLAS: 2 M I O FLOPs over x, W and y."""
    return [
        Pass(
            f"base {j}",
            {"x": c.m * c.i * c.itemsize, f"weight{j}": member.o * c.i * c.itemsize},
            {f"y{j}": c.m * member.o * c.itemsize},
            2 * c.m * c.i * member.o,
            library=True,
        )
        for j, member in enumerate(c.members)
    ]


def mixed_lora_forward(c: MixedLora, route: str) -> Passes:
    """One shrink for the group, then y of each member.

    The shrink reads x and every A once, 2 M I sum R FLOPs, and leaves h, which the backward needs
    in float32, and h * w for the product: M Rp elements each.
    """
    reads = {"x": c.m * c.i * c.itemsize, "mixture": c.mixture}
    writes: dict[str, int] = {}
    for j, member in enumerate(c.members):
        reads |= {f"a{j}": member.r * c.i * c.factor_itemsize, **c.of_rows(j)}
        writes |= {
            f"h{j}": c.m * padded(member.r) * 4,
            f"hw{j}": c.m * padded(member.r) * c.itemsize,
        }
    shrink = Pass("shrink", reads, writes, 2 * c.m * c.i * sum(m.r for m in c.members))
    products: Passes = []
    for j, member in enumerate(c.members):
        columns = (0, padded(member.r))
        products += _product(
            c, route, j, ("x", c.i), f"hw{j}", f"b{j}", columns, (f"y{j}", member.o), member.bias
        )
    return [shrink, *products]


def mixed_lora_backward(c: MixedLora, route: str, through_frozen: bool = True) -> Passes:
    """Of each member everything in rank space from one pass over dy, then its factors and dx.

    g = dy B^T takes 2 M O R FLOPs; of it leave g * w in the columns through which x gets a
    gradient, h * w in those that train, and one line of partial sums of g * h per tile of rows,
    from which the gradient of the mixture follows. dA and dB read M x Rt and x or dy once more.
    dx of the second member and on is added to what is there.
    """
    passes: Passes = []
    for j, member in enumerate(c.members):
        columns, (start, stop) = padded(member.r), member.window
        through = (0, columns) if through_frozen else (start, stop)
        dy, trained = c.m * member.o * c.itemsize, member.train[1] - member.train[0]
        lines = -(-c.m // c.tile_rows)
        passes.append(
            Pass(
                f"shrink {j}",
                {
                    f"dy{j}": dy,
                    f"b{j}": member.r * member.o * c.factor_itemsize,
                    f"h{j}": 4 * c.m * columns,
                    "mixture": c.mixture,
                    **c.of_rows(j),
                },
                {
                    f"gw{j}": c.m * (through[1] - through[0]) * c.itemsize,
                    f"hw{j}": c.m * (stop - start) * c.itemsize,
                    f"partial{j}": 4 * lines * columns,
                },
                2 * c.m * member.o * member.r,
            )
        )
        passes.append(
            Pass(
                f"d_mixture {j}",
                {
                    f"partial{j}": 4 * lines * member.r,
                    f"row_adapter{j}": 4 * member.r,
                    **({"d_mixture": c.mixture} if j else {}),
                },
                {"d_mixture": c.mixture},
                lines * member.r,
            )
        )
        for grad, p, source, width in (
            ("d_a", f"gw{j}", "x", c.i),
            ("d_b", f"hw{j}", f"dy{j}", member.o),
        ):
            if trained:
                passes.append(
                    Pass(
                        f"{grad} {j}",
                        {p: c.m * (stop - start) * c.itemsize, source: c.m * width * c.itemsize},
                        {f"{grad}{j}": trained * width * c.factor_itemsize},
                        2 * c.m * trained * width,
                    )
                )
        passes += _product(
            c, route, j, (f"dy{j}", member.o), f"gw{j}", f"a{j}", through, ("dx", c.i), False, j > 0
        )
    return passes


def _product(
    c: MixedLora,
    route: str,
    j: int,
    source: tuple[str, int],
    p: str,
    q: str,
    columns: tuple[int, int],
    out: tuple[str, int],
    bias: bool,
    accumulate: bool = False,
) -> Passes:
    """[y +] source W + p q [+ bias], the sizes named with the widths of source and y.

    Fused it is one pass over the sources and y, 2 M O (I + R) FLOPs. By the other route the rank
    term goes first and cuBLAS adds the product onto it: y is written and read once more.
    """
    (name, depth), (y, width) = source, out
    y_bytes = {y: c.m * width * c.itemsize}
    base = {
        name: c.m * depth * c.itemsize,
        f"weight{j}": depth * width * c.itemsize,
    }
    rank = min(columns[1], c.members[j].r) - columns[0]
    term = {
        p: c.m * (columns[1] - columns[0]) * c.itemsize,
        q: rank * width * c.factor_itemsize,
        **({f"bias{j}": width * c.itemsize} if bias else {}),
        **(y_bytes if accumulate else {}),
    }
    flops = 2 * c.m * width
    if route == "fused":
        return [Pass(f"{y} fused", base | term, y_bytes, flops * (depth + rank))]
    return [
        Pass(f"{y} expand", term, y_bytes, flops * rank),
        Pass(f"{y} cuBLAS", base | y_bytes, y_bytes, flops * depth, library=True),
    ]


# --- router ------------------------------------------------------------------------------------


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


# --- prompts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """Sizes of K prompts [P, D] mixed in front of B sequences of T embeddings."""

    b: int
    t: int
    d: int
    count: int
    length: int
    rows: int | None = None  # of the table that the ids name; None for embeddings as such
    itemsize: int = 2
    prompt_itemsize: int = 2

    @property
    def pool(self) -> int:
        """Bytes of all prompts."""
        return self.count * self.length * self.d * self.prompt_itemsize


def prompts_forward(c: Prompts) -> Passes:
    """A copy of B T D elements, or their gather, and 2 B K P D FLOPs for the mixture."""
    source = {"embeds": c.b * c.t * c.d * c.itemsize}
    if c.rows is not None:
        source = {"ids": INT64 * c.b * c.t, "table": c.rows * c.d * c.itemsize}
    return [
        Pass(
            "mix",
            {"prompts": c.pool, "mixture": 4 * c.b * c.count, **source},
            {"y": c.b * (c.length + c.t) * c.d * c.itemsize},
            2 * c.b * c.count * c.length * c.d,
        )
    ]


def prompts_backward(c: Prompts) -> Passes:
    """Two products with the first P rows of dy, 2 B K P D FLOPs each; the rest passes through."""
    dy = {"dy": c.b * c.length * c.d * c.itemsize}
    mixture, flops = 4 * c.b * c.count, 2 * c.b * c.count * c.length * c.d
    return [
        Pass("d_prompts", {**dy, "mixture": mixture}, {"d_prompts": c.pool}, flops),
        Pass("d_mixture", {**dy, "prompts": c.pool}, {"d_mixture": mixture}, flops),
    ]


# --- key search --------------------------------------------------------------------------------


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


# --- experts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experts:
    """Sizes of M rows that choose k of N experts of rank r, from width I to O.

    Attributes:
        chosen: different experts that are chosen; None for as many as there can be.
    """

    m: int
    k: int
    experts: int
    i: int
    o: int
    rank: int
    chosen: int | None = None
    itemsize: int = 2
    bank_itemsize: int = 2

    @property
    def pairs(self) -> int:
        """Rows times choices."""
        return self.m * self.k

    @property
    def read(self) -> int:
        """Experts that are read."""
        return min(self.pairs, self.experts) if self.chosen is None else self.chosen

    def bank(self, width: int) -> int:
        """Bytes of the factors [r, width] of the chosen experts."""
        return self.read * self.rank * width * self.bank_itemsize

    @property
    def ranks(self) -> int:
        """Bytes of h or g, [M, k, r] in float32."""
        return 4 * self.pairs * self.rank


def experts_forward(c: Experts, crowded: bool = False) -> Passes:
    """h = x A^T for each pair, then the weighted sum of h B: 2 M k r (I + O) FLOPs.

    Each chosen expert once. Crowded experts take the pairs in sorted order; their products, a
    float32 per pair and column, are written and read.
    """
    sort = [_sort(c)] if crowded else []
    return [
        *sort,
        *_into_ranks(c, ("x", c.i), "bank_a", "h", crowded),
        *_out_of_ranks(c, "h", "bank_b", ("y", c.o), crowded),
    ]


def experts_backward(c: Experts, crowded: bool = False) -> Passes:
    """The forward's two passes on dy with the banks exchanged, and 2 M k r (I + O) for banks.

    The gradients of the banks have one row for each chosen expert, and are zero before.
    """
    pairs, size = 4 * c.pairs, INT64 * c.pairs
    passes = [_sort(c), _sort(c)] if crowded else [_sort(c)]
    passes += _into_ranks(c, ("dy", c.o), "bank_b", "g", crowded)
    passes += _out_of_ranks(c, "g", "bank_a", ("dx", c.i), crowded)
    grads = {"h": c.ranks, "g": c.ranks}
    passes.append(Pass("d_weights", grads, {"d_weights": pairs}, 2 * c.pairs * c.rank, True))
    segments = {f"segment_{side}": INT64 * c.read for side in ("target", "start", "stop")}
    for grad, coefficient, (source, width) in (
        ("d_a", "g", ("x", c.i)),
        ("d_b", "h", ("dy", c.o)),
    ):
        passes += [
            Pass(f"{grad} zero", {}, {grad: c.bank(width)}, library=True),
            Pass(
                grad,
                {
                    coefficient: c.ranks,
                    "weights": pairs,
                    "order": size,
                    **segments,
                    source: c.m * width * c.itemsize,
                },
                {grad: c.bank(width)},
                2 * c.pairs * c.rank * width,
            ),
        ]
    return passes


def _sort(c: Experts) -> Pass:
    size = INT64 * c.pairs
    return Pass("sort", {"index": size}, {"order": size, "target": size}, library=True)


def _into_ranks(c: Experts, source: tuple[str, int], bank: str, h: str, crowded: bool) -> Passes:
    name, width = source
    index = {"index": INT64 * c.pairs, **({"order": INT64 * c.pairs} if crowded else {})}
    reads = {**index, name: c.m * width * c.itemsize, bank: c.bank(width)}
    return [Pass(f"{h} into ranks", reads, {h: c.ranks}, 2 * c.pairs * c.rank * width)]


def _out_of_ranks(c: Experts, h: str, bank: str, out: tuple[str, int], crowded: bool) -> Passes:
    name, width = out
    flops = 2 * c.pairs * c.rank * width
    index = {"index": INT64 * c.pairs}
    reads = {**index, "weights": 4 * c.pairs, h: c.ranks, bank: c.bank(width)}
    result = {name: c.m * width * c.itemsize}
    if not crowded:
        return [Pass(f"{name} out of ranks", reads, result, flops)]
    products = {"products": 4 * c.pairs * width}
    order = {"order": INT64 * c.pairs}
    return [
        Pass(f"{name} out of ranks", reads | order, products, flops),
        Pass(f"{name} sum", products | index, result, c.pairs * width),
    ]


# --- the table ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of the table; `base` is what its time is compared with."""

    op: str
    sizes: str
    passes: Passes
    base: Passes = field(default_factory=list)


def rows() -> list[Row]:
    """Every op at the sizes of the project's targets, bf16."""
    return [*_mixed_lora_rows(), *_other_rows()]


def _mixed_lora_rows() -> Iterable[Row]:
    for d, rank, adapters in ((1024, 60, 15), (4096, 60, 15), (4096, 240, 15), (8192, 1024, 64)):
        newest = (rank - rank // adapters, rank)
        for count in (1, 2):
            c = MixedLora(8192, d, 16, adapters, (Member(d, rank, newest),) * count)
            base = base_linear(c)
            sizes = f"M 8192, d {d}, R {rank}" + (f", {count} projections" if count > 1 else "")
            yield Row("base linear", sizes, base, base)
            for route in ("fused", "expand first"):
                forward = mixed_lora_forward(c, route)
                yield Row(f"mixed_lora forward, {route}", sizes, forward, base)
                for through in (True, False):
                    frozen = "" if through else ", none through frozen"
                    backward = mixed_lora_backward(c, route, through)
                    # Alone the base layer, frozen, has dx to compute.
                    yield Row(f"mixed_lora backward, {route}{frozen}", sizes, backward, base)


def _other_rows() -> Iterable[Row]:
    router = Router(8, 512, 1024)
    sizes = "B 8, T 512, D 1024"
    yield Row("pool_tokens forward", sizes, pool_forward(router))
    for pooling in ("max", "mean"):
        yield Row(f"pool_tokens backward, {pooling}", sizes, pool_backward(router, pooling))
    sizes = "B 8, D 1024, H 100, K 15"
    yield Row("router head forward", sizes, head_forward(router))
    yield Row("router head backward", sizes, head_backward(router))
    whole = [*pool_forward(router), *head_forward(router)]
    yield Row("router, ids to weights", "B 8, T 512, D 1024, K 15", whole)
    for d in (1024, 4096):
        prompts = Prompts(8, 512, d, 15, 10)
        sizes = f"B 8, T 512, D {d}, K 15, P 10"
        yield Row("mix_prompts forward", sizes, prompts_forward(prompts))
        yield Row("mix_prompts backward", sizes, prompts_backward(prompts))
    search = Search(64, 1_000_000, 512, 32)
    yield Row("topk_keys", "M 64, N 1e6, D 512, k 32", topk_keys(search))
    yield Row("nearest_key", "M 64, N 1e6, D 512", nearest_key(search))
    for m, k, n, rank in ((512, 32, 1_000_000, 4), (8192, 8, 1000, 16)):
        experts, crowded = Experts(m, k, n, 1024, 1024, rank), m * k > 16 * n
        sizes = f"M {m}, k {k}, N {n:.0e}, d 1024, r {rank}"
        kind = "crowded" if crowded else "scattered"
        yield Row(f"mix_experts forward, {kind}", sizes, experts_forward(experts, crowded))
        yield Row(f"mix_experts backward, {kind}", sizes, experts_backward(experts, crowded))


_COLUMNS: dict[str, Callable[[Row, Device], str]] = {
    "op": lambda row, _: row.op,
    "sizes": lambda row, _: row.sizes,
    "MB": lambda row, _: f"{total_bytes(row.passes) / 1e6:.2f}",
    "GFLOP": lambda row, _: f"{total_flops(row.passes) / 1e9:.3f}",
    "microseconds": lambda row, device: f"{total_seconds(row.passes, device) * 1e6:.2f}",
    "bound by": lambda row, device: bound(row.passes, device),
    "/ base": lambda row, device: (
        f"{total_seconds(row.passes, device) / total_seconds(row.base, device):.3f}"
        if row.base
        else ""
    ),
}


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=DEVICES, default="h200")
    parser.add_argument("--bandwidth", type=float, metavar="TB/s", help="of a copy")
    parser.add_argument("--flops", type=float, metavar="TFLOP/s", help="of a bf16 product")
    parser.add_argument("--csv", action="store_true", help="comma-separated, in full precision")
    options = parser.parse_args()
    device = DEVICES[options.device]
    for name in ("bandwidth", "flops"):
        given = getattr(options, name)
        if given is not None:
            if not given > 0:
                parser.error(f"--{name}: got {given}, expected a positive number")
            device = device._replace(**{name: given * 1e12})
    cells = [[column(row, device) for column in _COLUMNS.values()] for row in rows()]
    if options.csv:
        csv.writer(sys.stdout).writerows([list(_COLUMNS), *cells])
        return 0
    title = (
        f"Least time on {device.name}: {device.bandwidth / 1e12:g} TB/s, "
        f"{device.flops / 1e12:g} TFLOP/s, bf16; not measurements"
    )
    table = Table(title=title)
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in ("op", "sizes", "bound by") else "right")
    for line in cells:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
