"""Routing: computes one weight per adapter for each input of a batch.

SAPT (ACL 2024): the input embeddings are pooled over the sequence and projected to a query. The
weights are the softmax of its products with one learned key per adapter. The reflection loss
penalises changes in the weights of earlier tasks' inputs.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sapt_fast import dispatch
from sapt_fast.ops import transforms
from sapt_fast.ops._common import require_tensors, without_autocast
from sapt_fast.ops._scalars import integer, number, require_float
from sapt_fast.ops.pool_tokens import (
    POOLINGS,
    check_devices,
    pool_embeds,
    pool_tokens,
    pool_tokens_fwd,
)

__all__ = [
    "POOLINGS",
    "QueryProjection",
    "pool_embeds",
    "pool_tokens",
    "pool_tokens_fwd",
    "query",
    "reflection_loss",
    "route",
    "route_bwd",
    "route_scores",
    "route_scores_bwd",
    "route_scores_fwd",
    "sparsify",
]

_OP = "route"
DISPATCH = dispatch.Op(few_rows=(4, 4))
_FUSED_KEYS = 1024  # so many keys at most from embedding to weights in one launch


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


def route(
    embeds: Tensor,
    keys: Tensor,
    projection: QueryProjection | None,
    *,
    mask: Tensor | None = None,
    pooling: str = "max",
    temperature: float | None = None,
    top_k: int | None = None,
    threshold: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Computes one weight per sample and adapter from the embeddings and the adapters' keys.

    Args:
        embeds: [B, T, D], or [B, D] if already pooled (by `pool_tokens`).
        keys: [K, D].
        projection: maps the pooled embedding to the query; None for the identity.
        mask: [B, T], zero for tokens that are not pooled; None for no such tokens.
        pooling: "max" (as in the original SAPT code) or "mean".
        temperature: the scores' divisor; None for sqrt(D).
        top_k: keep only the k largest weights of each sample, scaled to sum to 1; of equal weights,
            those of the lower index. None keeps all.
        threshold: set weights below it to exactly zero and scale the others to sum to 1; the
            largest weight of a sample always stays. None keeps all.
        backend: as in `dispatch.resolve`; float64 runs only in the reference.

    Returns:
        weights [B, K] in float32 (float64 for float64 inputs); rows sum to 1. All steps are
        computed in this dtype.

    Raises:
        ValueError: if a shape, device, `pooling`, `temperature`, `top_k` or `threshold` does not
            fit.
        dispatch.BackendError: if the named backend cannot run here, or does not support float64.

    Example:
        >>> import torch
        >>> from sapt_fast.ops import route
        >>> embeds, keys = torch.tensor([[[2.0, 0.0], [0.0, -1.0]]]), torch.eye(2)
        >>> route(embeds, keys, None, pooling="max", temperature=1.0)
        tensor([[0.8808, 0.1192]])
        >>> route(embeds, keys, None, pooling="max", temperature=1.0, top_k=1)
        tensor([[1., 0.]])
    """
    top_k, threshold = _checked_sparsity(top_k, threshold)
    pooled, divisor, chosen = _prepare(
        embeds, keys, projection, mask, pooling, temperature, backend
    )
    if chosen == "reference" or keys.shape[0] > _FUSED_KEYS:
        scores = _scores(pooled, keys, projection, divisor, chosen)
        return sparsify(torch.softmax(scores, -1), top_k=top_k, threshold=threshold)
    return _route_op(pooled, keys, *_flat(projection), divisor, top_k, threshold, chosen)


