"""Op `mixed_lora`: traffic and launches, of a group of projections at once and the base layer.

It is checked and timed inside of a layer: see `providers.Layer`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from op_case import NewTensor
from passes import INT64, Pass, Passes, Row

from sapt_fast import dispatch
from sapt_fast.ops._dropout import Dropout, drop_count
from sapt_fast.ops.projection import Projection

RANK_ALIGN = 16  # rows of h, h * w and g * w are padded to so many elements


def padded(rank: int) -> int:
    """Columns of a tensor in rank space."""
    return -(-rank // RANK_ALIGN) * RANK_ALIGN


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
        drops: dropout before the adapters. Its mask costs no traffic: each pass that needs it
            computes it from the projection's seed.
    """

    m: int
    i: int
    samples: int
    adapters: int
    members: tuple[Member, ...]
    itemsize: int = 2
    factor_itemsize: int = 2
    tile_rows: int = 128
    drops: bool = False

    @property
    def mixture(self) -> int:
        """Bytes of the weights [S, K]."""
        return 4 * self.samples * self.adapters

    def of_rows(self, j: int) -> dict[str, int]:
        """Adapter and scale of each rank row of member j."""
        rows = 4 * self.members[j].r
        return {f"row_adapter{j}": rows, f"row_scale{j}": rows}

    def seed(self, j: int) -> dict[str, int]:
        """What dropout of member j reads in a pass."""
        return {f"seed{j}": INT64} if self.drops else {}


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
        reads |= {f"a{j}": member.r * c.i * c.factor_itemsize, **c.of_rows(j), **c.seed(j)}
        writes |= {
            f"h{j}": c.m * padded(member.r) * 4,
            f"hw{j}": c.m * padded(member.r) * c.itemsize,
        }
    shrink = Pass("shrink", reads, writes, 2 * c.m * c.i * sum(m.r for m in c.members))
    products: Passes = []
    for numbers in _alike(c, range(len(c.members)), lambda m: (m.o, m.r, m.bias)):
        products += _products(c, route, numbers, "forward", (0, padded(c.members[numbers[0]].r)))
    return [shrink, *products]


def _alike(
    c: MixedLora, numbers: Iterable[int], kind: Callable[[Member], Hashable]
) -> list[list[int]]:
    """The numbers of members of one kind, as one launch serves them."""
    found: dict[Hashable, list[int]] = {}
    for j in numbers:
        found.setdefault(kind(c.members[j]), []).append(j)
    return [*found.values()]


def mixed_lora_backward(c: MixedLora, route: str, through_frozen: bool = True) -> Passes:
    """Of equal members everything in rank space from one pass over their dy, and their factors.

    g = dy B^T takes 2 M O R FLOPs; of it leave g * w in the columns through which x gets a
    gradient, h * w in those that train, and one line of partial sums of g * h per tile of rows,
    from which the gradient of the mixture follows, 0 where it is undefined and the weight is 0: the
    weights are read again for that. dA and dB read M x Rt and x or dy once more.
    dx of equal members is one sum in one pass, by pointers one pass each that adds to dx.
    """
    passes: Passes = []
    for numbers in _alike(c, range(len(c.members)), lambda m: m):
        member = c.members[numbers[0]]
        passes += _in_rank_space(c, member, numbers, through_frozen, first=not passes)
    written = False
    for numbers in _alike(c, range(len(c.members)), lambda m: (m.o, m.r, m.train)):
        member = c.members[numbers[0]]
        through = (0, padded(member.r)) if through_frozen else member.window
        passes += _products(c, route, numbers, "backward", through, written)
        written = True
    return passes


