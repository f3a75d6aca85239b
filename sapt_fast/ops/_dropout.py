"""Dropout of the adapters' input, with a mask that every kernel computes anew and none stores.

The mask is a function of a seed, the row and the column. Counters of Philox 4x32-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011) give 128 bits each, of which an element
takes 16. So a counter serves eight adjacent columns, which a thread of a GPU loads together.

    counter   (column // 8, row, 0, 0), keyed by the seed
    word      column % 8 // 2
    bits      the lower 16 for an even column, the upper 16 for an odd one

An element is dropped if its 16 bits are below `Dropout.drops`. Rows and columns have a word of the
counter each, so that the number of elements may exceed 2**32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sapt_fast.ops._common import require_tensors
from sapt_fast.ops._scalars import number

UNIT = 1 << 16
"""The rate is rounded to a multiple of 1 / UNIT."""

_GROUP = 8  # columns of a counter
_WORD = 0xFFFFFFFF


class Dropout(NamedTuple):
    """The dropout of one call, with a mask for each projection.

    Attributes:
        drops: of `UNIT` elements, how many are dropped.
        seeds: int64 tensor [1] of each projection, on x's device.
    """

    drops: int
    seeds: Sequence[Tensor]

    @property
    def scale(self) -> float:
        """The factor of what is kept, so that the mean stays: 1 / (1 - rate)."""
        return UNIT / (UNIT - self.drops) if self.drops < UNIT else 0.0

    def of(self, chosen: Sequence[int]) -> "Dropout":
        """Returns the dropout of the projections of those numbers."""
        return Dropout(self.drops, [self.seeds[i] for i in chosen])


def drop_count(rate: float) -> int:
    """Returns a rate as `Dropout.drops`.

    Raises:
        TypeError, ValueError: if it is not a number in [0, 1].
    """
    rate = number("dropout_p", rate)
    if not 0 <= rate <= 1:
        raise ValueError(f"dropout_p: got {rate}, expected a number in [0, 1]")
    return round(rate * UNIT)


def drawn(rate: float, x: Tensor, count: int) -> Dropout | None:
    """Returns the dropout of `count` projections, seeded by torch's generator of x's device.

    The seeds are drawn on the device, without waiting for it, so that graphs draw them anew.

    Args:
        rate: the probability of dropping an element; None is returned for 0.
        x: a tensor on the device.
        count: the number of projections.
    """
    drops = drop_count(rate)
    if not drops:
        return None
    # Two numbers of 8 bytes each, of which one is used: every seed is aligned like the first.
    seeds = torch.randint(1 << 62, (count, 2), dtype=torch.int64, device=x.device)
    return Dropout(drops, [*seeds[:, :1].unbind()])


def seeded(rate: float, seed: Tensor | None, x: Tensor) -> Dropout | None:
    """Returns the dropout of one projection by a seed on x's device; None for the rate 0.

    Args:
        rate: the probability of dropping an element.
        seed: int64 tensor of one element. Defaults to a drawn one.
        x: a tensor on the device.

    Raises:
        TypeError, ValueError: if the rate or the seed does not fit.
    """
    require_tensors(x=x, seed=seed)
    if seed is None:
        return drawn(rate, x, 1)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(
            f"seed: got dtype {seed.dtype} and shape {tuple(seed.shape)}, expected one int64"
        )
    if seed.device != x.device:
        raise ValueError(f"seed: got device {seed.device}, expected {x.device} (that of x)")
    drops = drop_count(rate)
    return Dropout(drops, [seed.reshape(1)]) if drops else None


def as_argument(dropout: Dropout | None) -> tuple[Dropout, ...]:
    """Returns the last argument of a kernel: none without dropout, which some kernels lack."""
    return () if dropout is None else (dropout,)


def kept(x: Tensor, seed: Tensor, drops: int) -> Tensor:
    """Returns x [M, I] with 0 for the elements that are dropped; what is kept is not scaled."""
    return torch.where(mask(seed, drops, *x.shape), x, 0.0)


def mask(seed: Tensor, drops: int, rows: int, columns: int) -> Tensor:
    """Specifies which elements are kept: [rows, columns], boolean."""
    groups = torch.arange(-(-columns // _GROUP), device=seed.device)
    lines = torch.arange(rows, device=seed.device)
    # [rows, groups, 4] words, each of two columns
    words = torch.stack(_philox(seed, groups[None, :], lines[:, None]), -1)
    bits = torch.stack([words & 0xFFFF, words >> 16], -1).flatten(1)
    return bits[:, :columns] >= drops


def _philox(seed: Tensor, c0: Tensor, c1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns Philox 4x32-10 of the counters (c0, c1, 0, 0): four words of 32 bits, in int64."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    c0, c1 = torch.broadcast_tensors(c0, c1)
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        (a_high, a_low), (b_high, b_low) = _product(0xD2511F53, c0), _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _product(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the upper and the lower 32 bits of a product; int64 cannot overflow."""
    low, high = word * (factor & 0xFFFF), word * (factor >> 16)  # 48 bits each
    middle = (low >> 16) + high
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
