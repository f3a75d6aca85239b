"""Dropout on the CPU: blocks of rows, dropped in a cache's worth of memory and multiplied there."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sapt_fast import _C
from sapt_fast.cpu_kernels.common import CODES
from sapt_fast.cpu_kernels.gemm import linear, multiply_tn, two_products

_BLOCK = 1 << 18  # elements


class Mask(NamedTuple):
    """Which elements of a projection's input are dropped; see `ops._dropout`.

    Attributes:
        drops: how many of 65536.
        seed: of the generator.
    """

    drops: int
    seed: int

    def drop(self, x: Tensor, first_row: int = 0, out: Tensor | None = None) -> Tensor:
        """Returns x [M, I] with 0 for what is dropped, in `out`, or by default in x itself.

        Args:
            first_row: the mask's row of x's first one.
        """
        out = x if out is None else out
        _C.drop(
            CODES[x.dtype], out, x, self.seed, first_row, *x.shape, self.drops,
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def blocks(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yields blocks of rows and what x [M, I] holds there, dropped, in memory used again."""
        buffer: Tensor | None = None
        for rows in _blocks(x):
            part = x[rows]
            if buffer is None:
                buffer = torch.empty_like(part)
            yield rows, self.drop(part, rows.start, buffer[: part.shape[0]])

    def shrink(self, x: Tensor, lora_a: Tensor) -> Tensor:
        """Computes the dropped x [M, I] times lora_a [R, I]^T."""
        h = x.new_empty(x.shape[0], lora_a.shape[0])
        for rows, part in self.blocks(x):
            h[rows] = linear(part, lora_a)
        return h

    def factor_grad(self, packed: Tensor, x: Tensor) -> Tensor:
        """Computes packed [M, R]^T times the dropped x [M, I]; the blocks are summed in float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        total = x.new_zeros(packed.shape[1], x.shape[1], dtype=wide)
        for rows, part in self.blocks(x):
            total += multiply_tn(packed[rows], part)
        return total

    def add_product(self, y: Tensor, ranks: Tensor, rows: Tensor) -> None:
        """Adds ranks [M, R] times rows [R, I], dropped, to y [M, I] in place."""
        for part in _blocks(y):
            own = ranks[part]
            y[part] += self.drop(two_products(own, None, None, own, rows), part.start)


def _blocks(x: Tensor) -> Iterator[slice]:
    count, width = x.shape
    step = max(1, _BLOCK // max(width, 1))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