def _in_rank_space(
    c: MixedLora, member: Member, numbers: list[int], through_frozen: bool, first: bool
) -> Passes:
    """The shrink, d_mixture and the factors' gradients of some equal members."""
    columns, (start, stop) = padded(member.r), member.window
    through = (0, columns) if through_frozen else (start, stop)
    dy, trained = c.m * member.o * c.itemsize, member.train[1] - member.train[0]
    lines = -(-c.m // c.tile_rows)
    reads, writes = {"mixture": c.mixture}, {}
    pooled = {"mixture": c.mixture, **({} if first else {"d_mixture": c.mixture})}
    factor_reads, factors = {"x": c.m * c.i * c.itemsize}, {}
    for j in numbers:
        reads |= {
            f"dy{j}": dy,
            f"b{j}": member.r * member.o * c.factor_itemsize,
            f"h{j}": 4 * c.m * columns,
            **c.of_rows(j),
        }
        writes |= {
            f"gw{j}": c.m * (through[1] - through[0]) * c.itemsize,
            f"hw{j}": c.m * (stop - start) * c.itemsize,
            f"partial{j}": 4 * lines * columns,
        }
        pooled |= {f"partial{j}": 4 * lines * member.r, f"row_adapter{j}": 4 * member.r}
        factor_reads |= {f"{p}{j}": c.m * (stop - start) * c.itemsize for p in ("gw", "hw")}
        factor_reads |= {f"dy{j}": dy, **c.seed(j)}
        for grad, width in (("d_a", c.i), ("d_b", member.o)):
            factors[f"{grad}{j}"] = trained * width * c.factor_itemsize
    count = len(numbers)
    passes = [
        Pass("shrink", reads, writes, 2 * c.m * member.o * member.r * count),
        Pass("d_mixture", pooled, {"d_mixture": c.mixture}, lines * member.r * count),
    ]
    if trained:
        flops = 2 * c.m * trained * (c.i + member.o) * count
        passes.append(Pass("factors", factor_reads, factors, flops))
    return passes


def _products(
    c: MixedLora,
    route: str,
    numbers: list[int],
    direction: str,
    columns: tuple[int, int],
    accumulate: bool = False,
) -> Passes:
    """y of equal members, or the sum dx over them: [y +] source W + p q [+ bias].

    Fused it is one pass over the sources and y, 2 M O (I + R) FLOPs. By the other route the rank
    terms go first and cuBLAS adds each product onto them: y is written and read once more.
    """
    first, forward = c.members[numbers[0]], direction == "forward"
    depth, width = (c.i, first.o) if forward else (first.o, c.i)
    rank = min(columns[1], first.r) - columns[0]
    y_bytes, flops = c.m * width * c.itemsize, 2 * c.m * width
    bases, terms = {}, {}
    for j in numbers:
        source, p, q = ("x", f"hw{j}", f"b{j}") if forward else (f"dy{j}", f"gw{j}", f"a{j}")
        bases[j] = {
            source: c.m * depth * c.itemsize,
            f"weight{j}": depth * width * c.itemsize,
        }
        terms[j] = {
            p: c.m * (columns[1] - columns[0]) * c.itemsize,
            q: rank * width * c.factor_itemsize,
            **({f"bias{j}": width * c.itemsize} if forward and first.bias else {}),
            **({} if forward else c.seed(j)),
        }
    by_descriptors = c.itemsize == 2 and c.m > 64
    launches = [numbers] if forward or by_descriptors else [[j] for j in numbers]
    names = {j: f"y{j}" if forward else "dx" for j in numbers}
    passes: Passes = []
    for served in launches:
        ys = {names[j]: y_bytes for j in served}
        reads: dict[str, int] = dict(ys) if accumulate else {}
        for j in served:
            reads |= terms[j] | (bases[j] if route == "fused" else {})
        steps = rank + (depth if route == "fused" else 0)
        name = ", ".join(ys) + (" fused" if route == "fused" else " expand")
        passes.append(Pass(name, reads, ys, flops * steps * len(served)))
        accumulate = accumulate or not forward
    if route != "fused":
        for j in numbers:
            y = {names[j]: y_bytes}
            passes.append(Pass(f"{names[j]} cuBLAS", bases[j] | y, y, flops * depth, library=True))
    return passes


class Tiles(NamedTuple):
    """Rows and columns of the tiles: of y, of h and of g, and features and ranks of factors.

    The defaults are those of an H200 for one projection of 8192 rows in 16 bit and 64 ranks.
    """

    product: tuple[int, int] = (128, 256)
    shrink: tuple[int, int] = (64, 64)
    shrink_backward: tuple[int, int] = (64, 64)
    factors: tuple[int, int] = (128, 16)


H200 = Tiles()


def on_h200(ranks: int, members: int) -> Tiles:
    """The tiles of 8192 rows in 16 bit; ranks are 60, 240 or 1024."""
    if ranks == 60:
        return H200 if members == 1 else Tiles(shrink=(128, 64), shrink_backward=(128, 64))
    # Tiles of 256 columns of one projection of 240 ranks would be too few.
    columns = 128 if (ranks, members) == (240, 1) else 256
    return Tiles(shrink=(128, 128), shrink_backward=(128, columns))


def with_rereads(c: MixedLora, passes: Iterable[Pass], tiles: Tiles = H200) -> Passes:
    """The passes, each with what its tiles read again.

    A tile of a product reads all of its rows of one operand and all of its columns of the other:
    so an operand is read once for each tile of the other side. Those of cuBLAS are not known.
    """
    found = []
    for p in passes:
        times: Counter[str] = Counter()
        for j in range(len(c.members) if not p.library else 0):
            times.update(_times(c, p, j, tiles))
        again = {name: (times[name] - 1) * p.reads[name] for name in times if name in p.reads}
        found.append(replace(p, rereads=again))
    return found


def _times(c: MixedLora, p: Pass, j: int, tiles: Tiles) -> dict[str, int]:
    """How often a pass reads what it needs for member j."""

    def met(rows: int, columns: int, tile: tuple[int, int]) -> tuple[int, int]:
        return -(-rows // tile[0]), -(-columns // tile[1])

    member, dy = c.members[j], f"dy{j}"
    times = {}
    if f"h{j}" in p.writes or f"partial{j}" in p.writes:
        source, factor = ("x", f"a{j}") if f"h{j}" in p.writes else (dy, f"b{j}")
        tile = tiles.shrink if source == "x" else tiles.shrink_backward
        times[factor], times[source] = met(c.m, padded(member.r), tile)
    window = member.window[1] - member.window[0]
    if f"d_a{j}" in p.writes:
        times[f"gw{j}"], times["x"] = met(c.i, window, tiles.factors)
    if f"d_b{j}" in p.writes:
        times[f"hw{j}"], times[dy] = met(member.o, window, tiles.factors)
    if f"y{j}" in p.writes or ("dx" in p.writes and f"a{j}" in p.reads):
        forward = f"y{j}" in p.writes
        source, term, factor = ("x", f"hw{j}", f"b{j}") if forward else (dy, f"gw{j}", f"a{j}")
        rows, columns = met(c.m, member.o if forward else c.i, tiles.product)
        times |= {source: columns, term: columns, f"weight{j}": rows, factor: rows}
    return times


def roofline() -> Iterable[Row]:
    """Both ways to compute y, beside the linear layer alone."""
    for d, rank, adapters in ((1024, 60, 15), (4096, 60, 15), (4096, 240, 15), (8192, 1024, 64)):
        newest = (rank - rank // adapters, rank)
        for count in (1, 2):
            c = MixedLora(8192, d, 16, adapters, (Member(d, rank, newest),) * count)
            base, tiles = base_linear(c), on_h200(rank, count)
            sizes = f"M 8192, d {d}, R {rank}" + (f", {count} projections" if count > 1 else "")
            yield Row("base linear", sizes, base, base)
            for route in ("fused", "expand first"):
                forward = with_rereads(c, mixed_lora_forward(c, route), tiles)
                yield Row(f"mixed_lora forward, {route}", sizes, forward, base)
                for through in (True, False):
                    frozen = "" if through else ", none through frozen"
                    backward = with_rereads(c, mixed_lora_backward(c, route, through), tiles)
                    # Alone the base layer, frozen, has dx to compute.
                    yield Row(f"mixed_lora backward, {route}{frozen}", sizes, backward, base)


# --- launches ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Sizes and options of one forward and backward of `mixed_lora`."""

    name: str
    samples: int
    rows: int  # per sample
    i: int
    o: int
    ranks: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    lora_dtype: torch.dtype | None = None
    weight: str = "plain"  # plain, transposed, none
    bias: bool = False
    onto: bool = False  # the bias has rows, as the output of a quantised layer
    siblings: tuple[tuple[int, tuple[int, ...]], ...] = ()  # o and ranks of further projections
    quick: bool = False
    aligned: bool = True
    drops: bool = False  # with dropout

    def launch(self, tensor: NewTensor) -> None:
        """By every route: forward, backward in both gradient modes and for the factors alone."""
        from sapt_fast.triton_kernels.blocks import gemm_variants

        kernels = dispatch.kernels("mixed_lora", "triton")
        m = self.samples * self.rows
        x, mixture = tensor(m, self.i), tensor(self.samples, len(self.ranks), dtype=torch.float32)
        members = ((self.o, self.ranks), *self.siblings)
        projections = [self._projection(tensor, o, sum(ranks)) for o, ranks in members]
        dys = [tensor(m, o) for o, _ in members]
        newest = [[sum(ranks[:-1]), sum(ranks)] for _, ranks in members]
        seeds = [tensor(1, dtype=torch.int64) for _ in members]
        dropout = Dropout(drop_count(0.1), seeds) if self.drops else None
        for route in gemm_variants.ROUTES:
            with gemm_variants.forced(route):
                made = kernels.mixed_lora_fwd(x, mixture, projections, True, dropout)
                hs = [h for _, h in made]
                given = dys, x, mixture, projections, hs, newest
                for through_frozen in (True, False):
                    kernels.mixed_lora_bwd(*given, True, True, through_frozen, dropout)
                kernels.mixed_lora_bwd(*given, False, False, False, dropout)

    def _projection(self, tensor: NewTensor, o: int, r: int) -> Projection:
        lead = (self.samples * self.rows,) if self.onto else ()
        weight = None if self.weight == "none" else tensor(o, self.i)
        if self.weight == "transposed":
            weight = tensor(self.i, o).t()
        lora_dtype = self.lora_dtype or self.dtype
        return Projection(
            weight,
            tensor(*lead, o) if self.bias or self.onto else None,
            tensor(r, self.i, dtype=lora_dtype),
            tensor(r, o, dtype=lora_dtype),
            tensor(r, dtype=torch.int32),
            tensor(r, dtype=torch.float32),
        )


FOUR_MORE = (
    (1024, (4,) * 15), (1024, (8,) * 15), (11008, (1,) * 14 + (3,)), (11008, (16,) * 15),
)  # fmt: skip

LAUNCHES = (
    Launch("d1024", 16, 512, 1024, 1024, (4,) * 15, quick=True),
    Launch("d4096", 8, 1024, 4096, 4096, (16,) * 15, quick=True),
    Launch("short rows", 64, 48, 1024, 1024, (4,) * 15),
    Launch("short rows, many", 512, 48, 1024, 1024, (4,) * 15),
    Launch("short rows, R 240", 512, 48, 1024, 1024, (16,) * 15),
    Launch("unequal tiles", 200, 100, 1024, 1024, (4,) * 15),
    Launch("long", 32, 1024, 4096, 4096, (4,) * 15),
    Launch("long, R 240", 32, 1024, 4096, 4096, (16,) * 15),
    Launch("one adapter", 16, 512, 1024, 1024, (4,)),
    Launch("one adapter, rank 32", 16, 512, 1024, 1024, (32,)),
    Launch("one adapter, rank 64", 16, 512, 1024, 1024, (64,)),
    Launch("one adapter, rank 256", 16, 512, 1024, 1024, (256,)),
    Launch("per token", 8192, 1, 4096, 4096, (16,) * 15, quick=True),
    Launch("decode", 4, 1, 4096, 4096, (4,) * 15, quick=True),
    Launch("decode, batch 32", 32, 1, 4096, 4096, (4,) * 15),
    Launch("decode, narrow", 4, 1, 8192, 512, (4,) * 15),
    Launch("few rows", 4, 32, 1024, 1024, (4,) * 15, quick=True),
    Launch("few rows, wide", 4, 64, 4096, 4096, (4,) * 15),
    Launch("few tiles", 4, 32, 8192, 512, (4,) * 15, quick=True),
    Launch("few tiles, float32", 4, 32, 8192, 512, (4,) * 15, dtype=torch.float32),
    Launch("few tiles, odd width", 4, 32, 8190, 510, (4,) * 3, aligned=False),
    Launch("no weight", 16, 512, 4096, 4096, (4,) * 15, weight="none"),
    Launch("no weight, decode", 4, 1, 4096, 4096, (4,) * 15, weight="none"),
    Launch("quantised", 16, 512, 4096, 4096, (4,) * 15, weight="none", onto=True),
    Launch("Conv1D", 16, 512, 768, 2304, (8,) * 5, weight="transposed", bias=True),
    Launch("float32 factors", 16, 512, 1024, 1024, (4,) * 15, lora_dtype=torch.float32),
    Launch("float32 factors, d4096", 8, 1024, 4096, 4096, (16,) * 15, lora_dtype=torch.float32),
    Launch("float32 factors, decode", 4, 1, 4096, 4096, (4,) * 15, lora_dtype=torch.float32),
    Launch("float16", 16, 512, 1024, 1024, (4,) * 15, dtype=torch.float16),
    Launch("float32", 16, 512, 1024, 1024, (4,) * 15, dtype=torch.float32),
    Launch("odd width", 4, 50, 100, 100, (4,) * 3, aligned=False),
    Launch("two", 16, 512, 1024, 1024, (4,) * 15, siblings=((1024, (4,) * 15),), quick=True),
    Launch(
        "two, dropout",
        16,
        512,
        1024,
        1024,
        (4,) * 15,
        siblings=((1024, (4,) * 15),),
        quick=True,
        drops=True,
    ),
    Launch("dropout, R 240", 8, 1024, 4096, 4096, (16,) * 15, drops=True),
    Launch("dropout, few rows", 4, 32, 1024, 1024, (4,) * 15, drops=True),
    Launch("dropout, float32", 16, 512, 1024, 1024, (4,) * 15, dtype=torch.float32, drops=True),
    Launch("dropout, odd width", 4, 50, 100, 100, (4,) * 3, aligned=False, drops=True),
    Launch("five", 8, 1024, 4096, 4096, (16,) * 15, siblings=FOUR_MORE, quick=True),
    Launch("five, decode", 4, 1, 4096, 4096, (16,) * 15, siblings=FOUR_MORE),
    Launch("five, short rows", 64, 48, 1024, 1024, (4,) * 15, siblings=FOUR_MORE),
    Launch("five, per token", 8192, 1, 4096, 4096, (16,) * 15, siblings=FOUR_MORE),
    Launch("two, no weight", 16, 512, 1024, 1024, (4,) * 15, siblings=FOUR_MORE[:1], weight="none"),
    Launch(
        "two, float32 factors",
        16,
        512,
        1024,
        1024,
        (4,) * 15,
        siblings=FOUR_MORE[:1],
        lora_dtype=torch.float32,
    ),
    Launch(
        "two, float32",
        16,
        512,
        1024,
        1024,
        (4,) * 15,
        siblings=FOUR_MORE[:1],
        dtype=torch.float32,
    ),
    Launch("two, odd width", 4, 50, 100, 100, (4,) * 3, siblings=((52, (1,) * 3),), aligned=False),
)
