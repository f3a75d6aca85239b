"""Op `mix_experts`: sizes, traffic and launches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from op_case import Draw, Inputs, NewTensor, OpCase, Timed
from passes import INT64, Pass, Passes, Row
from torch import Tensor

from sapt_fast import dispatch
from sapt_fast.ops import mix_experts
from sapt_fast.ops.mix_experts import pair_groups, pair_order


@dataclass(frozen=True)
class ExpertsCase(OpCase):
    """A mixture of experts: scattered over a large bank, or crowded on a small one."""

    rows: int
    k: int
    experts: int
    rank: int
    width: int
    op: str = "mix_experts"
    trains: tuple[str, ...] = ("x", "bank_a", "bank_b", "weights")

    def inputs(self, dtype: torch.dtype, device: str) -> Inputs:
        draw, shape = Draw(dtype, device), (self.experts, self.rank, self.width)
        return {
            "x": draw(self.rows, self.width),
            "bank_a": draw(*shape, scale=self.width**-0.5),
            "bank_b": draw(*shape),
            "index": draw.integers(self.experts, self.rows, self.k),
            "weights": draw.weights(self.rows, self.k),
        }

    def run(self, inputs: Inputs, backend: str) -> dict[str, Tensor]:
        return {"y": mix_experts(*inputs.values(), backend=backend)}

    def rivals(self, inputs: Inputs) -> dict[str, Callable[[], object]]:
        x, bank_a, bank_b, index, weights = inputs.values()

        def plain() -> Tensor:
            h = torch.bmm(bank_a[index].flatten(1, 2), x.unsqueeze(2)).view(*index.shape, -1)
            h = (h * weights.unsqueeze(2)).to(x.dtype).flatten(1)
            return torch.bmm(h.unsqueeze(1), bank_b[index].flatten(1, 2)).squeeze(1)

        return {"torch": plain}

    def moved_bytes(self, dtype: torch.dtype) -> int:
        chosen = min(self.experts, self.rows * self.k)
        elements = 2 * self.width * (chosen * self.rank + self.rows)
        return elements * dtype.itemsize + self.rows * self.k * 12


CHECKED = (
    ExpertsCase(256, 8, 20_000, 4, 1024),
    ExpertsCase(2048, 8, 500, 16, 1024),
    ExpertsCase(1001, 3, 50, 5, 100),
)
CHECKED_QUICK = (ExpertsCase(6, 3, 50, 4, 32), ExpertsCase(128, 8, 32, 4, 32))
TIMED = (
    Timed(
        ExpertsCase(512, 32, 100_000, 4, 1024),
        CHECKED_QUICK[0],
        "mix_experts, scattered",
        over_torch=1.0,
    ),
    Timed(
        ExpertsCase(8192, 8, 1000, 16, 1024),
        CHECKED_QUICK[1],
        "mix_experts, crowded",
        over_torch=1.0,
    ),
)
# Timed by both ways of the Triton kernels.
WAYS = tuple(
    ExpertsCase(4096, 8, 32768 // per_expert, rank, 1024)
    for rank in (4, 16, 64)
    for per_expert in (2, 4, 8, 16, 64)
)
WAYS_QUICK = (ExpertsCase(32, 4, 4, 4, 32),)
CPU_CHECKED = (ExpertsCase(256, 8, 2000, 4, 256), ExpertsCase(1001, 3, 50, 5, 100))
CPU_TIMED = (
    (ExpertsCase(1, 32, 100_000, 1, 1024), torch.float32),
    (ExpertsCase(64, 8, 10_000, 4, 1024), torch.float32),
    (ExpertsCase(64, 8, 10_000, 4, 1024), torch.bfloat16),
    (ExpertsCase(512, 8, 100, 16, 1024), torch.float32),
)
CPU_TIMED_QUICK = ((CHECKED_QUICK[0], torch.float32),)


# --- traffic -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experts:
    """Sizes of M rows that choose k of N experts of rank r, from width I to O.

    Attributes:
        chosen: different experts that are chosen; None for as many as there can be.
        tile: pairs of a tile, where crowded experts take them in sorted order.
    """

    m: int
    k: int
    experts: int
    i: int
    o: int
    rank: int
    chosen: int | None = None
    tile: int = 64
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

    def bank_again(self, width: int, crowded: bool) -> int:
        """Bytes of the bank that are read again: by each pair, or by each tile of sorted pairs.

        The latter at most, if every tile begins with the expert with which the last one ends.
        """
        reads = self.read + -(-self.pairs // self.tile) - 1 if crowded else self.pairs
        return (reads - self.read) * self.rank * width * self.bank_itemsize

    @property
    def ranks(self) -> int:
        """Bytes of h or g, [M, k, r] in float32."""
        return 4 * self.pairs * self.rank


def experts_forward(c: Experts, crowded: bool = False) -> Passes:
    """h = x A^T for each pair, then the weighted sum of h B: 2 M k r (I + O) FLOPs.

    Each chosen expert once. Crowded experts take the pairs in sorted order; their products, a
    float32 per pair and column, are written and read. Where the banks are trained, the sort runs
    for scattered experts too: the backward reads its result.
    """
    keys = {"index": INT64 * c.pairs, "weights": 4 * c.pairs}
    sort = [Pass("sort", keys, {"order": INT64 * c.pairs}, library=True)] if crowded else []
    return [
        *sort,
        *_into_ranks(c, ("x", c.i), "bank_a", "h", crowded),
        *_out_of_ranks(c, "h", "bank_b", ("y", c.o), crowded),
    ]


def experts_backward(c: Experts, crowded: bool = False) -> Passes:
    """The forward's two passes on dy with the banks exchanged, and 2 M k r (I + O) for banks.

    The gradients of the banks have one row for each chosen expert. The order of the pairs is the
    forward's.
    """
    pairs, size = 4 * c.pairs, INT64 * c.pairs
    keys = {"index": size, "weights": pairs, "order": size}
    passes = [Pass("targets", keys, {"target": size}, library=True)]
    passes += _into_ranks(c, ("dy", c.o), "bank_b", "g", crowded)
    passes += _out_of_ranks(c, "g", "bank_a", ("dx", c.i), crowded)
    grads = {"h": c.ranks, "g": c.ranks}
    passes.append(Pass("d_weights", grads, {"d_weights": pairs}, 2 * c.pairs * c.rank, True))
    segments = {f"segment_{side}": INT64 * c.read for side in ("target", "start", "stop")}
    for grad, coefficient, (source, width) in (
        ("d_a", "g", ("x", c.i)),
        ("d_b", "h", ("dy", c.o)),
    ):
        passes.append(
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
                rereads={source: (c.k - 1) * c.m * width * c.itemsize},
            )
        )
    return passes


def _into_ranks(c: Experts, source: tuple[str, int], bank: str, h: str, crowded: bool) -> Passes:
    name, width = source
    index = {"index": INT64 * c.pairs, **({"order": INT64 * c.pairs} if crowded else {})}
    reads = {**index, name: c.m * width * c.itemsize, bank: c.bank(width)}
    again = {name: (c.k - 1) * reads[name], bank: c.bank_again(width, crowded)}
    flops = 2 * c.pairs * c.rank * width
    return [Pass(f"{h} into ranks", reads, {h: c.ranks}, flops, rereads=again)]


def _out_of_ranks(c: Experts, h: str, bank: str, out: tuple[str, int], crowded: bool) -> Passes:
    name, width = out
    flops = 2 * c.pairs * c.rank * width
    index = {"index": INT64 * c.pairs}
    weights = {"weights": 4 * c.pairs}  # a pair whose weight is 0 takes no part
    reads = {**index, **weights, h: c.ranks, bank: c.bank(width)}
    result = {name: c.m * width * c.itemsize}
    again = {bank: c.bank_again(width, crowded)}
    if not crowded:
        return [Pass(f"{name} out of ranks", reads, result, flops, rereads=again)]
    products = {"products": 4 * c.pairs * width}
    order = {"order": INT64 * c.pairs}
    return [
        Pass(f"{name} out of ranks", reads | order, products, flops, rereads=again),
        Pass(f"{name} sum", {**products, **index, **weights}, result, c.pairs * width),
    ]


def roofline() -> Iterable[Row]:
    """Scattered over many experts, and crowded on few."""
    for m, k, n, rank in ((512, 32, 1_000_000, 4), (8192, 8, 1000, 16)):
        experts, crowded = Experts(m, k, n, 1024, 1024, rank), m * k > 16 * n
        sizes = f"M {m}, k {k}, N {n:.0e}, d 1024, r {rank}"
        kind = "crowded" if crowded else "scattered"
        yield Row(f"mix_experts forward, {kind}", sizes, experts_forward(experts, crowded))
        yield Row(f"mix_experts backward, {kind}", sizes, experts_backward(experts, crowded))


# --- launches ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Sizes of one sparse mixture of experts."""

    name: str
    m: int
    d: int
    rank: int
    k: int
    experts: int = 100_000
    dtype: torch.dtype = torch.bfloat16
    bank_dtype: torch.dtype | None = None
    quick: bool = False
    aligned: bool = True

    def launch(self, tensor: NewTensor) -> None:
        """Forward and backward to everything."""
        kernels = dispatch.kernels("mix_experts", "triton")
        x, bank_dtype = tensor(self.m, self.d), self.bank_dtype or self.dtype
        bank = tensor(self.experts, self.rank, self.d, dtype=bank_dtype)
        index = tensor(self.m, self.k, dtype=torch.int64)
        weights = tensor(self.m, self.k, dtype=torch.float32)
        order = pair_order(index, weights, self.experts)
        y, h = kernels.mix_experts_fwd(x, bank, bank, index, weights, 2.0, order)
        groups = pair_groups(index, weights, self.experts, order, False)
        kernels.mix_experts_bwd(y, x, bank, bank, index, weights, h, 2.0, groups, True, True)


