"""How the products of `mixed_lora` are computed: y = a @ b + p @ q, rank term p @ q included.

These routes give the same result:

- `FUSED`: one kernel of ours reduces over both sources (`gemm.gemm_group`). It spends no
  traffic on the rank term, but its base product is not cuBLAS's.
- `FUSED_POINTERS`: the same without tensor descriptors, on a GPU that has them. Only a measurement
  chooses it.
- `FUSED_TF32X3`: `FUSED` in float32 on the matrix unit, each factor as the sum of two tf32. Only a
  measurement chooses it. In an emulation its error is within twice a sequential float32 sum's over
  64 columns and more, but up to 6 times that over fewer. Factors above 3.402e38 become
  infinite, those below 1e-36 lose digits, and of a product of denormals with infinity comes NaN.
- `EXPAND_FIRST`: our kernel writes p @ q, and cuBLAS adds a @ b onto it
  (`gemm.expand_first_group`). It writes y once more; that it reads it once more hides inside a
  product that is bound by arithmetic.

`choose` is deterministic and measures nothing. It looks into the table that `sapt-fast bench tune`
recorded on this kind of GPU with this version of Triton, for the nearest size; without a table, or
for a size far from all that were measured, it compares times by `estimate`. No table is shipped
yet: none has been measured. A variant is a route and the tile of its kernel (`gemm_tiles`).

Where torch may use tf32 for float32 products (`torch.set_float32_matmul_precision`), every route
does. The tables hold for products in full precision, so that the estimate then decides.

A table is a JSON file named after the GPU. It is looked for in the folder that the environment
variable SAPT_FAST_ROUTES names, by default `sapt_fast/routes` in the user's cache folder, then in
the package.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor

from sapt_fast.files.directories import atomic_write_text
from sapt_fast.files.reading import CONFIG_BYTES, read_bytes
from sapt_fast.triton_kernels.blocks import gemm_tiles, plans
from sapt_fast.triton_kernels.blocks.common import DeviceTraits, TileConfig, float32_precision
from sapt_fast.triton_kernels.blocks.gemm import Operands, expand_first_group, gemm_group
from sapt_fast.triton_kernels.blocks.gemm_tiles import Product

Direction = Literal["forward", "backward"]
Route = Literal["fused", "fused_pointers", "fused_tf32x3", "expand_first"]

FUSED: Route = "fused"
FUSED_POINTERS: Route = "fused_pointers"
FUSED_TF32X3: Route = "fused_tf32x3"
EXPAND_FIRST: Route = "expand_first"
ROUTES: tuple[Route, ...] = (FUSED, FUSED_POINTERS, FUSED_TF32X3, EXPAND_FIRST)

_log = logging.getLogger(__name__)

ENV_VARIABLE = "SAPT_FAST_ROUTES"

_DIRECTIONS = ("forward", "backward")
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16)}
_TF32 = "tf32"  # the dtype of a size in float32 where torch may use tf32; not in tables
_FORMAT = 2  # 1 had no tiles
_SHIPPED = Path(__file__).parents[1] / "recorded_routes"


class Variant(NamedTuple):
    """A route, and the tile of its kernel; None leaves that to `gemm_tiles.chosen`."""

    route: Route
    tile: TileConfig | None = None


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

    def product(self, route: Route = FUSED) -> Product:
        """The product as a route of our own kernel computes it, its operands aligned."""
        is_tf32 = self.dtype == _TF32
        itemsize = 4 if is_tf32 else _DTYPES[self.dtype].itemsize
        descriptors = route == FUSED
        return Product(
            self.rows, self.d_out, self.d_in, self.rank, itemsize, True, descriptors, is_tf32
        )


@dataclass(frozen=True)
class Measurement:
    """Median seconds of the variants that were timed for one size."""

    size: Size
    seconds: dict[Variant, float]

    @property
    def fastest(self) -> Variant:
        """The variant that took least; of equals the first."""
        return min(self.seconds, key=lambda variant: self.seconds[variant])


def variants(traits: DeviceTraits, size: Size) -> list[Variant]:
    """All that can compute a product: the routes of its dtype and device, with their tiles."""
    found = []
    for route in ROUTES:
        others = {FUSED_POINTERS: traits.has_tma, FUSED_TF32X3: size.dtype == "float32"}
        if route == EXPAND_FIRST:
            found.append(Variant(route))
        elif others.get(route, True):
            tiles = gemm_tiles.candidates(traits, size.product(route))
            found += [Variant(route, tile) for tile in tiles]
    return found


def choose(
    traits: DeviceTraits,
    direction: Direction,
    d_in: int,
    d_out: int,
    rank: int,
    rows: int,
    dtype: torch.dtype,
) -> Variant:
    """Returns the variant for a product; sizes as in `Size`, all positive.

    Raises:
        ValueError: if the recorded table of this GPU cannot be read.
    """
    if _forced is not None:
        return Variant(_forced)
    is_tf32 = float32_precision(dtype) == _TF32
    name = _TF32 if is_tf32 else str(dtype).removeprefix("torch.")
    return _choose(traits, Size(direction, d_in, d_out, rank, rows, name))


@lru_cache(maxsize=4096)
def _choose(traits: DeviceTraits, size: Size) -> Variant:
    measured = nearest(recorded(traits.name), size)
    if measured is not None:
        return measured.fastest
    fused = estimate_fused(traits, size)
    return Variant(FUSED if fused <= estimate_expand_first(traits, size) else EXPAND_FIRST)


def run(
    variant: Variant,
    a: Tensor,
    b: Tensor,
    p: Tensor | None,
    q: Tensor | None,
    bias: Tensor | None,
    rank_window: tuple[int, int],
    y: Tensor,
) -> Tensor:
    """Compute a product by a variant; arguments as of `gemm.Operands` and `gemm.gemm_group`."""
    run_group(variant, [Operands(a, b, p, q, bias)], rank_window, [y])
    return y


def run_group(
    variant: Variant,
    members: Sequence[Operands],
    rank_window: tuple[int, int],
    ys: Sequence[Tensor],
    *,
    accumulate: bool = False,
    drops: int = 0,
) -> None:
    """Computes products by a variant; arguments as of `gemm.gemm_group`."""
    route, tile = variant
    if route == EXPAND_FIRST:
        expand_first_group(members, rank_window, ys, accumulate=accumulate, drops=drops)
        return
    is_float32 = ys[0].dtype == torch.float32
    is_tf32x3 = route == FUSED_TF32X3 and float32_precision(ys[0].dtype) == "ieee"
    gemm_group(
        members,
        rank_window,
        ys,
        accumulate=accumulate,
        descriptors=route != FUSED_POINTERS,
        tile=tile,
        precision="tf32x3" if is_tf32x3 and is_float32 else None,
        drops=drops,
    )


_forced: Route | None = None


def setting() -> tuple[Route | None, str]:
    """What `choose` depends on besides its arguments and the tables: one plan is for one of it."""
    return _forced, float32_precision(torch.float32)


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
    """Seconds of `FUSED` with its best tile, as `gemm_tiles.seconds` estimates them."""
    product = size.product()
    return gemm_tiles.seconds(traits, gemm_tiles.chosen(traits, product), product)


def estimate_expand_first(traits: DeviceTraits, size: Size) -> float:
    """Seconds of `EXPAND_FIRST`: the rank term by our kernel, a launch, and cuBLAS onto y.

    Large products being bound by arithmetic, fused pays while what its kernel loses to cuBLAS there
    stays below the traffic of y: for small widths and small ranks.
    """
    term, base = size.product()._replace(depth=0), size.product()._replace(rank=0)
    expand = gemm_tiles.seconds(traits, gemm_tiles.chosen(traits, term), term)
    tiles = gemm_tiles.candidates(traits, base)  # cuBLAS has these too, and splits as well
    onto_y = min(gemm_tiles.seconds(traits, tile, base, onto_y=True) for tile in tiles)
    return gemm_tiles.LAUNCH_SECONDS + expand + onto_y


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

    A table of another version of Triton, whose kernels are others, does not count.

    Raises:
        ValueError: if the file is not such a table.
    """
    if not device:
        return ()
    for folder in (user_folder(), _SHIPPED):
        path = folder / table_file(device)
        if path.is_file():
            table, version = read_table(path, device)
            if version == triton.__version__:
                return table
            _log.warning(
                "route table %s: measured with triton %s, not used with %s; "
                "'sapt-fast bench tune' records it again", path, version, triton.__version__,
            )  # fmt: skip
    return ()


