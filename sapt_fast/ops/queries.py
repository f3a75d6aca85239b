"""Queries from pooled embeddings, and their scores with the adapters' keys; in plain torch."""

from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from sapt_fast.ops._common import require_tensors, without_autocast

SIMILARITIES = ("dot", "cosine")
COSINE_EPS = 1e-8  # the least norm that is divided by, torch.nn.functional.cosine_similarity's


class QueryProjection(NamedTuple):
    """The query projection `q = LayerNorm(SiLU(up down e))`, without biases.

    Attributes:
        down: [H, D].
        up: [D, H].
        norm_weight, norm_bias: [D], of the LayerNorm.
        eps: of the LayerNorm.

    Example:
        >>> import torch
        >>> from sapt_fast.ops import QueryProjection, route
        >>> D, H, K = 8, 4, 3
        >>> projection = QueryProjection(
        ...     torch.randn(H, D), torch.randn(D, H), torch.ones(D), torch.zeros(D))
        >>> route(torch.randn(2, 5, D), torch.randn(K, D), projection).shape
        torch.Size([2, 3])
    """

    down: Tensor
    up: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    eps: float = 1e-5


class TaskProjections(NamedTuple):
    """One query projection per adapter, `q_k = SiLU(up_k SiLU(down_k e))`, without biases.

    GainLoRA (NeurIPS 2025) has one per task. The queries of an adapter are compared with its key
    alone.

    Attributes:
        down: [K, H, D].
        up: [K, D', H], with D' the width of the keys.

    Example:
        >>> import torch
        >>> from sapt_fast.ops import TaskProjections, route
        >>> D, H, K = 8, 4, 3
        >>> projections = TaskProjections(torch.randn(K, H, D), torch.randn(K, D, H))
        >>> route(
        ...     torch.randn(2, 5, D), torch.randn(K, D), projections, pooling="mean",
        ...     gate="abs_sigmoid", similarity="cosine", temperature=0.25).shape
        torch.Size([2, 3])
    """

    down: Tensor
    up: Tensor


AnyProjection: TypeAlias = QueryProjection | TaskProjections | None


def query(pooled: Tensor, projection: AnyProjection) -> Tensor:
    """Returns the queries of pooled embeddings [B, D], in float32 or wider.

    They are [B, D]; of `TaskProjections` [K, B, D'].
    """
    q = pooled.to(torch.promote_types(pooled.dtype, torch.float32))
    if projection is None:
        return q
    if isinstance(projection, TaskProjections):
        down, up = (t.to(q.dtype) for t in projection)
        return F.silu(F.silu(q @ down.mT) @ up.mT)
    down, up, norm_weight, norm_bias = (t.to(q.dtype) for t in projection[:4])
    hidden = F.silu(F.linear(F.linear(q, down), up))
    return F.layer_norm(hidden, hidden.shape[-1:], norm_weight, norm_bias, projection.eps)


def route_scores_fwd(
    pooled: Tensor,
    keys: Tensor,
    projection: AnyProjection,
    divisor: float,
    similarity: str = "dot",
) -> Tensor:
    """Computes `query(pooled) keys^T / divisor` in float32, or float64 for float64 inputs.

    If the similarity is "cosine", both are normalised first, by norms of at least `COSINE_EPS`.
    """
    q = query(pooled, projection)
    wide = keys.to(q.dtype)
    if similarity == "cosine":
        q, wide = normalized(q), normalized(wide)
    if isinstance(projection, TaskProjections):
        return (q * wide.unsqueeze(1)).sum(-1).t().contiguous() / divisor
    return F.linear(q, wide) / divisor


def normalized(vectors: Tensor) -> Tensor:
    """Divides the vectors by their norms, or by `COSINE_EPS` if that is larger."""
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp(min=COSINE_EPS)