def route_scores(
    embeds: Tensor,
    keys: Tensor,
    projection: QueryProjection | None,
    *,
    mask: Tensor | None = None,
    pooling: str = "max",
    temperature: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Returns the scores [B, K] whose softmax is `route`; arguments and errors as in `route`."""
    pooled, divisor, chosen = _prepare(
        embeds, keys, projection, mask, pooling, temperature, backend
    )
    return _scores(pooled, keys, projection, divisor, chosen)


def query(pooled: Tensor, projection: QueryProjection | None) -> Tensor:
    """Returns the queries [B, D] of pooled embeddings [B, D], in float32 or wider."""
    q = pooled.to(torch.promote_types(pooled.dtype, torch.float32))
    if projection is None:
        return q
    down, up, norm_weight, norm_bias = (t.to(q.dtype) for t in projection[:4])
    hidden = F.silu(F.linear(F.linear(q, down), up))
    return F.layer_norm(hidden, hidden.shape[-1:], norm_weight, norm_bias, projection.eps)


def sparsify(
    weights: Tensor, *, top_k: int | None = None, threshold: float | None = None
) -> Tensor:
    """Removes small weights of [B, K] as `route` does; the kept ones sum to 1 in every row."""
    top_k, threshold = _checked_sparsity(top_k, threshold)
    count = weights.shape[-1]
    if (top_k is None or top_k >= count) and not threshold:
        return weights
    keep = torch.ones_like(weights, dtype=torch.bool)
    if threshold:
        keep = weights >= weights.amax(-1, keepdim=True).clamp(max=threshold)
    if top_k is not None and top_k < count:
        # A stable sort, because topk guarantees no order among equal values.
        largest = weights.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        chosen = torch.zeros_like(keep).scatter(
            -1, largest, torch.ones_like(largest, dtype=keep.dtype)
        )
        keep = keep & chosen
    kept = weights * keep
    return kept / kept.sum(-1, keepdim=True)


def reflection_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Returns KL(target || softmax(scores)), averaged over the batch (SAPT, attentive reflection).

    Args:
        scores: [B, K], the return value of `route_scores`.
        target: [K'] or [B, K'] with K' <= K, the target weights in learning order. The missing
            newer adapters count as zeros, so the loss reduces their weights.

    Returns:
        A scalar in float32 (float64 for float64 scores).

    Raises:
        ValueError, TypeError: if a shape, dtype or device does not fit.

    Example:
        >>> import torch
        >>> from sapt_fast.ops import reflection_loss
        >>> reflection_loss(torch.zeros(1, 2), torch.tensor([1.0]))  # log 2: the weight is 1/2
        tensor(0.6931)
    """
    require_tensors(scores=scores, target=target)
    if scores.dim() != 2:
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, expected [B, K]")
    require_float("scores", scores)
    require_float("target", target)
    check_devices(scores, target=target)
    batch, count = scores.shape
    shape = tuple(target.shape)
    if target.dim() not in (1, 2) or shape[-1] > count or (len(shape) == 2 and shape[0] != batch):
        raise ValueError(
            f"target: got shape {shape}, expected [K'] or [{batch}, K'], K' <= {count}"
        )
    with without_autocast(scores.device):
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        target = target.to(scores).expand(batch, shape[-1])
        logs = F.log_softmax(scores, -1)[:, : shape[-1]]
        return (torch.xlogy(target, target) - target * logs).sum() / batch


# --- reference ---------------------------------------------------------------------------------


def route_scores_fwd(
    pooled: Tensor, keys: Tensor, projection: QueryProjection | None, divisor: float
) -> Tensor:
    """Computes `query(pooled) keys^T / divisor` in float32, or float64 for float64 inputs."""
    q = query(pooled, projection)
    return F.linear(q, keys.to(q.dtype)) / divisor


def route_bwd(
    d_weights: Tensor,
    weights: Tensor,
    pooled: Tensor,
    keys: Tensor,
    projection: QueryProjection | None,
    divisor: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of `route`, for the backends that autograd cannot differentiate.

    The weights are the softmax over the kept scores, w_i = exp(s_i) / sum of the kept exp(s_j),
    and 0 for the others; which scores are kept is locally constant. So w determines
    d_scores_i = w_i (d_weights_i - sum_j w_j d_weights_j), and nothing else has to be saved.

    Args:
        d_weights, weights: [B, K]. The other arguments and the result are as in
            `route_scores_bwd`.
    """
    shared = (weights * d_weights).sum(-1, keepdim=True)
    d_scores = weights * (d_weights - shared)
    return route_scores_bwd(d_scores, pooled, keys, projection, divisor, needs)


def route_scores_bwd(
    d_scores: Tensor,
    pooled: Tensor,
    keys: Tensor,
    projection: QueryProjection | None,
    divisor: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of `route_scores_fwd`, for backends that autograd cannot differentiate.

    The query is computed again, so that only the inputs are saved for the backward. All tensors
    have at most B x D numbers. A separate kernel would only save a few launches per step, so every
    backend uses this.

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
        d_query = scaled @ keys.to(wide)
        if projection is None:
            grads[:2] = d_query, scaled.t() @ e
        else:
            down, up, norm_weight, norm_bias = (t.to(wide) for t in projection[:4])
            hidden = e @ down.t()
            z = hidden @ up.t()
            gate = torch.sigmoid(z)
            active = z * gate
            centred = active - active.mean(-1, keepdim=True)
            rstd = (centred.square().mean(-1, keepdim=True) + projection.eps).rsqrt()
            normed = centred * rstd
            d_normed = d_query * norm_weight
            shift = d_normed.mean(-1, keepdim=True)
            slope = (d_normed * normed).mean(-1, keepdim=True)
            d_z = (d_normed - shift - normed * slope) * rstd * gate * (1 + z * (1 - gate))
            d_hidden = d_z @ up
            grads = [
                d_hidden @ down,
                scaled.t() @ (normed * norm_weight + norm_bias),
                d_hidden.t() @ e,
                d_z.t() @ hidden,
                (d_query * normed).sum(0),
                d_query.sum(0),
            ]
    tensors = (pooled, keys, *(projection or (None,) * 4)[:4])
    return tuple(
        grad.to(tensor.dtype) if wanted and grad is not None and tensor is not None else None
        for grad, tensor, wanted in zip(grads, tensors, needs, strict=True)
    )


def _prepare(
    embeds: Tensor,
    keys: Tensor,
    projection: QueryProjection | None,
    mask: Tensor | None,
    pooling: str,
    temperature: float | None,
    backend: str | None,
) -> tuple[Tensor, float, str]:
    """Checks the arguments; returns the pooled embeddings, the scores' divisor and the backend."""
    require_tensors(embeds=embeds, keys=keys, mask=mask)
    require_float("embeds", embeds)
    require_float("keys", keys)
    if embeds.dim() not in (2, 3):
        raise ValueError(f"embeds: got shape {tuple(embeds.shape)}, expected [B, T, D] or [B, D]")
    if keys.dim() != 2 or keys.shape[1] != embeds.shape[-1]:
        raise ValueError(f"keys: got shape {tuple(keys.shape)}, expected [K, {embeds.shape[-1]}]")
    temperature = None if temperature is None else number("temperature", temperature)
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected a positive number or None")
    parts = _projection_parts(projection, keys.shape[1])
    for name, tensor in parts.items():
        require_float(name, tensor)
    check_devices(embeds, keys=keys, mask=mask, **parts)
    pooled = embeds if embeds.dim() == 2 else pool_embeds(embeds, mask=mask, pooling=pooling)
    divisor = math.sqrt(keys.shape[1]) if temperature is None else temperature
    eager = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    rows = pooled.shape[0] if eager else None
    chosen = dispatch.resolve(_OP, pooled.device, backend, pooled.dtype, rows)
    return pooled, divisor, "reference" if transforms.active() else chosen


def _scores(
    pooled: Tensor, keys: Tensor, projection: QueryProjection | None, divisor: float, backend: str
) -> Tensor:
    if backend == "reference":
        with without_autocast(pooled.device):
            return route_scores_fwd(pooled, keys, projection, divisor)
    return _scores_op(pooled, keys, *_flat(projection), divisor, backend)


def _checked_sparsity(
    top_k: int | None, threshold: float | None
) -> tuple[int | None, float | None]:
    top_k = None if top_k is None else integer("top_k", top_k)
    if top_k is not None and not top_k >= 1:
        raise ValueError(f"top_k: got {top_k}, expected at least 1 or None")
    threshold = None if threshold is None else number("threshold", threshold)
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold: got {threshold}, expected a number in [0, 1] or None")
    return top_k, threshold


def _projection_parts(projection: QueryProjection | None, width: int) -> dict[str, Tensor]:
    """Checks the shapes of the projection's tensors, and returns them by their names."""
    if projection is None:
        return {}
    if not isinstance(projection, QueryProjection):
        raise TypeError(
            f"projection: got {type(projection).__name__}, expected a QueryProjection or None"
        )
    require_tensors(**{f"projection.{n}": t for n, t in projection._asdict().items() if n != "eps"})
    hidden = projection.down.shape[0]
    expected = ((hidden, width), (width, hidden), (width,), (width,))
    parts = {f"projection.{n}": t for n, t in zip(projection._fields, projection[:4], strict=False)}
    for (name, tensor), shape in zip(parts.items(), expected, strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {shape}")
    return parts


# --- registered ops ----------------------------------------------------------------------------
# For the other backends; autograd and compilers can process the reference, which is plain torch.


@torch.library.custom_op("sapt_fast::route_scores_fwd", mutates_args=())
def _scores_op(
    pooled: Tensor,
    keys: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    divisor: float,
    backend: str,
) -> Tensor:
    transforms.require_no_tangents(_OP)
    projection = _projection(down, up, norm_weight, norm_bias, eps)
    return dispatch.kernels(_OP, backend).route_scores_fwd(pooled, keys, projection, divisor)


@torch.library.custom_op("sapt_fast::route_fwd", mutates_args=())
def _route_op(
    pooled: Tensor,
    keys: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    divisor: float,
    top_k: int | None,
    threshold: float | None,
    backend: str,
) -> Tensor:
    transforms.require_no_tangents(_OP)
    projection = _projection(down, up, norm_weight, norm_bias, eps)
    kernel = dispatch.kernels(_OP, backend)
    return kernel.route_fwd(pooled, keys, projection, divisor, top_k, threshold)


@_route_op.register_fake
@_scores_op.register_fake
def _scores_fake(pooled: Tensor, keys: Tensor, *others: Any) -> Tensor:
    wide = torch.promote_types(pooled.dtype, torch.float32)
    return pooled.new_empty(pooled.shape[0], keys.shape[0], dtype=wide)


def _flat(projection: QueryProjection | None) -> tuple[Any, ...]:
    """Converts the projection for the registered ops; `_projection` is the inverse."""
    return (None,) * 4 + (0.0,) if projection is None else tuple(projection)


def _projection(
    down: Tensor | None,
    up: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> QueryProjection | None:
    if down is None or up is None or norm_weight is None or norm_bias is None:
        return None
    return QueryProjection(down, up, norm_weight, norm_bias, eps)


def _scores_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.eps, ctx.divisor = inputs[:6], inputs[6], inputs[7]
    ctx.set_materialize_grads(False)
    ctx.needs = tuple(t is not None and t.requires_grad for t in tensors)
    ctx.save_for_backward(*tensors)


def _scores_backward(ctx: Any, d_scores: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_scores is None:
        return (None,) * 9
    pooled, keys, down, up, norm_weight, norm_bias = ctx.saved_tensors
    projection = _projection(down, up, norm_weight, norm_bias, ctx.eps)
    grads = route_scores_bwd(d_scores, pooled, keys, projection, ctx.divisor, ctx.needs)
    return *grads, None, None, None


def _route_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _scores_setup(ctx, inputs, output)
    ctx.save_for_backward(output, *inputs[:6])


def _route_backward(ctx: Any, d_weights: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_weights is None:
        return (None,) * 11
    weights, pooled, keys, down, up, norm_weight, norm_bias = ctx.saved_tensors
    projection = _projection(down, up, norm_weight, norm_bias, ctx.eps)
    grads = route_bwd(d_weights, weights, pooled, keys, projection, ctx.divisor, ctx.needs)
    return *grads, *(None,) * 5


_scores_op.register_autograd(_scores_backward, setup_context=_scores_setup)
_route_op.register_autograd(_route_backward, setup_context=_route_setup)
