"""CUDA backend of op `topk_keys`, for a few queries: see csrc/cuda/topk_keys.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from sapt_fast.cuda_kernels import common

_METRICS = {"dot": 0, "cosine": 1, "l2": 2}


def topk_keys_fwd(query: Tensor, keys: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """The k keys with the largest scores, best first; of equal scores the lower index first.

    Args:
        query: [M, D]; float32, float16 or bfloat16. Right for any M; the keys are read once for
            16 queries of 16 bits, for 4 of float32.
        keys: [N, D], query's dtype, N < 2^32.
        k: 1 to 32.
        metric: "dot", "cosine" or "l2". Several queries of 16 bits get l2 scores from
            |q|^2 + |k|^2 - 2 q k in float32, others from the differences.

    Returns:
        scores [M, k] float32 and index [M, k] int64.

    Raises:
        TypeError: if query's dtype has no kernel.
        ValueError: if k or the number of keys is too large.
        ValueError: if the tensors are not on a CUDA device.
        RuntimeError: if a launch failed.
    """
    native = common.native()
    if k > native.MAX_TOP_K:
        raise ValueError(
            f"k: got {k}, expected at most {native.MAX_TOP_K}: choose backend 'triton' for more"
        )
    queries, count = query.shape[0], keys.shape[0]
    scores = query.new_empty((queries, k), dtype=torch.float32)
    index = query.new_empty((queries, k), dtype=torch.int64)
    if queries == 0:
        return scores, index
    query, keys = query.contiguous(), keys.contiguous()
    size = native.cuda_topk_keys_workspace(queries, count)
    workspace = query.new_empty(size, dtype=torch.int64)
    native.cuda_topk_keys(
        common.dtype_code(query.dtype), _METRICS[metric], query, keys, scores, index, workspace,
        queries, count, query.shape[1], k, common.place(query.device),
    )  # fmt: skip
    return scores, index
