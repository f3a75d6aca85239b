"""Traffic of `mix_experts`."""

from __future__ import annotations

from dataclasses import dataclass

from traffic.passes import INT64, Pass, Passes


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
    weights = {"weights": 4 * c.pairs}  # a pair whose weight is 0 takes no part
    reads = {**index, **weights, h: c.ranks, bank: c.bank(width)}
    result = {name: c.m * width * c.itemsize}
    if not crowded:
        return [Pass(f"{name} out of ranks", reads, result, flops)]
    products = {"products": 4 * c.pairs * width}
    order = {"order": INT64 * c.pairs}
    return [
        Pass(f"{name} out of ranks", reads | order, products, flops),
        Pass(f"{name} sum", {**products, **index, **weights}, result, c.pairs * width),
    ]
