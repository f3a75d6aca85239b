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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from traffic.keys import Search, nearest_key, topk_keys
from traffic.mix_experts import Experts, experts_backward, experts_forward
from traffic.mix_prompts import Prompts, prompts_backward, prompts_forward
from traffic.mixed_lora import (
    Member,
    MixedLora,
    base_linear,
    mixed_lora_backward,
    mixed_lora_forward,
)
from traffic.passes import Device, Passes, bound, total_bytes, total_flops, total_seconds
from traffic.router import Router, head_backward, head_forward, pool_backward, pool_forward

DEVICES = {"h200": Device("H200", 4.3e12, 790e12)}


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
