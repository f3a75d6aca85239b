"""Prefixes of one attention layer: rows before its keys and values, mixed or chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from sapt_fast.ops.mix_prompts import mix_prompts
from sapt_fast.pools.rows import RowStack

__all__ = ["chosen_prefixes", "mixed_prefixes", "orthonormal_rows"]


def mixed_prefixes(stack: RowStack, weights: Tensor, like: Tensor) -> Tensor:
    """Mixes prefixes per sample, by `ops.mix_prompts` without embeddings.

    Args:
        stack: M prefixes, each flattened from [2, P, D].
        weights: [B, M].
        like: the layer's keys [B, heads, T, D / heads]; the sums have their dtype and device.

    Returns:
        [B, 2, P, D].
    """
    width = like.shape[1] * like.shape[3]
    prompts = stack.joined().view(len(stack), -1, width)
    if prompts.dtype not in (like.dtype, torch.float32):
        prompts = prompts.float()  # autocast in another 16-bit dtype than that of the weights
    mixed = mix_prompts(
        prompts.to(like.device),
        weights.to(like.device),
        like.new_empty(len(weights), 0, width),
    )
    return mixed.unflatten(1, (2, -1))


def chosen_prefixes(stack: RowStack, index: Tensor, like: Tensor) -> Tensor:
    """Gathers one prefix for each sample.

    Args:
        stack: K prefixes, each flattened from [2, P, D].
        index: [B, 1] int64, the indices of the prefixes; [1, 1] for all samples alike.
        like: as in `mixed_prefixes`.

    Returns:
        [B, 2, P, D] or [1, 2, P, D].
    """
    rows = stack.joined()
    if len(index) > 1 and index.stride(0) == 0:  # one row for all
        index = index[:1]
    chosen = rows[index[:, 0].to(rows.device)]
    return chosen.view(len(chosen), 2, -1, like.shape[1] * like.shape[3])


def orthonormal_rows(past: Tensor, count: int) -> Tensor:
    """Draws orthonormal rows that are orthogonal to given ones, as Gram and Schmidt do.

    Args:
        past: [M, D].
        count: number of rows; at most D - M.

    Returns:
        [count, D] float64 on the CPU.

    Raises:
        ValueError: if there is no room for so many.
    """
    given = past.detach().to("cpu", torch.float64)
    rows, width = given.shape
    if rows + count > width:
        raise ValueError(
            f"pool: got {rows + count} orthogonal rows of width {width}, expected at most {width}"
        )
    drawn = torch.randn(count, width, dtype=torch.float64)
    basis = torch.linalg.qr(given.t()).Q
    for _ in range(2):  # once is not enough for the last digits
        drawn = drawn - drawn @ basis @ basis.t()
    q, r = torch.linalg.qr(drawn.t())
    return (q * r.diagonal().sign()).t()
