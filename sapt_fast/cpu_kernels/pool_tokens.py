"""CPU backend of op `pool_tokens`: see `ops.pool_tokens` for what is computed.

The maximum is one pass over the ids in C++; torch's embedding bag takes 5 to 60 times as long. The
mean is torch's, which is limited only by the memory's bandwidth.
"""

import torch
from torch import Tensor

from sapt_fast import _C
from sapt_fast.cpu_kernels.common import CODES, with_unit_column_stride
from sapt_fast.ops.pool_tokens import pool_tokens_fwd as pooled_by_torch


def pool_tokens_fwd(
    input_ids: Tensor, table: Tensor, mask: Tensor | None, pooling: str, keep_winner: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Pools the embeddings of token ids.

    Args:
        input_ids: Of shape `[B, T]`, int32 or int64.
        table: Of shape `[V, D]`, any of the floating-point dtypes.
        mask: Of shape `[B, T]`, any dtype, zero for tokens that are not pooled; or None. With
            "max" the ids of such tokens may be anything.
        pooling: "max" or "mean".
        keep_winner: Whether the backward of "max" will run; V must then be below 2^31.

    Returns:
        The pooled embeddings `[B, D]` in table's dtype, and with `keep_winner` the id `[B, D]`
        (int32) that gave each maximum, the first in the sequence if several did, -1 for none.

    Raises:
        ValueError: if an id is not in [0, V), with "max".
        IndexError, RuntimeError: if an id is not in [0, V), with "mean".
    """
    if pooling == "mean":
        return pooled_by_torch(input_ids, table, mask, pooling), None
    (B, T), D = input_ids.shape, table.shape[1]
    pooled = table.new_empty(B, D)
    winner = table.new_empty((B, D), dtype=torch.int32) if keep_winner else None
    table, ids = with_unit_column_stride(table), input_ids.to(torch.int64).contiguous()
    kept = None if mask is None else (mask != 0).contiguous()
    _C.pool_tokens_max(
        CODES[table.dtype], pooled, winner, ids, kept, table, B, T, torch.get_num_threads()
    )
    return pooled, winner


def pool_tokens_bwd(
    dy: Tensor,
    input_ids: Tensor,
    mask: Tensor | None,
    winner: Tensor | None,
    vocabulary: int,
    pooling: str,
) -> Tensor:
    """Returns the gradient of `pool_tokens_fwd` with respect to the table; sums have a fixed order.

    Args:
        dy: Of shape `[B, D]`, any strides.
        input_ids, mask, pooling: As in the forward; the ids and the mask are read for "mean" only.
        winner: Of shape `[B, D]`, as the forward returned it; read for "max" only.
        vocabulary: V, the rows of the table.

    Returns:
        Of shape `[V, D]` in dy's dtype, summed in float32 or wider.
    """
    d_table = dy.new_zeros((vocabulary, dy.shape[1]))
    wide = dy.to(torch.promote_types(dy.dtype, torch.float32))
    if pooling == "max":
        assert winner is not None
        ids, place = winner.to(torch.int64).unique(return_inverse=True)
        sums = wide.new_zeros(len(ids), dy.shape[1]).scatter_add_(0, place, wide)
    else:
        # Tokens that take no part share the id -1.
        keep = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask != 0
        ids, place = torch.where(keep, input_ids.to(torch.int64), -1).unique(return_inverse=True)
        sums = wide.new_zeros(len(ids), dy.shape[1])
        share = wide / keep.sum(1, keepdim=True).clamp(min=1)
        for where, row in zip(place, share, strict=True):
            sums.index_add_(0, where, row.expand(len(where), -1))
    known = ids >= 0
    d_table[ids[known]] = sums[known].to(dy.dtype)
    return d_table