def forget() -> None:
    """Drop what was read, so that a table recorded meanwhile is seen."""
    recorded.cache_clear()
    _choose.cache_clear()
    plans.forget()


def write_table(
    path: Path, device: str, measurements: Sequence[Measurement], versions: dict[str, str]
) -> Path:
    """Writes a table so that the file is whole or absent; `versions` says what was measured.

    A variant is written as [route, tile, seconds], the tile by its fields in their order.
    """
    rows = [
        {
            **asdict(m.size),
            "seconds": [[*variant, seconds] for variant, seconds in m.seconds.items()],
        }
        for m in measurements
    ]
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    head = json.dumps({"format": _FORMAT, "device": device, "versions": versions})[:-1]
    return atomic_write_text(path, f'{head}, "measurements": [\n{lines}\n]}}\n')


def read_table(path: Path, device: str) -> tuple[tuple[Measurement, ...], str]:
    """Returns the measurements that `write_table` wrote, and the version of Triton.

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
        got = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise error(f"format: got {got!r}, expected {_FORMAT}")
    if content.get("device") != device:
        raise error(f"got the device {content.get('device')!r}, expected {device!r}")
    versions = content.get("versions")
    version = versions.get("triton") if isinstance(versions, dict) else None
    if not isinstance(version, str):
        raise error(f"versions: got {versions!r}, expected that of triton")
    rows = content.get("measurements")
    if not isinstance(rows, list):
        raise error(f"measurements: got {type(rows).__name__}, expected a list")
    table = []
    for number, row in enumerate(rows):
        try:
            table.append(_measurement(row))
        except (TypeError, KeyError, ValueError) as problem:
            raise error(f"measurement {number}: {problem}") from None
    return tuple(table), version


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
    entries = row["seconds"]
    if not isinstance(entries, list):
        raise ValueError(f"seconds: got {entries!r}, expected a list")
    seconds = dict(_timed(entry) for entry in entries)
    if not {FUSED, EXPAND_FIRST} <= {variant.route for variant in seconds}:
        raise ValueError(f"seconds: got {entries!r}, expected those of {FUSED} and {EXPAND_FIRST}")
    return Measurement(size, seconds)


def _timed(entry: Any) -> tuple[Variant, float]:
    if not isinstance(entry, list) or len(entry) != 3:
        raise ValueError(f"seconds: got {entry!r}, expected [route, tile, seconds]")
    route, sides, seconds = entry
    if route not in ROUTES:
        raise ValueError(f"seconds: got {route!r}, expected one of {', '.join(ROUTES)}")
    tile = None
    if sides is not None:
        numbers = isinstance(sides, list) and all(type(n) is int and n > 0 for n in sides)
        if not numbers or len(sides) != len(TileConfig._fields):
            names = ", ".join(TileConfig._fields)
            raise ValueError(f"seconds: got the tile {sides!r}, expected {names}")
        tile = TileConfig(*sides)
    if type(seconds) not in (int, float) or not 0 < seconds < math.inf:
        raise ValueError(f"seconds: got {seconds!r}, expected a positive number")
    return Variant(route, tile), seconds
