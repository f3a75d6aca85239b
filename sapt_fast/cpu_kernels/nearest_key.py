"""CPU backend of op `nearest_key`: see `ops.nearest_key` for what is computed.

The same pass over the keys as that of `topk_keys`, with one candidate per query.
"""

import torch
from torch import Tensor

from sapt_fast import _C
from sapt_fast.cpu_kernels.common import CODES, with_unit_column_stride


def nearest_key_fwd(query: Tensor, keys: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the nearest key of every query, and whether the query is within its radius.

    Args:
        query: Of shape `[M, D]`, any of the floating-point dtypes, any strides.
        keys: Of shape `[N, D]`, query's dtype; copied unless its columns are adjacent in memory.
        radius: Of shape `[N]`, float32, float64 for float64.

    Returns:
        distance `[M]` in radius' dtype, index `[M]` int64 (-1 if farther than its radius) and
        nearest `[M]` int64 (-1 if there is none).
    """
    query, keys = with_unit_column_stride(query), with_unit_column_stride(keys)
    radius = radius.contiguous()
    M = query.shape[0]
    distance = query.new_empty((M,), dtype=radius.dtype)
    index = query.new_empty((M,), dtype=torch.int64)
    nearest = torch.empty_like(index)
    if keys.shape[0] == 0:
        return distance.fill_(float("inf")), index.fill_(-1), nearest.fill_(-1)
    _C.nearest_key(
        CODES[query.dtype], query, keys, radius, distance, index, nearest, torch.get_num_threads()
    )
    return distance, index, nearest
