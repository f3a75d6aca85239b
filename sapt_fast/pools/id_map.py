"""A map from ids to places that takes memory only near the ids that were ever set."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["SPARE", "IdMap"]

SPARE = 16  # what is full grows by its 16th part, so that at most that much stays unused
_BITS = 6  # of the position within a page
_SLOTS = 1 << _BITS


class IdMap:
    """Where the things with ids 0 to N - 1 are; a table of pages, as for virtual memory.

    A page has the places of 64 neighbouring ids (256 bytes), and exists once one of them was set.
    The directory of pages takes 4 bytes for every 64 ids.

    Args:
        num_ids: N.
        device: of the map.
    """

    @torch.inference_mode(False)
    def __init__(self, num_ids: int, device: torch.device) -> None:
        # N is in the last page, and -1 is the last slot of it: never set, so that both have no
        # place. Page 0 belongs to all ids without a page: zeros.
        pages = (num_ids >> _BITS) + 1
        self._page = torch.zeros(pages, dtype=torch.int32, device=device)
        self._plus_one = torch.zeros(1, _SLOTS, dtype=torch.int32, device=device)
        self._size = 1  # pages in use

    @property
    def nbytes(self) -> int:
        """Number of bytes, spare pages included."""
        return self._page.nbytes + self._plus_one.nbytes

    def find(self, ids: Tensor) -> Tensor:
        """Returns the places of ids -1 to N (int64, any shape); -1 for those without one."""
        return self._plus_one[self._page[ids >> _BITS], ids & (_SLOTS - 1)].long() - 1

    def set(self, ids: Tensor, places: Tensor) -> None:
        """Gives ids [U] from 0 to N - 1 places [U] below 2**31 - 1. This waits for the device."""
        self.reserve(ids)
        at = self._page[ids >> _BITS], ids & (_SLOTS - 1)
        self._plus_one[at] = (places + 1).to(torch.int32)

    def drop(self, ids: Tensor) -> None:
        """Takes the places of ids [U] from 0 to N - 1 away, where they have one."""
        self._plus_one[self._page[ids >> _BITS], ids & (_SLOTS - 1)] = 0

    @torch.inference_mode(False)
    def reserve(self, ids: Tensor) -> None:
        """Makes room for ids [U] from 0 to N - 1. This waits for the device."""
        numbers = (ids >> _BITS).unique()
        new = numbers[self._page[numbers] == 0]
        if len(new) == 0:
            return
        size, capacity = self._size + len(new), self._plus_one.shape[0]
        if size > capacity:
            most = self._page.shape[0] + 1
            larger = self._plus_one.new_zeros(
                min(most, max(size, capacity + capacity // SPARE)), _SLOTS
            )
            larger[:capacity] = self._plus_one
            self._plus_one = larger  # before the directory, which another thread may be reading
        self._page[new] = torch.arange(
            self._size, size, dtype=torch.int32, device=self._page.device
        )
        self._size = size

    @torch.inference_mode(False)
    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Replaces every tensor by `fn` of it, for moves to another device."""
        self._page, self._plus_one = fn(self._page), fn(self._plus_one)
