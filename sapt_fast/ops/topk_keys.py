"""The k best keys of every query by inner product, cosine or Euclidean distance.

Prompt pools (L2P, CVPR 2022) and banks of experts are looked up this way. The M x N scores are not
stored, only a running top k.
"""

from typing import Any

import torch
from torch import Tensor

from sapt_fast import dispatch
from sapt_fast.ops import formulas, transforms
from sapt_fast.ops._keys import (
    KEY_CHUNK,
    ROW_CHUNK,
    accumulation_dtype,
    checked_query,
    pairwise_distance,
)
from sapt_fast.ops._scalars import integer

_OP = "topk_keys"
DISPATCH = dispatch.Op(few_rows=(16, 4))
_MAX_K_FEW_ROWS = 32  # of the kernels for few rows
METRICS = ("dot", "cosine", "l2")
# Number of elements of gathered keys that the backward stores at once.
_GATHER_CHUNK = 1 << 22


def topk_keys(
    query: Tensor, keys: Tensor, k: int, *, metric: str = "dot", backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Finds the k keys with the largest scores, best first.

    Equal scores are ordered by index, and equal keys have equal scores. A NaN score ranks below all
    others, even minus infinity; several NaNs are ordered by index. Scores are differentiable in
    `query` and `keys` through the selected pairs; the index is not.

    Args:
        query: [M, D]; float32, float16 or bfloat16, on a CPU also float64.
        keys: [N, D] in query's dtype.
        k: 1 to N.
        metric: "dot"; "cosine", in which a vector of zeros has score 0 with all others and no
            gradient; or "l2", the negative squared Euclidean distance.
        backend: as in `dispatch.resolve`.

    Returns:
        scores: [M, k] in float32, or float64 for float64.
        index: [M, k] int64.

    Raises:
        ValueError, TypeError: if a shape, dtype, device, `k` or `metric` does not fit.
        dispatch.BackendError: if the named backend cannot run here.

    Example:
        >>> import torch
        >>> from sapt_fast.ops import topk_keys
        >>> keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
        >>> topk_keys(torch.tensor([[1.0, 0.5]]), keys, 2)
        (tensor([[2., 1.]]), tensor([[2, 0]]))
    """
    query = checked_query(query, keys)
    if metric not in METRICS:
        raise ValueError(f"metric: got {metric!r}, expected one of {METRICS}")
    k = integer("k", k)
    if not 1 <= k <= keys.shape[0]:
        raise ValueError(f"k: got {k}, expected 1 to {keys.shape[0]} (the number of keys)")
    if transforms.active():
        dispatch.resolve(_OP, query.device, backend, query.dtype)
        return formulas.topk_keys(query, keys, k, metric)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _forward_op(query, keys, k, metric, backend or "")
    rows = query.shape[0] if k <= _MAX_K_FEW_ROWS else None
    chosen = dispatch.resolve(_OP, query.device, backend, query.dtype, rows)
    scores, index = dispatch.kernels(_OP, chosen).topk_keys_fwd(query, keys, k, metric)
    return scores, index


# --- reference ---------------------------------------------------------------------------------


def topk_keys_fwd(query: Tensor, keys: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """Specifies the forward: returns `(scores [M, k], index [M, k])`."""
    dtype = accumulation_dtype(query.dtype)
    scores = query.new_empty((query.shape[0], k), dtype=dtype)
    index = query.new_empty((query.shape[0], k), dtype=torch.int64)
    for row in range(0, query.shape[0], ROW_CHUNK):
        rows = slice(row, row + ROW_CHUNK)
        q = query[rows].to(dtype).contiguous()
        best, at = q.new_empty((len(q), 0)), index.new_empty((len(q), 0))
        for start in range(0, keys.shape[0], KEY_CHUNK):
            part = keys[start : start + KEY_CHUNK].to(dtype).contiguous()
            ids = torch.arange(start, start + len(part), device=at.device)
            candidates = torch.cat([best, _all_scores(q, part, metric)], 1)
            owners = torch.cat([at, ids.expand(len(q), -1)], 1)
            # Ascending and stable: NaN is last, equal scores keep the order of their indices.
            order = candidates.neg().sort(dim=1, stable=True).indices[:, :k]
            best, at = candidates.gather(1, order), owners.gather(1, order)
        scores[rows], index[rows] = best, at
    return scores, index


def topk_keys_bwd(
    d_scores: Tensor,
    query: Tensor,
    keys: Tensor,
    scores: Tensor,
    index: Tensor,
    metric: str,
    needs_query: bool,
    needs_keys: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Returns `(d_query, d_keys)`, None for what is not needed; for all backends.

    The score of a pair has the gradient `c k - a q` in its query and `c q - b k` in its key. Only
    a chunk of the selected keys is gathered at a time; sums have a fixed order.
    """
    dtype = scores.dtype
    M, k = index.shape
    d_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    d_keys = query.new_zeros(keys.shape if needs_keys else (0,), dtype=dtype)
    step = max(1, _GATHER_CHUNK // (k * query.shape[1]))
    for row in range(0, M, step):
        rows = slice(row, row + step)
        q, picked = query[rows].to(dtype).unsqueeze(1), keys[index[rows]].to(dtype)
        g, s = d_scores[rows].unsqueeze(2), scores[rows].unsqueeze(2)
        if metric == "dot":
            c, a, b = g, torch.zeros_like(g), torch.zeros_like(g)
        elif metric == "cosine":
            per_q, per_k = inverse_norm(q), inverse_norm(picked)
            c, a, b = g * per_q * per_k, g * s * per_q**2, g * s * per_k**2
        else:
            c = a = b = 2 * g
        if needs_query:
            d_query[rows] = (c * picked - a * q).sum(1).to(query.dtype)
        if needs_keys:
            # index_put sorts the indices on a GPU: the same sum every time, unlike index_add.
            d_keys.index_put_((index[rows],), c * q - b * picked, accumulate=True)
    return d_query if needs_query else None, d_keys.to(keys.dtype) if needs_keys else None


def inverse_norm(vectors: Tensor) -> Tensor:
    """Returns [..., 1], one over the norm of `vectors` [..., D], or 0 for a vector of zeros."""
    norm = vectors.norm(dim=-1, keepdim=True)
    return torch.where(norm == 0, 0.0, 1 / norm)


def _all_scores(query: Tensor, keys: Tensor, metric: str) -> Tensor:
    if metric == "l2":
        return -pairwise_distance(query, keys).square()
    if metric == "cosine":
        query, keys = query * inverse_norm(query), keys * inverse_norm(keys)
    # Equal keys must have equal scores. The rounding of a matrix product may depend on their
    # position in its blocks, and that of a sum over non-contiguous tensors on their position too.
    step = max(1, _GATHER_CHUNK // max(1, keys.numel()))
    return torch.cat([(rows.unsqueeze(1) * keys).sum(-1) for rows in query.split(step)])


# --- registered ops ----------------------------------------------------------------------------


@torch.library.custom_op("sapt_fast::topk_keys_fwd", mutates_args=())
def _forward_op(
    query: Tensor, keys: Tensor, k: int, metric: str, backend: str
) -> tuple[Tensor, Tensor]:
    transforms.require_no_tangents(_OP)
    kernel = dispatch.kernels(_OP, dispatch.resolve(_OP, query.device, backend, query.dtype))
    return kernel.topk_keys_fwd(query, keys, k, metric)


@torch.library.custom_op("sapt_fast::topk_keys_bwd", mutates_args=())
def _backward_op(
    d_scores: Tensor,
    query: Tensor,
    keys: Tensor,
    scores: Tensor,
    index: Tensor,
    metric: str,
    needs_query: bool,
    needs_keys: bool,
) -> tuple[Tensor, Tensor]:
    """Calls `topk_keys_bwd`; returns empty tensors instead of None."""
    grads = topk_keys_bwd(d_scores, query, keys, scores, index, metric, needs_query, needs_keys)
    d_query, d_keys = (query.new_empty(0) if grad is None else grad for grad in grads)
    return d_query, d_keys


@_forward_op.register_fake
def _forward_fake(
    query: Tensor, keys: Tensor, k: int, metric: str, backend: str
) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], k)
    return (
        query.new_empty(shape, dtype=accumulation_dtype(query.dtype)),
        query.new_empty(shape, dtype=torch.int64),
    )


@_backward_op.register_fake
def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    _, query, keys, _, _, _, needs_query, needs_keys = arguments
    return (
        query.new_empty(query.shape if needs_query else 0),
        keys.new_empty(keys.shape if needs_keys else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, keys, _, ctx.metric, _ = inputs
    scores, index = output
    ctx.mark_non_differentiable(index)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, keys, scores, index)


def _backward(ctx: Any, d_scores: Tensor | None, _: None) -> tuple[Any, ...]:
    if d_scores is None:
        return (None,) * 5
    needs_query, needs_keys = ctx.needs_input_grad[:2]
    if transforms.differentiates_backward(d_scores):
        query, keys, _, index = ctx.saved_tensors
        d_query, d_keys = transforms.gradients(
            lambda q, k: [formulas.scores_of(q, k, index, ctx.metric)],
            [query, keys],
            [needs_query, needs_keys],
            [d_scores],
        )
        return d_query, d_keys, None, None, None
    d_query, d_keys = _backward_op(
        d_scores, *ctx.saved_tensors, ctx.metric, needs_query, needs_keys
    )
    return d_query if needs_query else None, d_keys if needs_keys else None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
