"""Gates: weights of adapters from their scores, and a loss that balances the adapters' load."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sapt_fast.ops._common import require_tensors, without_autocast
from sapt_fast.ops._scalars import integer, number, require_float

GATES = ("softmax", "sigmoid", "abs_sigmoid", "relu")  # kernels know them by their places

_FEW = 4  # so many maxima take less time than a sort of all weights


class Gate(NamedTuple):
    """How scores become weights: the checked arguments of `route` of the same names."""

    kind: str = "softmax"
    top_k: int | None = None
    threshold: float | None = None
    renormalize: bool = True

    def is_sparse(self, count: int) -> bool:
        """Returns whether some of `count` weights can be dropped."""
        return bool(self.threshold) or (self.top_k is not None and self.top_k < count)

    def is_of_its_weights(self) -> bool:
        """Returns whether the weights alone determine the gradient of the scores.

        A renormalised softmax is the softmax over the kept scores: w_i = exp(s_i) / sum of the kept
        exp(s_j), so that d_scores_i = w_i (d_weights_i - sum_j w_j d_weights_j).
        """
        return self.kind == "softmax" and self.renormalize


def checked_gate(
    kind: str, top_k: int | None, threshold: float | None, renormalize: bool | None
) -> Gate:
    """Returns the gate of these arguments of `route`; raises ValueError or TypeError."""
    if kind not in GATES:
        raise ValueError(f"gate: got {kind!r}, expected one of {GATES}")
    top_k = None if top_k is None else integer("top_k", top_k)
    if top_k is not None and not top_k >= 1:
        raise ValueError(f"top_k: got {top_k}, expected at least 1 or None")
    threshold = None if threshold is None else number("threshold", threshold)
    most = math.inf if kind == "relu" else 1
    if threshold is not None and not (0 <= threshold <= most and math.isfinite(threshold)):
        within = "at least 0" if kind == "relu" else "in [0, 1]"
        raise ValueError(f"threshold: got {threshold}, expected a number {within} or None")
    if not isinstance(renormalize, bool | None):
        raise TypeError(f"renormalize: got {renormalize!r}, expected True, False or None")
    return Gate(kind, top_k, threshold, kind == "softmax" if renormalize is None else renormalize)


def sparsify(
    weights: Tensor,
    *,
    top_k: int | None = None,
    threshold: float | None = None,
    renormalize: bool = True,
) -> Tensor:
    """Sets small weights to zero, as `route` does.

    Args:
        weights: [..., K], none of them negative.
        top_k: keep only the k largest weights of each row; of equal weights, those of the lower
            index. None keeps all.
        threshold: set weights below it to zero, in [0, 1]; the largest weight of a row stays. None
            keeps all.
        renormalize: whether to scale the kept weights of each row to sum to 1.

    Returns:
        [..., K] in the dtype of the weights; these themselves if nothing can be dropped.

    Raises:
        ValueError, TypeError: if `top_k`, `threshold` or `renormalize` does not fit.

    Example:
        >>> import torch
        >>> from sapt_fast.ops import sparsify
        >>> sparsify(torch.tensor([[0.5, 0.1, 0.4]]), top_k=2)
        tensor([[0.5556, 0.0000, 0.4444]])
    """
    gate = checked_gate("softmax", top_k, threshold, renormalize)
    return _sparse(weights, gate) if gate.is_sparse(weights.shape[-1]) else weights


def balance_loss(weights: Tensor, chosen: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Returns a loss that is least if all adapters are used equally often.

    It is `K sum_k f_k P_k`, with f_k the share of tokens that chose adapter k and P_k the mean
    weight of k (Switch Transformers, Fedus et al. 2022, equation 4; MixLoRA, Li et al. 2024). With
    c choices per token and weights that sum to 1, an even load gives c.

    Args:
        weights: [..., K], before any are dropped; the only input that gets a gradient.
        chosen: [..., K], nonzero where a token uses the adapter: booleans, or the weights that were
            kept.
        mask: [...], zero for tokens that do not count; None for no such tokens.

    Returns:
        A scalar in float32 (float64 for float64 weights); 0 if no token counts.

    Raises:
        ValueError, TypeError: if a shape, dtype or device does not fit.

    Example:
        >>> import torch
        >>> from sapt_fast.ops import balance_loss
        >>> weights = torch.tensor([[0.9, 0.1], [0.7, 0.3]])
        >>> balance_loss(weights, weights > 0.5)  # all tokens choose the first: 2 (1 x 0.8)
        tensor(1.6000)
    """
    require_tensors(weights=weights, chosen=chosen, mask=mask)
    require_float("weights", weights)
    if weights.dim() < 1:
        raise ValueError(f"weights: got shape {tuple(weights.shape)}, expected [..., K]")
    shapes = {"chosen": (chosen, weights.shape), "mask": (mask, weights.shape[:-1])}
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        if tensor is not None and tensor.device != weights.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected {weights.device}")
    count = weights.shape[-1]
    with without_autocast(weights.device):
        wide = weights.to(torch.promote_types(weights.dtype, torch.float32)).reshape(-1, count)
        used = (chosen != 0).reshape(-1, count)
        tokens = torch.as_tensor(wide.shape[0], device=wide.device)
        if mask is not None:
            counts = (mask != 0).reshape(-1, 1)
            wide, used = wide.masked_fill(~counts, 0.0), used & counts
            tokens = counts.sum()
        tokens = tokens.clamp(min=1)
        return count * ((used.sum(0) / tokens) * (wide.sum(0) / tokens)).sum()


