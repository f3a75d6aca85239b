"""Routing: computes one weight per adapter for each input of a batch.

SAPT (ACL 2024): the input embeddings are pooled over the sequence and projected to a query. The
weights are the softmax of its products with one learned key per adapter. The reflection loss
penalises changes in the weights of earlier tasks' inputs. Other methods differ in the gate
(`ops.gates`), in the projection and similarity (`ops.queries`), or have a query per token.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapt_fast import dispatch
from sapt_fast.ops import transforms
from sapt_fast.ops._common import require_tensors, without_autocast
from sapt_fast.ops._scalars import number, require_float
from sapt_fast.ops.gates import Gate, checked_gate, gate_bwd, gate_fwd, sparsify
from sapt_fast.ops.pool_tokens import (
    POOLINGS,
    check_devices,
    pool_embeds,
    pool_tokens,
    pool_tokens_fwd,
)
from sapt_fast.ops.queries import (
    SIMILARITIES,
    AnyProjection,
    QueryProjection,
    TaskProjections,
    flat,
    projection_parts,
    query,
    route_scores_bwd,
    route_scores_fwd,
    unflat,
)

__all__ = [
    "POOLINGS",
    "QueryProjection",
    "TaskProjections",
    "pool_embeds",
    "pool_tokens",
    "pool_tokens_fwd",
    "query",
    "reflection_loss",
    "route",
    "route_bwd",
    "route_fwd",
    "route_scores",
    "route_scores_bwd",
    "route_scores_fwd",
    "sparsify",
]

_OP = "route"
DISPATCH = dispatch.Op(few_rows=(4, 4))
_SOFTMAX = Gate()
_FUSED_KEYS = 1024  # so many keys at most from embedding to weights in one launch
# Of more tokens than this, kernels compute weights without projection and of so many keys at most.
_FEW_TOKENS, _TOKEN_KEYS = 64, 128


def route(
    embeds: Tensor,
    keys: Tensor,
    projection: AnyProjection,
    *,
    mask: Tensor | None = None,
    pooling: str = "max",
    temperature: float | None = None,
    gate: str = "softmax",
    similarity: str = "dot",
    top_k: int | None = None,
    threshold: float | None = None,
    renormalize: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Computes one weight per adapter for each sample or token, from embeddings and adapters' keys.

    Args:
        embeds: [B, T, D], or [B, D] if already pooled (by `pool_tokens`) or of single tokens.
        keys: [K, D]; with `TaskProjections` of any width.
        projection: maps an embedding to its query; None for the identity. With `TaskProjections`
            every adapter has its own.
        mask: [B, T], zero for tokens that are not pooled, or whose weights are zero if the pooling
            is "none"; None for no such tokens.
        pooling: "max" (as in the original SAPT code) or "mean"; "none" for weights of every token.
        temperature: the similarities' divisor; None for the square root of the keys' width, and for
            1 if the similarity is "cosine".
        gate: maps the scores s of a row to weights:

            - "softmax": they sum to 1 (SAPT, MixLoRA).
            - "sigmoid": each in (0, 1), independent of the others.
            - "abs_sigmoid": |2 sigmoid(s) - 1| (GainLoRA).
            - "relu": max(s, 0).
        similarity: of query and key: "dot", their product; or "cosine", their product divided by
            both norms, as `torch.nn.functional.cosine_similarity` does.
        top_k: keep only the k largest weights of each row; of equal weights, those of the lower
            index. None keeps all.
        threshold: set weights below it to exactly zero; the largest weight of a row always stays.
            In [0, 1], for "relu" at least 0. None keeps all.
        renormalize: whether to scale the kept weights of each row to sum to 1; a row of zeros stays
            zero. Defaults to True for "softmax" and to False for the other gates.
        backend: as in `dispatch.resolve`; float64 runs only in the reference. For what kernels are
            not made for, plain torch runs on their device: the gate of more than 1024 adapters, and
            more than 64 tokens with a projection or more than 128 adapters.

    Returns:
        weights [B, K], of every token [B, T, K], in float32 (float64 for float64 inputs). All steps
        are computed in this dtype.

    Raises:
        ValueError, TypeError: if a shape, dtype, device or option does not fit.
        dispatch.BackendError: if the named backend cannot run here, or does not support float64.

    Example:
        >>> import torch
        >>> from sapt_fast.ops import route
        >>> embeds, keys = torch.tensor([[[2.0, 0.0], [0.0, -1.0]]]), torch.eye(2)
        >>> route(embeds, keys, None, pooling="max", temperature=1.0)
        tensor([[0.8808, 0.1192]])
        >>> route(embeds, keys, None, pooling="max", temperature=1.0, top_k=1)
        tensor([[1., 0.]])
        >>> route(embeds, keys, None, pooling="none", temperature=1.0, gate="relu")
        tensor([[[2., 0.],
                 [0., 0.]]])
    """
    chosen_gate = checked_gate(gate, top_k, threshold, renormalize)
    rows, divisor, chosen = _prepare(
        embeds, keys, projection, mask, pooling, temperature, similarity, backend
    )
    if chosen == "reference":
        with without_autocast(rows.device):
            weights = route_fwd(
                rows, keys, projection, divisor, chosen_gate.top_k, chosen_gate.threshold,
                gate, similarity, chosen_gate.renormalize,
            )  # fmt: skip
    elif keys.shape[0] > _FUSED_KEYS:
        scores = _scores(rows, keys, projection, divisor, similarity, chosen)
        weights = gate_fwd(scores, chosen_gate)
    else:
        weights = _route_op(
            rows, keys, *flat(projection), divisor, chosen_gate.top_k, chosen_gate.threshold,
            chosen, gate, similarity, chosen_gate.renormalize,
        )  # fmt: skip
    return _of_tokens(weights, embeds, mask) if pooling == "none" else weights


