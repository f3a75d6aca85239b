"""CUDA backend of op `nearest_key`, for a few queries: see csrc/cuda/nearest_key.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from sapt_fast.cuda_kernels import common


def nearest_key_fwd(query: Tensor, keys: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest key of every query, by Euclidean distance.

    Args:
        query: [M, D]; float32, float16 or bfloat16. Right for any M; the keys are read once for
            16 queries of 16 bits, for 4 of float32.
        keys: [N, D], query's dtype, N < 2^32.
        radius: [N] float32.

    Returns:
        distance [M] float32 to the nearest key, infinite if there is none; index [M] int64, -1
        where that key is farther than its radius; nearest [M] int64, accepted or not, -1 if there
        is none. Of keys at equal distances the lowest index. Several queries of 16 bits
        compare |k|^2 - 2 q k in float32, in whose rounding keys may change places.

    Raises:
        TypeError: if query's dtype has no kernel.
        ValueError: if the tensors are not on a CUDA device.
        ValueError: if the number of keys is too large.
        RuntimeError: if a launch failed.
    """
    queries, count = query.shape[0], keys.shape[0]
    distance = query.new_empty(queries, dtype=torch.float32)
    index = query.new_empty(queries, dtype=torch.int64)
    nearest = query.new_empty(queries, dtype=torch.int64)
    if queries == 0 or count == 0:
        return distance.fill_(float("inf")), index.fill_(-1), nearest.fill_(-1)
    native = common.native()
    query, keys, radius = query.contiguous(), keys.contiguous(), radius.contiguous()
    size = native.cuda_nearest_key_workspace(queries, count)
    workspace = query.new_empty(size, dtype=torch.int64)
    native.cuda_nearest_key(
        common.dtype_code(query.dtype), query, keys, radius, distance, index, nearest,
        workspace, queries, count, query.shape[1], common.place(query.device),
    )  # fmt: skip
    return distance, index, nearest