def route_scores_bwd(
    d_scores: Tensor,
    pooled: Tensor,
    keys: Tensor,
    projection: AnyProjection,
    divisor: float,
    needs: tuple[bool, ...],
    similarity: str = "dot",
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of `route_scores_fwd`, for backends that autograd cannot differentiate.

    The query is computed again, so that only the inputs are saved for the backward. All tensors
    have at most B x D numbers, with `TaskProjections` K x B x D'. A separate kernel would only save
    a few launches per step, so every backend uses this.

    Args:
        d_scores: [B, K]. The other arguments are as in the forward.
        needs: whether to compute the gradient of pooled, of keys, and of each of the projection's
            four tensors.

    Returns:
        The gradients in that order and in the dtypes of their tensors, None for what is not needed.
    """
    wide = torch.promote_types(pooled.dtype, torch.float32)
    grads: list[Tensor | None] = [None] * 6
    with without_autocast(pooled.device):
        scaled, e = d_scores.to(wide) / divisor, pooled.to(wide)
        if projection is None:
            grads[:2] = _products_bwd(scaled, e, keys.to(wide), similarity)
        elif isinstance(projection, TaskProjections):
            grads[:4] = _task_bwd(scaled, e, keys.to(wide), projection, similarity)
        else:
            grads = _projected_bwd(scaled, e, keys.to(wide), projection, similarity)
    tensors = (pooled, keys, *(projection or ())[:4], *(None,) * 4)[:6]
    return tuple(
        grad.to(tensor.dtype) if wanted and grad is not None and tensor is not None else None
        for grad, tensor, wanted in zip(grads, tensors, needs, strict=True)
    )


def _products_bwd(
    scaled: Tensor, q: Tensor, keys: Tensor, similarity: str
) -> tuple[Tensor, Tensor]:
    """Gradients of queries [B, D] and keys [K, D] from those of their products [B, K]."""
    if similarity == "dot":
        return scaled @ keys, scaled.t() @ q
    units, unit_keys = normalized(q), normalized(keys)
    d_query = _normalized_bwd(scaled @ unit_keys, units, q)
    return d_query, _normalized_bwd(scaled.t() @ units, unit_keys, keys)


def _normalized_bwd(d_units: Tensor, units: Tensor, vectors: Tensor) -> Tensor:
    """Gradient of vectors from that of `normalized(vectors)`."""
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    along = (d_units * units).sum(-1, keepdim=True)
    # A norm below eps is a constant.
    tangent = d_units - units * torch.where(norms < COSINE_EPS, 0.0, along)
    return tangent / norms.clamp(min=COSINE_EPS)


def _projected_bwd(
    scaled: Tensor, e: Tensor, keys: Tensor, projection: QueryProjection, similarity: str
) -> list[Tensor | None]:
    down, up, norm_weight, norm_bias = (t.to(e.dtype) for t in projection[:4])
    hidden = e @ down.t()
    z = hidden @ up.t()
    gate = torch.sigmoid(z)
    active = z * gate
    centred = active - active.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + projection.eps).rsqrt()
    normed = centred * rstd
    q = normed * norm_weight + norm_bias
    d_query, d_keys = _products_bwd(scaled, q, keys, similarity)
    d_normed = d_query * norm_weight
    shift = d_normed.mean(-1, keepdim=True)
    slope = (d_normed * normed).mean(-1, keepdim=True)
    d_z = (d_normed - shift - normed * slope) * rstd * gate * (1 + z * (1 - gate))
    d_hidden = d_z @ up
    return [
        d_hidden @ down,
        d_keys,
        d_hidden.t() @ e,
        d_z.t() @ hidden,
        (d_query * normed).sum(0),
        d_query.sum(0),
    ]


def _task_bwd(
    scaled: Tensor, e: Tensor, keys: Tensor, projections: TaskProjections, similarity: str
) -> list[Tensor | None]:
    """The same for queries [K, B, D'], each compared with its own key."""
    down, up = (t.to(e.dtype) for t in projections)
    hidden = e @ down.mT  # [K, B, H]
    active = F.silu(hidden)
    z = active @ up.mT
    q, d_products = F.silu(z), scaled.t().unsqueeze(-1)
    own = keys.unsqueeze(1)
    if similarity == "cosine":
        units, unit_keys = normalized(q), normalized(own)
        d_query = _normalized_bwd(d_products * unit_keys, units, q)
        d_keys = _normalized_bwd((d_products * units).sum(1, keepdim=True), unit_keys, own)
    else:
        d_query, d_keys = d_products * own, (d_products * q).sum(1, keepdim=True)
    d_z = d_query * _silu_slope(z)
    d_hidden = (d_z @ up) * _silu_slope(hidden)
    return [
        (d_hidden @ down).sum(0),
        d_keys.squeeze(1),
        d_hidden.mT @ e,
        d_z.mT @ active,
    ]


def _silu_slope(z: Tensor) -> Tensor:
    gate = torch.sigmoid(z)
    return gate * (1 + z * (1 - gate))


# --- arguments of registered ops ---------------------------------------------------------------


def flat(projection: AnyProjection) -> tuple[Any, ...]:
    """Converts the projection for the registered ops; `unflat` is the inverse."""
    if projection is None:
        return (None,) * 4 + (0.0,)
    if isinstance(projection, TaskProjections):
        return (*projection, None, None, 0.0)
    return tuple(projection)


def unflat(
    down: Tensor | None,
    up: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> AnyProjection:
    """Returns the projection of the registered ops' arguments."""
    if down is None or up is None:
        return None
    if norm_weight is None or norm_bias is None:
        return TaskProjections(down, up)
    return QueryProjection(down, up, norm_weight, norm_bias, eps)


def projection_parts(projection: AnyProjection, keys: Tensor, width: int) -> dict[str, Tensor]:
    """Checks the shapes of the projection's tensors, and returns them by their names.

    Args:
        projection: the projection.
        keys: [K, D'].
        width: D, of the embeddings.
    """
    if projection is None:
        return {}
    if not isinstance(projection, QueryProjection | TaskProjections):
        raise TypeError(
            f"projection: got {type(projection).__name__}, expected a QueryProjection, "
            "TaskProjections or None"
        )
    parts = {f"projection.{n}": t for n, t in projection._asdict().items() if n != "eps"}
    require_tensors(**parts)
    expected: tuple[tuple[int, ...], ...]
    if isinstance(projection, TaskProjections):
        (count, own), down = keys.shape, projection.down
        hidden = down.shape[1] if down.dim() == 3 else 0
        expected = ((count, hidden, width), (count, own, hidden))
    else:
        hidden = projection.down.shape[0]
        expected = ((hidden, width), (width, hidden), (width,), (width,))
    for (name, tensor), shape in zip(parts.items(), expected, strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {shape}")
    return parts
