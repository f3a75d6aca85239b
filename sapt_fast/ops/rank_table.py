"""Maps the rank rows of a stacked pool to adapters, and finds the rows that train."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sapt_fast.ops._scalars import integer, integers


class RankTable(NamedTuple):
    """The adapter of each of the R rank rows of a stacked pool.

    Attributes:
        row_adapter: [R] int32, the index of the row's adapter.
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
    """Builds the table of a pool whose adapter k has `ranks[k]` rows and scaling `scaling[k]`."""
    owners = [k for k, rank in enumerate(ranks) for _ in range(rank)]
    adapter = torch.tensor(owners, dtype=torch.int32, device=device)
    scale = torch.as_tensor(scaling, dtype=dtype, device=device)
    return RankTable(adapter, scale.index_select(0, adapter))


def rank_layout(ranks: int | Sequence[int], count: int, total: int) -> tuple[int, ...]:
    """Returns the rank of each of `count` adapters; raises unless they sum to `total` rows."""
    if isinstance(ranks, (str, bytes)):
        raise TypeError(f"ranks: got {ranks!r}, expected an int or a sequence of ints")
    given: Any = ranks
    several = isinstance(given, Sequence) or getattr(given, "ndim", 0) > 0
    layout = integers("ranks", given) if several else (integer("ranks", given),) * count
    if len(layout) != count:
        raise ValueError(f"ranks: got {len(layout)} ranks, expected {count} (the K of mixture)")
    if any(r < 0 for r in layout) or sum(layout) != total:
        raise ValueError(
            f"ranks: got {ranks} for {count} adapters, expected ranks >= 0 with sum {total}"
            " (the rows of lora_a)"
        )
    return layout


def trained_rows(layout: tuple[int, ...], trainable: Sequence[int] | None) -> list[int]:
    """Returns the row ranges [start, stop, ...] of the adapters that train; neighbours merged."""
    count = len(layout)
    chosen: Sequence[int] = range(count)
    if trainable is not None:
        chosen = sorted(set(integers("trainable", trainable)))
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
    """Returns `rank_table`, cached."""
    with torch.inference_mode(False):  # the table outlives the call that first needed it
        return rank_table(layout, scaling, device, dtype)
