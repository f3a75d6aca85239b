"""The mask of `ops._dropout`, computed where a tile is in registers."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sapt_fast.ops._dropout import Dropout


def seeds_and_drops(dropout: Dropout | None) -> tuple[tuple[Tensor, ...] | None, int]:
    """Returns two arguments of a kernel: a seed for each member, and `Dropout.drops`."""
    return (None, 0) if dropout is None else (tuple(dropout.seeds), dropout.drops)


@triton.jit
def keeps(seed, rows, columns, drops):
    """Whether each element [len(rows), len(columns)] is kept.

    Adjacent columns have one counter, which a thread computes once: the compiler knows of each
    register which column it has.
    """
    # [1, columns] and [rows, 1]; the words are [rows, columns]
    w0, w1, w2, w3 = tl.philox(
        seed, (columns >> 3).to(tl.uint32)[None, :], rows.to(tl.uint32)[:, None], 0, 0
    )
    in_last, in_odd = (columns & 4 != 0)[None, :], (columns & 2 != 0)[None, :]
    words = tl.where(in_last, tl.where(in_odd, w3, w2), tl.where(in_odd, w1, w0))
    bits = tl.where((columns & 1 != 0)[None, :], words >> 16, words & 0xFFFF)
    return bits.to(tl.int32) >= drops
