"""Tiles of `gemm.two_source_gemm`: those that a product may take, and what each should cost.

The cost is a model, not a measurement: `sapt-fast bench tune` times the candidates and records the
fastest.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import triton

from sapt_fast.triton_kernels.blocks.common import DeviceTraits, TileConfig, cdiv, fitted

FEW_ROWS = 64
"""A product of so many rows reads its weight once, by one tile of rows."""

_INTERPRETED = TileConfig(16, 32, 32, num_warps=4, num_stages=1)
_FEW = TileConfig(64, 32, 128, num_warps=4, num_stages=4)
_SMALL = TileConfig(64, 64, 64, num_warps=4, num_stages=4)
_UNALIGNED = TileConfig(64, 64, 32, num_warps=4, num_stages=2)
_FLOAT32 = TileConfig(64, 64, 32, num_warps=8, num_stages=2)
_BY_POINTERS = (TileConfig(128, 128, 64, num_warps=8, num_stages=3), _SMALL)
_BY_DESCRIPTORS = (
    TileConfig(128, 256, 64, num_warps=8, num_stages=3),
    TileConfig(128, 128, 64, num_warps=8, num_stages=4),
    TileConfig(64, 128, 64, num_warps=4, num_stages=4),
    _SMALL,
)
# The generator of a mask and a second sum spill where a thread has more than 32 elements. On other
# chips than sm_80 and sm_90 the larger tile spills even so.
_DROPPING = (TileConfig(64, 128, 64, num_warps=8, num_stages=4), _SMALL)
_LEAST_STEPS = 4  # of a part
# With less shared memory (99 KB on the chips that have less) three stages: two programs fit beside
# each other. One step under way, 16 KB and more, is over twice what bandwidth times latency asks of
# a multiprocessor there (1.8 TB/s over 188 of them at 600 ns: 6 KB).
_SMALL_SHARED = 128 * 1024

# All of these are estimated, none is measured. Shares of what a chip can do at most that cuBLAS and
# a copy reach are an H200's: 790 TFLOP/s in bfloat16, 4.3 TB/s.
_ARITHMETIC_SHARE = 0.75
_BANDWIDTH_SHARE = 0.875
LAUNCH_SECONDS = 2e-6  # from the end of one kernel to full speed of the next
# Our kernel's rate over cuBLAS's: 5% is what a table should replace. In float32 there is no matrix
# unit behind `tl.dot`, and its blocking falls behind further.
_OWN_SHARE = {2: 0.95, 4: 0.5}
# The less a tile computes of what it loads, the lower its rate; few rows are bound by the weight.
_TILE_SHARE = {128 * 256: 1.0, 128 * 128: 0.9, 64 * 128: 0.75, 64 * 64: 0.6}
# From the last product of one loop to full speed of the next, of a tile with both loops. From
# the barriers in the code for sm_90: about 2 us against 10.5 us of arithmetic at K 1024.
_TILE_SECONDS = 2e-6


class Product(NamedTuple):
    """y [rows, columns] = a [rows, depth] b + p [rows, rank] q, and what limits its kernels."""

    rows: int
    columns: int
    depth: int  # 0 without a and b
    rank: int  # 0 without p and q
    itemsize: int
    aligned: bool = True
    descriptors: bool = True
    tf32: bool = False  # of float32
    drops: bool = False  # p q meets dropout, in a sum of its own

    @property
    def moved(self) -> int:
        """Bytes of the operands and of y, each once."""
        sides = self.rows + self.columns
        return self.itemsize * (sides * (self.depth + self.rank) + self.rows * self.columns)


def takes_descriptors(traits: DeviceTraits, product: Product) -> bool:
    """Whether the kernel of tensor descriptors computes the product."""
    wanted = product.descriptors and product.aligned and product.itemsize == 2
    return wanted and traits.has_tma and product.rows > FEW_ROWS


@lru_cache(maxsize=4096)
def candidates(traits: DeviceTraits, product: Product) -> tuple[TileConfig, ...]:
    """Tiles that the device has the shared memory for, some with the reduction in parts."""
    tiles: tuple[TileConfig, ...] = (_SMALL,)
    if traits.capability == 0:
        tiles = (_INTERPRETED,)
    elif product.itemsize == 4:
        tiles = (_FLOAT32,)
    elif not product.aligned:
        tiles = (_UNALIGNED,)
    elif product.rows <= FEW_ROWS:
        tiles = (_FEW,)
    elif product.drops:
        tiles = _DROPPING if traits.capability in (80, 90) else (_SMALL,)
    elif takes_descriptors(traits, product):
        tiles = _BY_DESCRIPTORS
    elif traits.capability < 120:
        tiles = _BY_POINTERS
    if traits.capability in (100, 103):  # where the others would spill
        warps = {_SMALL: 8, _BY_DESCRIPTORS[2]: 8}
        tiles = tuple(t._replace(num_warps=warps.get(t, t.num_warps)) for t in tiles)
    if traits.shared < _SMALL_SHARED:
        tiles = tuple(t._replace(num_stages=min(t.num_stages, 3)) for t in tiles)
    size = product.itemsize
    found = [fitted(tile, traits.shared, size, size) for tile in tiles]
    steps = cdiv(product.depth, found[-1].k)
    parts = min(traits.num_sms // _tiles(found[-1], product), steps // _LEAST_STEPS)
    if parts > 1:
        found.append(found[-1]._replace(parts=cdiv(steps, cdiv(steps, parts))))
    return tuple(dict.fromkeys(found))


def chosen(traits: DeviceTraits, product: Product) -> TileConfig:
    """The candidate that should take least."""
    return min(candidates(traits, product), key=lambda tile: seconds(traits, tile, product))


def sum_tile(traits: DeviceTraits) -> TileConfig:
    """Tile of the launch that sums the parts and adds the rank term: small, for many programs."""
    return _FEW if traits.capability else _INTERPRETED


def _tiles(tile: TileConfig, product: Product) -> int:
    return cdiv(product.rows, tile.m) * cdiv(product.columns, tile.n)


def seconds(
    traits: DeviceTraits, tile: TileConfig, product: Product, *, onto_y: bool = False
) -> float:
    """Seconds of a product by our kernel; with `onto_y` of cuBLAS, which adds it to what y holds.

    With n = tiles * parts programs of m x c elements on P multiprocessors, A and B the rates of
    arithmetic and memory that cuBLAS and a copy reach, and e A that of the kernel and tile:

        max(ceil(n / P) (2 m c (depth / parts + rank) P / (e A) + gap), bytes max(1, P / n) / B)

    The gap is there between two loops, depth and rank both positive. Parts take a launch more, and
    the traffic of their float32 sums.
    """
    programs = _tiles(tile, product) * tile.parts
    waves = cdiv(programs, traits.num_sms)
    share = 1.0 if onto_y else _OWN_SHARE[2 if product.tf32 else product.itemsize]
    if product.itemsize == 2:
        share *= _TILE_SHARE.get(tile.m * tile.n, 1.0)
    rate = traits.flops(product.itemsize, product.tf32) * _ARITHMETIC_SHARE * share
    depth = product.depth / tile.parts + product.rank
    gap = _TILE_SECONDS if product.depth and product.rank else 0.0
    arithmetic = waves * (2 * tile.m * tile.n * depth * traits.num_sms / rate + gap)
    bandwidth = traits.bandwidth * _BANDWIDTH_SHARE
    moved = product.moved + onto_y * product.itemsize * product.rows * product.columns
    memory = moved * max(1.0, traits.num_sms / programs) / bandwidth
    split = 0.0
    if tile.parts > 1:
        split = LAUNCH_SECONDS + 8 * tile.parts * product.rows * product.columns / bandwidth
    return max(arithmetic, memory) + split


def rank_block(columns: int, itemsize: int, factor_itemsize: int) -> int:
    """Reduction step of the rank loop: no longer than needed, shorter for wider factors."""
    longest = 16 if itemsize == 4 else 64 // (factor_itemsize // itemsize)
    return max(16, min(longest, triton.next_power_of_2(columns)))
