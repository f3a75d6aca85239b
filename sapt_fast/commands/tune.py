"""`sapt-fast bench tune`: times the routes of `mixed_lora` and their tiles on a GPU.

The fastest of each size goes into a table that later runs read.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import sapt_fast
from sapt_fast.checks import require_choice, require_folder
from sapt_fast.commands.output import show

if TYPE_CHECKING:  # triton is optional
    from sapt_fast.triton_kernels.blocks.gemm_variants import Measurement, Size, Variant

__all__ = [
    "Gpu",
    "parse_grid",
    "record_routes",
    "routes_table",
    "this_gpu",
    "time_routes",
    "tune_routes",
]

_DTYPES = ("bfloat16", "float16", "float32")
_MOST = 2**20
_TOLERANCE = {"bfloat16": 2e-2, "float16": 2e-3, "float32": 1e-5}  # relative, between two routes

Clock = Callable[[Callable[[], object]], float]
"""Measures the seconds that a call takes on the GPU."""


class Gpu(NamedTuple):
    """The device to measure on, the name to record it by, and the clock."""

    device: torch.device
    name: str
    clock: Clock


def tune_routes(
    widths: str, ranks: str, rows: str, dtypes: str, output: Path | None = None
) -> None:
    """Measures a grid on this GPU, writes its table and prints which route was the fastest.

    Args:
        widths, ranks, rows, dtypes: as in `parse_grid`.
        output: as in `record_routes`.

    Raises:
        ValueError: if a value is not valid.
        IsADirectoryError, NotADirectoryError: if `output` cannot be written.
        typer.Exit: with code 2, after a message, if nothing can be measured here.
    """
    grid = parse_grid(widths, ranks, rows, dtypes)
    if output is not None:
        require_folder("output", output.parent)
        if output.is_dir():
            raise IsADirectoryError(f"output: got {str(output)!r}, which is a folder")
    try:
        gpu = this_gpu()
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    path, measurements = record_routes(grid, gpu, output)
    show(routes_table(measurements), f"written to {path}")


def this_gpu() -> Gpu:
    """The current GPU with CUDA events as its clock; the L2 cache is emptied before every call.

    Raises:
        ValueError: if there is no GPU, or triton is not installed.
    """
    if not torch.cuda.is_available():
        raise ValueError("bench tune needs a GPU, but torch sees none")
    if importlib.util.find_spec("triton") is None:
        raise ValueError("bench tune needs triton: pip install 'sapt_fast[gpu]'")
    from triton.testing import do_bench

    def clock(call: Callable[[], object]) -> float:
        return 1e-3 * float(do_bench(call, warmup=10, rep=60, return_mode="median"))

    device = torch.device("cuda", torch.cuda.current_device())
    return Gpu(device, torch.cuda.get_device_name(device), clock)


def parse_grid(
    widths: str, ranks: str, rows: str, dtypes: str
) -> list[tuple[int, int, int, int, str]]:
    """All combinations of comma-separated values, as (d_in, d_out, rank, rows, dtype).

    Args:
        widths: "1024" for a square layer or "1024x4096", d_in first.
        ranks, rows: positive integers.
        dtypes: names of floating-point types.

    Raises:
        ValueError: if a value is not valid.
    """
    pairs = []
    for text in _items("widths", widths):
        if text.count("x") > 1:
            raise ValueError(f"widths: got {text!r}, expected 1024 or 1024x4096")
        sides = [_positive("widths", side) for side in text.split("x")]
        pairs.append((sides[0], sides[-1]))
    names = _items("dtypes", dtypes)
    for name in names:
        require_choice("dtypes", name, _DTYPES)
    numbers = [
        [_positive(name, text) for text in _items(name, values)]
        for name, values in (("ranks", ranks), ("rows", rows))
    ]
    return [(*pair, *others) for pair, *others in itertools.product(pairs, *numbers, names)]  # type: ignore[misc]


def _items(name: str, text: str) -> list[str]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise ValueError(f"{name}: got {text!r}, expected values separated by commas")
    return list(dict.fromkeys(items))


def _positive(name: str, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= _MOST:
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise ValueError(
            f"{name}: got {shown!r}, expected integers, at least 1 and at most {_MOST}"
        )
    return value


def record_routes(
    grid: Sequence[tuple[int, int, int, int, str]], gpu: Gpu, output: Path | None = None
) -> tuple[Path, list[Measurement]]:
    """Measures a grid on a GPU and writes its table.

    Args:
        grid: layers as `parse_grid` gives them; each is measured forward and backward.
        gpu: where to measure, as from `this_gpu`.
        output: the file; defaults to the one that later runs read.

    Returns:
        The file, and the measurements in it.

    Raises:
        RuntimeError: if two variants disagree; then nothing is written.
    """
    import triton

    from sapt_fast.triton_kernels.blocks import gemm_variants as routes

    sizes = [
        size
        for d_in, d_out, rank, rows, dtype in grid
        for size in (
            routes.Size("forward", d_in, d_out, rank, rows, dtype),
            routes.Size("backward", d_out, d_in, rank, rows, dtype),
        )
    ]
    bar = track(sizes, description="routes", console=Console(stderr=True))
    measurements = [routes.Measurement(size, time_routes(size, gpu)) for size in bar]
    versions = {
        "sapt_fast": sapt_fast.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or "",
    }
    path = output or routes.user_folder() / routes.table_file(gpu.name)
    routes.write_table(path, gpu.name, measurements, versions)
    routes.forget()
    return path, measurements


def time_routes(size: Size, gpu: Gpu) -> dict[Variant, float]:
    """Measures the seconds of every variant at a size, after a check that they agree.

    float32 products are in full precision, whatever torch is set to.

    Raises:
        RuntimeError: if two variants disagree.
    """
    from sapt_fast.triton_kernels.blocks.common import RANK_ALIGN, device_traits, round_up
    from sapt_fast.triton_kernels.blocks.gemm_variants import run, variants

    generator = torch.Generator(gpu.device).manual_seed(0)

    def draw(rows: int, columns: int, depth: int) -> torch.Tensor:
        values = torch.randn((rows, columns), generator=generator, device=gpu.device)
        return (values * depth**-0.5).to(getattr(torch, size.dtype))

    padded = round_up(size.rank, RANK_ALIGN)
    a = draw(size.rows, size.d_in, 1)
    # The forward reads a weight [O, I] transposed, the backward as stored.
    forward = size.direction == "forward"
    sides = (size.d_out, size.d_in) if forward else (size.d_in, size.d_out)
    b = draw(*sides, size.d_in)
    b = b.t() if forward else b
    p, q = draw(size.rows, padded, 1), draw(size.rank, size.d_out, size.rank)
    p[:, size.rank :] = 0
    y = a.new_empty((size.rows, size.d_out))

    def call(variant: Variant) -> torch.Tensor:
        return run(variant, a, b, p, q, None, (0, padded), y)

    with _full_precision():
        timed = variants(device_traits(gpu.device), size)
        first, *others = timed
        expected = call(first).double()  # a copy: every variant writes into y
        for other in others:
            error = float((call(other).double() - expected).norm() / expected.norm())
            if not error <= _TOLERANCE[size.dtype]:
                raise RuntimeError(
                    f"routes {first.route} and {other.route} differ by {error:.2g} at {size}: "
                    f"nothing is recorded"
                )
        return {variant: gpu.clock(partial(call, variant)) for variant in timed}


@contextmanager
def _full_precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def routes_table(measurements: Sequence[Measurement]) -> Table:
    """Returns a table of how often each variant was the fastest, by pass, dtype and width."""
    table = Table(title="fastest route")
    for name in ("pass", "dtype", "d_in x d_out", "fastest"):
        table.add_column(name)
    groups: dict[tuple[str, str, str], Counter[str]] = {}
    for measurement in measurements:
        size = measurement.size
        key = (str(size.direction), size.dtype, f"{size.d_in} x {size.d_out}")
        groups.setdefault(key, Counter())[_name(measurement.fastest)] += 1
    for key, counts in groups.items():
        table.add_row(*key, ", ".join(f"{route} {n}" for route, n in counts.most_common()))
    return table


def _name(variant: Variant) -> str:
    """The route and the tile, as "fused 64x128x64", with its parts if there are several."""
    if variant.tile is None:
        return variant.route
    m, n, k, *_, parts = variant.tile
    return f"{variant.route} {m}x{n}x{k}" + (f" in {parts}" if parts > 1 else "")
