"""Traffic of `mixed_lora`, of a group of projections at once, and of the base layer."""

from __future__ import annotations

from dataclasses import dataclass

from traffic.passes import Pass, Passes

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
    from which the gradient of the mixture follows, 0 where it is undefined and the weight is 0: the
    weights are read again for that. dA and dB read M x Rt and x or dy once more.
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
                    "mixture": c.mixture,
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
