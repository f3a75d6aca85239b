"""Least bytes, FLOPs and time of every op, by formula, on one GPU.

    python benchmarks/roofline.py [--device h200] [--bandwidth TB/s] [--flops TFLOP/s] [--csv]

An op is a sequence of passes, one per launch. A pass reads every byte that it needs once, as if
the cache were perfect, and writes every byte of its results once; what one pass leaves for the
next is written and read. L2 MB counts what tiles read again too, where a formula says so; the
tiles of cuBLAS are not known. A pass takes its bytes over the bandwidth of a copy or its FLOPs over
the rate of a large bf16 product, whichever is longer, and an op the sum of its passes. Launches,
those of cuBLAS and torch included, take no time here. `tests/roofline` compares the bytes with the
loads and stores of the kernels.

Letters: M rows, of S samples; I in, O out, R total rank, K adapters, B batch, T tokens, D width,
P prompt length, N keys or experts, V vocabulary; s bytes of an element, 4 unless said otherwise
for ranks, weights and scores.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable

import cases
from passes import Device, Row, bound, l2_bytes, total_bytes, total_flops, total_seconds
from rich.console import Console
from rich.table import Table

DEVICES = {"h200": Device("H200", 4.3e12, 790e12)}


def rows() -> list[Row]:
    """Every op at the sizes of the project's targets, bf16."""
    modules = cases.modules().values()
    return [row for module in modules if hasattr(module, "roofline") for row in module.roofline()]


_COLUMNS: dict[str, Callable[[Row, Device], str]] = {
    "op": lambda row, _: row.op,
    "sizes": lambda row, _: row.sizes,
    "MB": lambda row, _: f"{total_bytes(row.passes) / 1e6:.2f}",
    "L2 MB": lambda row, _: f"{l2_bytes(row.passes) / 1e6:.2f}",
    "launches": lambda row, _: str(len(row.passes)),
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
