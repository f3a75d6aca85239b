"""The mask of `ops._dropout`, computed where a tile is in registers."""
# ruff: noqa: N803 - kernel arguments keep the letters of the formulas
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

    Eight elements that one lane holds of a tensor core's fragment are of one counter. The compiler
    finds that: what tells them apart is known of each register.
    """
    groups = (columns >> 4 << 2) | ((columns & 7) >> 1)
    lines = (rows >> 4 << 3) | (rows & 7)
    # [1, columns] and [rows, 1]; the words are [rows, columns]
    w0, w1, w2, w3 = tl.philox(
        seed, groups.to(tl.uint32)[None, :], lines.to(tl.uint32)[:, None], 0, 0
    )
    is_right, is_low = ((columns & 8) != 0)[None, :], ((rows & 8) != 0)[:, None]
    words = tl.where(is_low, tl.where(is_right, w3, w2), tl.where(is_right, w1, w0))
    bits = tl.where((columns & 1 != 0)[None, :], words >> 16, words & 0xFFFF)
    return bits.to(tl.int32) >= drops
