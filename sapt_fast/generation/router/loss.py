"""The loss of a trained router: cross-entropy plus Tversky."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["router_loss"]


def router_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    tversky: float = 0.75,
    false_positives: float = 0.7,
    false_negatives: float = 0.3,
    smoothing: float = 0.9,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Computes the loss of the Skeleton-of-Thought router (Ning et al., ICLR 2024, SoT-R).

        L = (1 - tversky) CE(logits, labels) + tversky (1 - I / (I + a FP + b FN))
        I = sum_i min(p_i, t_i),   FP = sum_i p_i - I,   FN = sum_i t_i - I

    p is the probability of label 1, t = smoothing * label, a and b are `false_positives` and
    `false_negatives`. The sums run over the batch. In a batch without label 1 the second term is 1
    and has no gradient.

    Args:
        logits: [B, 2], any floating dtype; below float32 the loss is computed in float32.
        labels: [B] int64, 0 or 1.
        tversky: weight of the Tversky term, in [0, 1].
        false_positives, false_negatives: a and b.
        smoothing: factor on the labels in the Tversky term.
        class_weights: [2], weights of the classes in the cross-entropy (its mean is weighted).

    Returns:
        A scalar, float32 or float64.

    Raises:
        ValueError: if a shape does not fit, or the batch is empty.
    """
    if logits.ndim != 2 or logits.shape[1] != 2 or not len(logits):
        raise ValueError(f"logits: got {list(logits.shape)}, expected [B, 2] with B of at least 1")
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels: got {list(labels.shape)}, expected [{len(logits)}]")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    targets = smoothing * labels.to(logits.dtype)  # [B]
    positive = logits.softmax(1)[:, 1]  # [B]
    common = torch.minimum(positive, targets).sum()
    weighted = (
        common
        + false_positives * (positive.sum() - common)
        + false_negatives * (targets.sum() - common)
    )
    # 0/0: no label 1, and every probability has underflowed
    some = weighted > torch.finfo(logits.dtype).tiny
    index = common / torch.where(some, weighted, 1.0)
    entropy = F.cross_entropy(logits, labels, weight=class_weights)
    return (1 - tversky) * entropy + tversky * (1 - index)