def route_scores(
    embeds: Tensor,
    keys: Tensor,
    projection: AnyProjection,
    *,
    mask: Tensor | None = None,
    pooling: str = "max",
    temperature: float | None = None,
    similarity: str = "dot",
    backend: str | None = None,
) -> Tensor:
    """Returns the scores whose gate is `route`'s, in the same shape; arguments as in `route`."""
    rows, divisor, chosen = _prepare(
        embeds, keys, projection, mask, pooling, temperature, similarity, backend
    )
    scores = _scores(rows, keys, projection, divisor, similarity, chosen)
    return _of_tokens(scores, embeds, mask) if pooling == "none" else scores


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
    """Computes the weights [N, K] of rows [N, D]; the other arguments are as in `route`."""
    scores = route_scores_fwd(rows, keys, projection, divisor, similarity)
    return gate_fwd(scores, Gate(gate, top_k, threshold, renormalize))


def route_bwd(
    d_weights: Tensor,
    weights: Tensor,
    rows: Tensor,
    keys: Tensor,
    projection: AnyProjection,
    divisor: float,
    needs: tuple[bool, ...],
    gate: Gate = _SOFTMAX,
    similarity: str = "dot",
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of `route`, for the backends that autograd cannot differentiate.

    Where the weights do not determine the gradient of the scores, these are computed again.

    Args:
        d_weights, weights: [N, K].
        rows: [N, D]. The other arguments and the result are as in `route_scores_bwd`.
    """
    with without_autocast(rows.device):
        scores = None
        if not gate.is_of_its_weights():
            scores = route_scores_fwd(rows, keys, projection, divisor, similarity)
        d_scores = gate_bwd(d_weights, weights, scores, gate)
    return route_scores_bwd(d_scores, rows, keys, projection, divisor, needs, similarity)


def _prepare(
    embeds: Tensor,
    keys: Tensor,
    projection: AnyProjection,
    mask: Tensor | None,
    pooling: str,
    temperature: float | None,
    similarity: str,
    backend: str | None,
) -> tuple[Tensor, float, str]:
    """Checks the arguments; returns the rows to route, the scores' divisor and the backend."""
    require_tensors(embeds=embeds, keys=keys, mask=mask)
    require_float("embeds", embeds)
    require_float("keys", keys)
    if embeds.dim() not in (2, 3):
        raise ValueError(f"embeds: got shape {tuple(embeds.shape)}, expected [B, T, D] or [B, D]")
    width = embeds.shape[-1]
    shared = not isinstance(projection, TaskProjections)
    if keys.dim() != 2 or (shared and keys.shape[1] != width):
        expected = f"[K, {width}]" if shared else "[K, D']"
        raise ValueError(f"keys: got shape {tuple(keys.shape)}, expected {expected}")
    if pooling not in (*POOLINGS, "none"):
        raise ValueError(f"pooling: got {pooling!r}, expected one of {(*POOLINGS, 'none')}")
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity: got {similarity!r}, expected one of {SIMILARITIES}")
    temperature = None if temperature is None else number("temperature", temperature)
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected a positive number or None")
    parts = projection_parts(projection, keys, width)
    for name, tensor in parts.items():
        require_float(name, tensor)
    check_devices(embeds, keys=keys, mask=mask, **parts)
    rows = _rows(embeds, mask, pooling)
    divisor = temperature
    if divisor is None:
        divisor = math.sqrt(keys.shape[1]) if similarity == "dot" else 1.0
    eager = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    few = rows.shape[0] if eager else None
    chosen = dispatch.resolve(_OP, rows.device, backend, rows.dtype, few)
    by_torch = transforms.active() or (pooling == "none" and _are_large(rows, keys, projection))
    return rows, divisor, "reference" if by_torch else chosen


def _are_large(rows: Tensor, keys: Tensor, projection: AnyProjection) -> bool:
    """Returns whether torch's products suit these tokens, keys and projection best."""
    fits = projection is None and keys.shape[0] <= _TOKEN_KEYS
    return not fits and rows.shape[0] > _FEW_TOKENS


def _rows(embeds: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """Returns what is routed, [N, D]: the pooled embeddings, or all of them without the masked."""
    if pooling != "none":
        return embeds if embeds.dim() == 2 else pool_embeds(embeds, mask=mask, pooling=pooling)
    if mask is not None:
        if mask.shape != embeds.shape[:-1]:
            expected = tuple(embeds.shape[:-1])
            raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected {expected}")
        embeds = embeds.masked_fill((mask == 0).unsqueeze(-1), 0.0)
    return embeds.flatten(0, -2)


def _of_tokens(weights: Tensor, embeds: Tensor, mask: Tensor | None) -> Tensor:
    """Returns weights or scores [N, K] in the shape of the embeddings, zeros for masked tokens."""
    weights = weights.view(*embeds.shape[:-1], weights.shape[-1])
    return weights if mask is None else weights.masked_fill((mask == 0).unsqueeze(-1), 0.0)


def _scores(
    rows: Tensor,
    keys: Tensor,
    projection: AnyProjection,
    divisor: float,
    similarity: str,
    backend: str,
) -> Tensor:
    if backend == "reference":
        with without_autocast(rows.device):
            return route_scores_fwd(rows, keys, projection, divisor, similarity)
    return _scores_op(rows, keys, *flat(projection), divisor, backend, similarity)


# --- registered ops ----------------------------------------------------------------------------
# For the other backends; autograd and compilers can process the reference, which is plain torch.


@torch.library.custom_op("sapt_fast::route_scores_fwd", mutates_args=())
def _scores_op(
    rows: Tensor,
    keys: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    divisor: float,
    backend: str,
    similarity: str,
) -> Tensor:
    transforms.require_no_tangents(_OP)
    projection = unflat(down, up, norm_weight, norm_bias, eps)
    kernel = dispatch.kernels(_OP, backend)
    return kernel.route_scores_fwd(rows, keys, projection, divisor, similarity)


@torch.library.custom_op("sapt_fast::route_fwd", mutates_args=())
def _route_op(
    rows: Tensor,
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
    gate: str,
    similarity: str,
    renormalize: bool,
) -> Tensor:
    transforms.require_no_tangents(_OP)
    projection = unflat(down, up, norm_weight, norm_bias, eps)
    kernel = dispatch.kernels(_OP, backend)
    return kernel.route_fwd(
        rows, keys, projection, divisor, top_k, threshold, gate, similarity, renormalize
    )


@_route_op.register_fake
@_scores_op.register_fake
def _scores_fake(rows: Tensor, keys: Tensor, *others: Any) -> Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.new_empty(rows.shape[0], keys.shape[0], dtype=wide)


def _scores_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.eps, ctx.divisor = inputs[:6], inputs[6], inputs[7]
    ctx.similarity = inputs[9]
    ctx.set_materialize_grads(False)
    ctx.needs = tuple(t is not None and t.requires_grad for t in tensors)
    ctx.save_for_backward(*tensors)


def _scores_backward(ctx: Any, d_scores: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_scores is None:
        return (None,) * 10
    rows, keys, down, up, norm_weight, norm_bias = ctx.saved_tensors
    projection = unflat(down, up, norm_weight, norm_bias, ctx.eps)
    grads = route_scores_bwd(
        d_scores, rows, keys, projection, ctx.divisor, ctx.needs, ctx.similarity
    )
    return *grads, *(None,) * 4


def _route_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, (ctx.eps, ctx.divisor, top_k, threshold) = inputs[:6], inputs[6:10]
    _, kind, ctx.similarity, renormalize = inputs[10:]
    ctx.gate = Gate(kind, top_k, threshold, renormalize)
    ctx.set_materialize_grads(False)
    ctx.needs = tuple(t is not None and t.requires_grad for t in tensors)
    ctx.save_for_backward(output, *tensors)


def _route_backward(ctx: Any, d_weights: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_weights is None:
        return (None,) * 14
    weights, rows, keys, down, up, norm_weight, norm_bias = ctx.saved_tensors
    projection = unflat(down, up, norm_weight, norm_bias, ctx.eps)
    grads = route_bwd(
        d_weights, weights, rows, keys, projection, ctx.divisor, ctx.needs, ctx.gate, ctx.similarity
    )
    return *grads, *(None,) * 8


_scores_op.register_autograd(_scores_backward, setup_context=_scores_setup)
_route_op.register_autograd(_route_backward, setup_context=_route_setup)
