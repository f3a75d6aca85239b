"""CUDA backend of op `route`, for a few samples: see csrc/cuda/route.cu.

From pooled embeddings to weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sapt_fast.cuda_kernels import common
from sapt_fast.ops.gates import GATES, Gate
from sapt_fast.ops.queries import AnyProjection, QueryProjection


def route_scores_fwd(
    rows: Tensor,
    keys: Tensor,
    projection: AnyProjection,
    divisor: float,
    similarity: str = "dot",
) -> Tensor:
    """Scores of every key for each row.

    Args:
        rows: pooled embeddings or tokens [N, D], float32, float16 or bfloat16, as all others. Meant
            for few rows: every one of them reads the projection anew.
        keys: [K, D], with `TaskProjections` of any width.
        projection: from the row to the query; None for the identity.
        divisor: what the similarities are divided by.
        similarity: "dot" or "cosine".

    Returns:
        [N, K] float32, computed in float32 throughout.

    Raises:
        TypeError: if a dtype has no kernel.
        ValueError: if the tensors are not on a CUDA device.
        RuntimeError: if a launch failed.
    """
    scores = rows.new_empty((rows.shape[0], keys.shape[0]), dtype=torch.float32)
    _launch(rows, keys, projection, divisor, similarity, Gate(), scores, None)
    return scores


def route_fwd(
    rows: Tensor,
    keys: Tensor,
    projection: AnyProjection,
    divisor: float,
    top_k: int | None,
    threshold: float | None,
    gate: str = "softmax",
    similarity: str = "dot",
    renormalize: bool = True,
) -> Tensor:
    """Weights of every adapter for each row, from its scores.

    Args:
        rows, keys, projection, divisor, similarity: as in `route_scores_fwd`; at most 1024 keys.
        top_k: weights that each row keeps; None for all.
        threshold: weights below it are dropped, except the largest; None for 0.
        gate: as in `ops.route`.
        renormalize: whether the kept weights are scaled to sum to 1.

    Returns:
        [N, K] float32.

    Raises:
        TypeError, ValueError, RuntimeError: as in `route_scores_fwd`; too many keys.
    """
    scores = rows.new_empty((rows.shape[0], keys.shape[0]), dtype=torch.float32)
    weights = torch.empty_like(scores)
    kind = Gate(gate, top_k, threshold, renormalize)
    _launch(rows, keys, projection, divisor, similarity, kind, scores, weights)
    return weights


def _launch(
    rows: Tensor,
    keys: Tensor,
    projection: AnyProjection,
    divisor: float,
    similarity: str,
    gate: Gate,
    scores: Tensor,
    weights: Tensor | None,
) -> None:
    """Fills `scores` [N, K], and `weights` [N, K] unless it is None."""
    if scores.numel() == 0:
        return
    (samples, width), (count, key_width), hidden, eps = rows.shape, keys.shape, 0, 0.0
    rows, keys = rows.contiguous(), keys.contiguous()
    parts: list[Tensor] = []
    workspace_size = 0
    if projection is not None:
        parts = [t.contiguous() for t in projection[:4]]
        hidden = parts[0].shape[-2]
        workspace_size = samples * (hidden + key_width)
        if isinstance(projection, QueryProjection):
            eps = projection.eps
        else:
            workspace_size *= count
    workspace = scores.new_empty(workspace_size)
    common.native().cuda_route(
        common.typed(rows), [common.typed(part) for part in parts], common.typed(keys),
        workspace, scores, weights, samples, width, hidden, key_width, count,
        count if gate.top_k is None else gate.top_k, eps, divisor, gate.threshold or 0.0,
        GATES.index(gate.kind), similarity == "cosine", gate.renormalize,
        common.place(rows.device),
    )  # fmt: skip
