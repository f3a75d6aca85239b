"""How the products of `mixed_lora` are computed: y = a @ b + p @ q, rank term p @ q included.

These routes give the same result:

- `FUSED`: one kernel of ours reduces over both sources (`gemm.gemm_group`). It spends no
  traffic on the rank term, but its base product is not cuBLAS's.
- `FUSED_POINTERS`: the same without tensor descriptors, on a GPU that has them. Only a measurement
  chooses it.
- `EXPAND_FIRST`: our kernel writes p @ q, and cuBLAS adds a @ b onto it
  (`gemm.expand_first_group`). It writes y once more; that it reads it once more hides inside a
  product that is bound by arithmetic.

`choose` is deterministic and measures nothing. It looks into the table that `sapt-fast bench tune`
recorded on this kind of GPU, for the nearest size; without a table, or for a size far from all
that were measured, it compares times by `estimate`. No table is shipped yet: none has been
measured.

A table is a JSON file named after the GPU. It is looked for in the folder that the environment
variable SAPT_FAST_ROUTES names, by default `sapt_fast/routes` in the user's cache folder, then in
the package.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sapt_fast.files.directories import atomic_write_text
from sapt_fast.files.reading import CONFIG_BYTES, read_bytes
from sapt_fast.triton_kernels.blocks import plans
from sapt_fast.triton_kernels.blocks.common import DeviceTraits
from sapt_fast.triton_kernels.blocks.gemm import Operands, expand_first_group, gemm_group

Direction = Literal["forward", "backward"]
Route = Literal["fused", "fused_pointers", "expand_first"]

FUSED: Route = "fused"
FUSED_POINTERS: Route = "fused_pointers"
EXPAND_FIRST: Route = "expand_first"
ROUTES: tuple[Route, ...] = (FUSED, FUSED_POINTERS, EXPAND_FIRST)

ENV_VARIABLE = "SAPT_FAST_ROUTES"

_DIRECTIONS = ("forward", "backward")
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16)}
_FORMAT = 1
_SHIPPED = Path(__file__).parents[1] / "recorded_routes"

# Shares of what a chip can do at most that cuBLAS and a copy reach, as on an H200: 790 TFLOP/s in
# bfloat16, 4.3 TB/s.
_ARITHMETIC_SHARE = 0.75
_BANDWIDTH_SHARE = 0.875
# Our kernel's rate over cuBLAS's. Assumed, not measured: 5% is what a table should replace. In
# float32 there is no matrix unit behind `tl.dot`, and its blocking falls behind further.
_FUSED_SHARE = {2: 0.95, 4: 0.5}
_LAUNCH_SECONDS = 2e-6  # from the end of one kernel to full speed of the next


@dataclass(frozen=True)
class Size:
    """A product of `rows` rows: d_in is the reduction of a @ b, rank that of p @ q.

    The backward computes dx: there d_in is the layer's output width, d_out its input width.
    """

    direction: Direction
    d_in: int
    d_out: int
    rank: int
    rows: int
    dtype: str


@dataclass(frozen=True)
class Measurement:
    """Median seconds of the routes that were timed for one size."""

    size: Size
    seconds: dict[str, float]

    @property
    def fastest(self) -> Route:
        """The route that took least; of equals the first in `ROUTES`."""
        return min((r for r in ROUTES if r in self.seconds), key=lambda r: self.seconds[r])


def choose(
    traits: DeviceTraits,
    direction: Direction,
    d_in: int,
    d_out: int,
    rank: int,
    rows: int,
    dtype: torch.dtype,
) -> Route:
    """Returns the route for a product; sizes as in `Size`, all positive.

    Raises:
        ValueError: if the recorded table of this GPU cannot be read.
    """
    if _forced is not None:
        return _forced
    name = str(dtype).removeprefix("torch.")
    return _choose(traits, Size(direction, d_in, d_out, rank, rows, name))


@lru_cache(maxsize=4096)
def _choose(traits: DeviceTraits, size: Size) -> Route:
    measured = nearest(recorded(traits.name), size)
    if measured is not None:
        return measured.fastest
    fused = estimate_fused(traits, size)
    return FUSED if fused <= estimate_expand_first(traits, size) else EXPAND_FIRST


def run(
    route: Route,
    a: Tensor,
    b: Tensor,
    p: Tensor | None,
    q: Tensor | None,
    bias: Tensor | None,
    rank_window: tuple[int, int],
    y: Tensor,
) -> Tensor:
    """Compute a product by a route; arguments as of `gemm.Operands` and `gemm.gemm_group`."""
    run_group(route, [Operands(a, b, p, q, bias)], rank_window, [y])
    return y


def run_group(
    route: Route,
    members: Sequence[Operands],
    rank_window: tuple[int, int],
    ys: Sequence[Tensor],
    *,
    accumulate: bool = False,
) -> None:
    """Computes products by a route; arguments as of `gemm.gemm_group`."""
    if route == EXPAND_FIRST:
        expand_first_group(members, rank_window, ys, accumulate=accumulate)
    else:
        gemm_group(members, rank_window, ys, accumulate=accumulate, descriptors=route == FUSED)


_forced: Route | None = None


def forced_route() -> Route | None:
    """The route that `forced` has set."""
    return _forced


@contextmanager
def forced(route: Route) -> Iterator[None]:
    """Make `choose` return `route` in the block, in all threads: for tests and measurements."""
    global _forced
    before, _forced = _forced, route
    try:
        yield
    finally:
        _forced = before


def estimate_fused(traits: DeviceTraits, size: Size) -> float:
    """Seconds of `FUSED`: its FLOPs or its bytes, whichever take longer.

    With F = 2 rows d_out the FLOPs of one step of a reduction, s bytes an element, A and B the
    rates of arithmetic and memory that cuBLAS and a copy reach, and e A the rate of our kernel:

        fused        = max(F (d_in + rank) / (e A), s (base + factors + y) / B)
        expand_first = launch + max(F rank / (e A), s (factors + y) / B)
                              + max(F d_in / A, s (base + 2 y) / B)

    base = rows d_in + d_in d_out elements, factors = rows rank + rank d_out, y = rows d_out.
    Large products being bound by arithmetic, fused pays while 1 - e stays below about
    (s A / 2 B - rank) / d_in: for small widths and small ranks.
    """
    base, factors, y = _elements(size)
    ours = _FUSED_SHARE[_itemsize(size)]
    return _seconds(traits, size, size.d_in + size.rank, ours, base + factors + y)


def estimate_expand_first(traits: DeviceTraits, size: Size) -> float:
    """Seconds of `EXPAND_FIRST`; the formula is with `estimate_fused`."""
    base, factors, y = _elements(size)
    expand = _seconds(traits, size, size.rank, _FUSED_SHARE[_itemsize(size)], factors + y)
    return _LAUNCH_SECONDS + expand + _seconds(traits, size, size.d_in, 1.0, base + 2 * y)


def _elements(size: Size) -> tuple[int, int, int]:
    """Elements of the base product's operands, of the rank term's, and of y."""
    sides = size.rows + size.d_out
    return sides * size.d_in, sides * size.rank, size.rows * size.d_out


def _itemsize(size: Size) -> int:
    return _DTYPES[size.dtype].itemsize


def _seconds(traits: DeviceTraits, size: Size, depth: int, share: float, elements: int) -> float:
    itemsize = _itemsize(size)
    rate = traits.flops(itemsize) * _ARITHMETIC_SHARE * share
    moved = itemsize * elements / (traits.bandwidth * _BANDWIDTH_SHARE)
    return max(2 * size.rows * size.d_out * depth / rate, moved)


# --- recorded tables -----------------------------------------------------------------------------


def nearest(table: Sequence[Measurement], size: Size) -> Measurement | None:
    """Returns the measurement nearest to a size, of the same direction and dtype, or None.

    Distances are ratios: none of the four numbers may be off by more than a factor of 2, and the
    product of the four factors decides, of equals the earlier.
    """
    found, least = None, math.inf
    for measurement in table:
        other = measurement.size
        if (other.direction, other.dtype) != (size.direction, size.dtype):
            continue
        distances = [
            abs(math.log2(getattr(other, name) / getattr(size, name)))
            for name in ("d_in", "d_out", "rank", "rows")
        ]
        if max(distances) <= 1 and sum(distances) < least:
            found, least = measurement, sum(distances)
    return found


def table_file(device: str) -> str:
    """File name of the table of a kind of GPU, which its driver calls `device`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def user_folder() -> Path:
    """The folder of the tables recorded here: SAPT_FAST_ROUTES, or one in the cache folder."""
    if named := os.environ.get(ENV_VARIABLE):
        return Path(named)
    cache_folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_folder) / "sapt_fast" / "routes"


