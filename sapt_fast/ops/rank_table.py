"""Which adapter each rank row of a stacked pool belongs to, and which rows train."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class RankTable(NamedTuple):
    """What each of the R rank rows of a stacked pool belongs to.

    Attributes:
        row_adapter: [R] int32, the adapter of the row.
        row_scale: [R] float32 (float64 in float64 models), that adapter's scaling.
    """

    row_adapter: Tensor
    row_scale: Tensor


def rank_table(
    ranks: Sequence[int],
    scaling: Sequence[float] | Tensor,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> RankTable:
    """The table of a pool whose adapter k has `ranks[k]` rows and scaling `scaling[k]`."""
    owners = [k for k, rank in enumerate(ranks) for _ in range(rank)]
    adapter = torch.tensor(owners, dtype=torch.int32, device=device)
    scale = torch.as_tensor(scaling, dtype=dtype, device=device)
    return RankTable(adapter, scale.index_select(0, adapter))


def rank_layout(ranks: int | Sequence[int], count: int, total: int) -> tuple[int, ...]:
    """The rank of each of `count` adapters; raises unless they sum to `total` rows."""
    if isinstance(ranks, str) or not (hasattr(ranks, "__index__") or isinstance(ranks, Iterable)):
        raise TypeError(f"ranks: got {ranks!r}, expected an int or a sequence of ints")
    given = (ranks,) if isinstance(ranks, int) else tuple(ranks)
    if not all(isinstance(rank, int) for rank in given):
        raise TypeError(f"ranks: got {ranks!r}, expected an int or a sequence of ints")
    layout = (ranks,) * count if isinstance(ranks, int) else given
    if len(layout) != count:
        raise ValueError(f"ranks: got {len(layout)} ranks, expected {count} (the K of mixture)")
    if any(r < 0 for r in layout) or sum(layout) != total:
        raise ValueError(
            f"ranks: got {ranks} for {count} adapters, expected ranks >= 0 with sum {total}"
            " (the rows of lora_a)"
        )
    return layout


def _are_indices(values: object) -> bool:
    return isinstance(values, Iterable) and not any(
        isinstance(k, bool) or not hasattr(k, "__index__") for k in values
    )


def trained_rows(layout: tuple[int, ...], trainable: Sequence[int] | None) -> list[int]:
    """Row ranges [start, stop, start, stop, ...] of the adapters that train, neighbours merged."""
    count = len(layout)
    if trainable is not None and not _are_indices(trainable):
        raise TypeError(f"trainable: got {trainable!r}, expected indices of adapters")
    chosen = range(count) if trainable is None else sorted(set(trainable))
    if chosen and (chosen[0] < 0 or chosen[-1] >= count):
        raise ValueError(f"trainable: got {list(chosen)}, expected indices in [0, {count})")
    starts = [sum(layout[:k]) for k in range(count)]
    rows: list[int] = []
    for k in chosen:
        if layout[k] == 0:
            continue
        if rows and rows[-1] == starts[k]:
            rows[-1] += layout[k]
        else:
            rows += [starts[k], starts[k] + layout[k]]
    return rows


@lru_cache(maxsize=256)
def cached_table(
    layout: tuple[int, ...], scaling: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> RankTable:
    """`rank_table`, made once."""
    with torch.inference_mode(False):  # the table outlives the call that first needed it
        return rank_table(layout, scaling, device, dtype)
