"""Helpers of the two searches over a table of keys."""

import torch
from torch import Tensor

from sapt_fast.ops._common import FLOATS, autocasts, require_tensors

# Numbers of queries and keys for which a reference stores all pairs at once.
ROW_CHUNK = 1024
KEY_CHUNK = 4096


def checked_query(query: Tensor, keys: Tensor) -> Tensor:
    """Checks query [M, D] and keys [N, D], and returns the query, in keys' dtype under autocast.

    Raises:
        ValueError, TypeError: if shape, dtype or device of `query` or `keys` does not fit.
    """
    require_tensors(query=query, keys=keys)
    if query.dim() != 2 or query.shape[1] == 0:
        raise ValueError(f"query: got shape {tuple(query.shape)}, expected [M, D] with D >= 1")
    if keys.dim() != 2 or keys.shape[1] != query.shape[1]:
        raise ValueError(f"keys: got shape {tuple(keys.shape)}, expected [N, {query.shape[1]}]")
    if keys.device != query.device:
        raise ValueError(f"keys: got device {keys.device}, expected {query.device} (that of query)")
    for name, tensor in (("query", query), ("keys", keys)):
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected one of {FLOATS}")
    if autocasts(query.device):
        query = query.to(keys.dtype)
    if keys.dtype != query.dtype:
        raise TypeError(f"keys: got dtype {keys.dtype}, expected {query.dtype} (that of query)")
    return query


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums, scores and distances: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def pairwise_distance(query: Tensor, keys: Tensor) -> Tensor:
    """Returns distances [M, N], from differences: the expanded square is inexact for near keys."""
    return torch.cdist(query, keys, compute_mode="donot_use_mm_for_euclid_dist")
