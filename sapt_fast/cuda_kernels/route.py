"""CUDA backend of op `route`, for a few samples: see csrc/cuda/route.cu.

From pooled embeddings to weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sapt_fast.cuda_kernels import common

if TYPE_CHECKING:
    from sapt_fast.ops.route import QueryProjection


def route_scores_fwd(
    pooled: Tensor, keys: Tensor, projection: QueryProjection | None, divisor: float
) -> Tensor:
    """Scores of every key for each pooled embedding.

    Args:
        pooled: [B, D], float32, float16 or bfloat16, as all others. Meant for few samples: every
            one of them reads the projection anew.
        keys: [K, D].
        projection: from the pooled embedding to the query; None for the identity.
        divisor: what the scores are divided by.

    Returns:
        [B, K] float32, computed in float32 throughout.

    Raises:
        TypeError: if a dtype has no kernel.
        ValueError: if the tensors are not on a CUDA device.
        RuntimeError: if a launch failed.
    """
    scores = pooled.new_empty((pooled.shape[0], keys.shape[0]), dtype=torch.float32)
    _launch(pooled, keys, projection, divisor, scores, None, 1, 0.0)
    return scores


def route_fwd(
    pooled: Tensor,
    keys: Tensor,
    projection: QueryProjection | None,
    divisor: float,
    top_k: int | None,
    threshold: float | None,
) -> Tensor:
    """Weights of every adapter for each pooled embedding, from its scores.

    Args:
        pooled, keys, projection, divisor: as in `route_scores_fwd`; at most 1024 keys.
        top_k: weights that each sample keeps; None for all.
        threshold: weights below it are dropped, except the largest; None for 0.

    Returns:
        [B, K] float32; rows sum to 1.

    Raises:
        TypeError, ValueError, RuntimeError: as in `route_scores_fwd`; too many keys.
    """
    scores = pooled.new_empty((pooled.shape[0], keys.shape[0]), dtype=torch.float32)
    weights = torch.empty_like(scores)
    kept = keys.shape[0] if top_k is None else top_k
    _launch(pooled, keys, projection, divisor, scores, weights, kept, threshold or 0.0)
    return weights


def _launch(
    pooled: Tensor,
    keys: Tensor,
    projection: QueryProjection | None,
    divisor: float,
    scores: Tensor,
    weights: Tensor | None,
    top_k: int,
    threshold: float,
) -> None:
    """Fills `scores` [B, K], and `weights` [B, K] unless it is None."""
    if scores.numel() == 0:
        return
    (samples, width), hidden, eps = pooled.shape, 0, 0.0
    pooled, keys = pooled.contiguous(), keys.contiguous()
    parts: list[Tensor] = []
    workspace_size = 0
    if projection is not None:
        parts = [t.contiguous() for t in projection[:4]]
        hidden, eps = parts[0].shape[0], projection.eps
        workspace_size = samples * (hidden + width)
    workspace = scores.new_empty(workspace_size)
    common.native().cuda_route(
        common.typed(pooled), [common.typed(part) for part in parts], common.typed(keys),
        workspace, scores, weights, samples, width, hidden, keys.shape[0],
        top_k, eps, divisor, threshold, common.place(pooled.device),
    )  # fmt: skip