LAUNCHES = (
    Launch("experts", 512, 1024, 4, 32, quick=True),
    Launch("experts, rank 1", 512, 1024, 1, 32),
    Launch("experts, rank 32", 64, 4096, 32, 8),
    Launch("experts, rank 100", 64, 4096, 100, 8),
    Launch("experts, float32 bank", 512, 1024, 8, 32, bank_dtype=torch.float32),
    Launch("experts, float16", 512, 1024, 8, 32, dtype=torch.float16),
    Launch("experts, float32", 512, 1024, 8, 32, dtype=torch.float32),
    Launch("experts, odd width", 30, 100, 3, 5, aligned=False),
    Launch("crowded experts", 8192, 1024, 16, 8, 1000, quick=True),
    Launch("crowded experts, rank 4", 8192, 4096, 4, 8, 1000),
    Launch("crowded experts, rank 64", 8192, 4096, 64, 2, 64),
    Launch("crowded, float32 bank", 8192, 1024, 16, 8, 1000, bank_dtype=torch.float32),
    Launch("crowded, float16", 8192, 1024, 16, 8, 1000, dtype=torch.float16),
    Launch("crowded, float32", 8192, 1024, 16, 8, 1000, dtype=torch.float32),
    Launch("crowded, odd width", 8192, 100, 5, 8, 1000, aligned=False),
)
