"""What the two searches over a table of keys have in common."""

import torch
from torch import Tensor

from sapt_fast.ops._common import FLOATS, autocasts, require_tensors

# Queries and keys of which a reference holds all pairs at a time.
ROW_CHUNK = 1024
KEY_CHUNK = 4096


def checked_query(query: Tensor, keys: Tensor) -> Tensor:
    """The query, in keys' dtype under autocast.

    Raises:
        ValueError, TypeError: shape, dtype or device of `query` or `keys` does not fit.
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
    """Float32, or float64 for float64: the dtype of sums, scores and distances."""
    return torch.promote_types(dtype, torch.float32)


def pairwise_distance(query: Tensor, keys: Tensor) -> Tensor:
    """[M, N], from the differences: the expanded square loses what near neighbours differ in."""
    return torch.cdist(query, keys, compute_mode="donot_use_mm_for_euclid_dist")