# --- reference ---------------------------------------------------------------------------------


def gate_fwd(scores: Tensor, gate: Gate) -> Tensor:
    """Computes the weights of scores [N, K], in their dtype."""
    weights = _activated(scores, gate.kind)
    if gate.is_sparse(scores.shape[-1]):
        return _sparse(weights, gate)
    # A softmax sums to 1 already.
    return _normalized(weights) if gate.renormalize and gate.kind != "softmax" else weights


def gate_bwd(d_weights: Tensor, weights: Tensor, scores: Tensor | None, gate: Gate) -> Tensor:
    """Returns the gradient of the scores, for backends that autograd cannot differentiate.

    Which weights are kept is locally constant: those that are not zero, because a zero that was
    kept has no gradient either.

    Args:
        d_weights, weights: [N, K].
        scores: [N, K]; not needed if `is_of_its_weights`.
        gate: the gate.
    """
    shared = (weights * d_weights).sum(-1, keepdim=True)
    if scores is None:
        return weights * (d_weights - shared)
    kept = weights != 0
    full = _activated(scores, gate.kind)
    d_full = d_weights
    if gate.renormalize:
        total = (full * kept).sum(-1, keepdim=True)
        d_full = (d_weights - shared) / torch.where(total == 0, 1.0, total)
    d_full = d_full.masked_fill(~kept, 0.0)
    if gate.kind == "softmax":
        return full * (d_full - (full * d_full).sum(-1, keepdim=True))
    if gate.kind == "sigmoid":
        return d_full * full * (1 - full)
    if gate.kind == "abs_sigmoid":
        return d_full * scores.sign() * (1 - full) * (1 + full) / 2
    return d_full  # relu's, where kept


def _activated(scores: Tensor, kind: str) -> Tensor:
    if kind == "softmax":
        return torch.softmax(scores, -1)
    if kind == "sigmoid":
        return torch.sigmoid(scores)
    if kind == "abs_sigmoid":
        return torch.tanh(scores / 2).abs()  # |2 sigmoid(s) - 1| without the cancellation
    return torch.relu(scores) + 0.0  # relu(-0.0) is -0.0


def _sparse(weights: Tensor, gate: Gate) -> Tensor:
    """Drops small weights of [..., K]: at least one of them can be dropped."""
    top_k, threshold = gate.top_k, gate.threshold
    keep = torch.ones_like(weights, dtype=torch.bool)
    if threshold:
        keep = weights >= weights.amax(-1, keepdim=True).clamp(max=threshold)
    if top_k is not None and top_k < weights.shape[-1]:
        keep = keep & _largest(weights.detach(), top_k)
    kept = weights * keep
    return _normalized(kept) if gate.renormalize else kept


def _largest(weights: Tensor, top_k: int) -> Tensor:
    """Returns which of [..., K] are among the top_k largest; of equal ones the first."""
    if top_k > _FEW:
        # A stable sort, because topk guarantees no order among equal values.
        largest = weights.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        of_all = torch.zeros_like(weights, dtype=torch.bool)
        return of_all.scatter(-1, largest, torch.ones_like(largest, dtype=torch.bool))
    left = weights
    for _ in range(top_k):
        left = left.scatter(-1, left.argmax(-1, keepdim=True), -math.inf)
    return left == -math.inf


def _normalized(weights: Tensor) -> Tensor:
    """Scales rows to sum to 1; rows of zeros stay zeros."""
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total)