@cache
def recorded(device: str) -> tuple[Measurement, ...]:
    """Returns the table of a kind of GPU, the user's before the package's; empty if there is none.

    Raises:
        ValueError: if the file is not such a table.
    """
    if not device:
        return ()
    for folder in (user_folder(), _SHIPPED):
        path = folder / table_file(device)
        if path.is_file():
            return read_table(path, device)
    return ()


def forget() -> None:
    """Drop what was read, so that a table recorded meanwhile is seen."""
    recorded.cache_clear()
    _choose.cache_clear()
    plans.forget()


def write_table(
    path: Path, device: str, measurements: Sequence[Measurement], versions: dict[str, str]
) -> Path:
    """Writes a table so that the file is whole or absent; `versions` says what was measured."""
    rows = [{**asdict(m.size), "seconds": m.seconds} for m in measurements]
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    head = json.dumps({"format": _FORMAT, "device": device, "versions": versions})[:-1]
    return atomic_write_text(path, f'{head}, "measurements": [\n{lines}\n]}}\n')


def read_table(path: Path, device: str) -> tuple[Measurement, ...]:
    """Read what `write_table` wrote.

    Raises:
        ValueError: if the file is not JSON, or has another format or device.
        ValueError: if a row is not as written.
    """

    def error(problem: str) -> ValueError:
        return ValueError(
            f"route table {path}: {problem}; record it again with 'sapt-fast bench tune', "
            "or delete it"
        )

    try:
        content = json.loads(read_bytes(path, CONFIG_BYTES))
    except (RecursionError, ValueError) as problem:
        raise error(f"no JSON ({problem})") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise error(f"expected an object of format {_FORMAT}")
    if content.get("device") != device:
        raise error(f"got the device {content.get('device')!r}, expected {device!r}")
    rows = content.get("measurements")
    if not isinstance(rows, list):
        raise error(f"measurements: got {type(rows).__name__}, expected a list")
    table = []
    for number, row in enumerate(rows):
        try:
            table.append(_measurement(row))
        except (TypeError, KeyError, ValueError) as problem:
            raise error(f"measurement {number}: {problem}") from None
    return tuple(table)


def _measurement(row: Any) -> Measurement:
    names = [field.name for field in fields(Size)]
    if not isinstance(row, dict) or set(row) != {*names, "seconds"}:
        raise ValueError(f"got {row!r}, expected the keys {', '.join([*names, 'seconds'])}")
    size = Size(**{name: row[name] for name in names})
    for name, allowed in (("direction", _DIRECTIONS), ("dtype", tuple(_DTYPES))):
        if row[name] not in allowed:
            raise ValueError(f"{name}: got {row[name]!r}, expected one of {allowed}")
    for name in ("d_in", "d_out", "rank", "rows"):
        if type(row[name]) is not int or row[name] < 1:
            raise ValueError(f"{name}: got {row[name]!r}, expected an integer, at least 1")
    seconds = row["seconds"]
    needed = {FUSED, EXPAND_FIRST}
    if not isinstance(seconds, dict) or not needed <= set(seconds) <= set(ROUTES):
        raise ValueError(f"seconds: got {seconds!r}, expected those of {', '.join(ROUTES)}")
    for value in seconds.values():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"seconds: got {value!r}, expected a positive number")
    return Measurement(size, seconds)
