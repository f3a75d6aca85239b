"""The nearest key of every query, if the query is within the key's radius.

(GRACE, NeurIPS 2023: an edit applies to a hidden state only inside the ball around its key.) Only
the nearest key is tested: a farther key does not count, even if the query is within its radius.
"""

from typing import Any

import torch
from torch import Tensor

from sapt_fast import dispatch
from sapt_fast.ops import formulas, transforms
from sapt_fast.ops._common import require_tensors
from sapt_fast.ops._keys import (
    KEY_CHUNK,
    ROW_CHUNK,
    accumulation_dtype,
    checked_query,
    pairwise_distance,
)

_OP = "nearest_key"
DISPATCH = dispatch.Op(few_rows=(16, 4))


def nearest_key(
    query: Tensor, keys: Tensor, radius: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Finds the nearest key by Euclidean distance, accepted if `distance <= radius` of that key.

    Of keys at equal distances, the one with the lower index is the nearest. A key at a NaN or
    infinite distance never is. The distance is differentiable in `query` and `keys`, with gradient
    0 at distance 0; the index and `radius` are not.

    Args:
        query: [M, D]; float32, float16 or bfloat16, on a CPU also float64.
        keys: [N, D] in query's dtype; N may be 0.
        radius: [N], any floating-point dtype; NaN and negative radii accept nothing.
        backend: as in `dispatch.resolve`.

    Returns:
        index: [M] int64, -1 if the nearest key is farther than its radius.
        distance: [M], to the nearest key, accepted or not; infinity if there is none. float32, or
            float64 for float64.

    Raises:
        ValueError, TypeError: if a shape, dtype or device does not fit.
        dispatch.BackendError: if the named backend cannot run here.

    Example:
        >>> import torch
        >>> from sapt_fast.ops import nearest_key
        >>> keys, radius = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([1.0, 1.0])
        >>> nearest_key(torch.tensor([[0.0, 0.5], [3.0, 2.0]]), keys, radius)
        (tensor([ 0, -1]), tensor([0.5000, 2.0000]))
    """
    query = checked_query(query, keys)
    require_tensors(radius=radius)
    if radius.shape != keys.shape[:1]:
        raise ValueError(f"radius: got shape {tuple(radius.shape)}, expected [{keys.shape[0]}]")
    if not radius.is_floating_point():
        raise TypeError(f"radius: got dtype {radius.dtype}, expected a floating-point dtype")
    if radius.device != query.device:
        raise ValueError(
            f"radius: got device {radius.device}, expected {query.device} (that of query)"
        )
    radius = radius.detach().to(accumulation_dtype(query.dtype))
    if transforms.active():
        dispatch.resolve(_OP, query.device, backend, query.dtype)
        distance, index = formulas.nearest_key(query, keys, radius)
    elif torch.is_grad_enabled() or torch.compiler.is_compiling():
        distance, index, _ = _forward_op(query, keys, radius, backend or "")
    else:
        rows = query.shape[0]
        chosen = dispatch.resolve(_OP, query.device, backend, query.dtype, rows)
        distance, index, _ = dispatch.kernels(_OP, chosen).nearest_key_fwd(query, keys, radius)
    return index, distance


# --- reference ---------------------------------------------------------------------------------


def nearest_key_fwd(query: Tensor, keys: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Specifies the op: returns `(distance [M], index [M], nearest [M])`.

    `nearest` is the nearest key, accepted or not; -1 if there is none.
    """
    dtype = accumulation_dtype(query.dtype)
    distance = query.new_full(query.shape[:1], float("inf"), dtype=dtype)
    nearest = query.new_full(query.shape[:1], -1, dtype=torch.int64)
    for row in range(0, query.shape[0], ROW_CHUNK):
        rows = slice(row, row + ROW_CHUNK)
        for start in range(0, keys.shape[0], KEY_CHUNK):
            part = keys[start : start + KEY_CHUNK].to(dtype)
            pairs = pairwise_distance(query[rows].to(dtype), part)
            least, at = torch.where(pairs.isnan(), float("inf"), pairs).min(1)
            closer = least < distance[rows]
            nearest[rows] = torch.where(closer, at + start, nearest[rows])
            distance[rows] = torch.where(closer, least, distance[rows])
    if keys.shape[0] == 0:
        return distance, nearest.clone(), nearest
    accepted = (nearest >= 0) & (distance <= radius[nearest.clamp(min=0)])
    return distance, torch.where(accepted, nearest, -1), nearest


def nearest_key_bwd(
    d_distance: Tensor, query: Tensor, keys: Tensor, distance: Tensor, nearest: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns `(d_query, d_keys)`, along the unit vector from the nearest key; for all backends."""
    if keys.shape[0] == 0:
        return torch.zeros_like(query), torch.zeros_like(keys)
    at = nearest.clamp(min=0)
    moves = (nearest >= 0) & (distance > 0)
    step = torch.where(moves, d_distance / distance, 0.0).unsqueeze(1)
    pull = torch.where(moves.unsqueeze(1), query.to(step.dtype) - keys[at].to(step.dtype), 0.0)
    pull = pull * step
    d_keys = torch.zeros(keys.shape, dtype=step.dtype, device=keys.device)
    # index_put sorts the indices on a GPU: the same sum every time, unlike index_add.
    d_keys = d_keys.index_put((at,), -pull, accumulate=True)
    return pull.to(query.dtype), d_keys.to(keys.dtype)


# --- registered op -----------------------------------------------------------------------------


@torch.library.custom_op("sapt_fast::nearest_key_fwd", mutates_args=())
def _forward_op(
    query: Tensor, keys: Tensor, radius: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    transforms.require_no_tangents(_OP)
    kernel = dispatch.kernels(_OP, dispatch.resolve(_OP, query.device, backend, query.dtype))
    return kernel.nearest_key_fwd(query, keys, radius)


@_forward_op.register_fake
def _forward_fake(
    query: Tensor, keys: Tensor, radius: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows = query.shape[:1]
    index = query.new_empty(rows, dtype=torch.int64)
    return query.new_empty(rows, dtype=radius.dtype), index, torch.empty_like(index)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, keys, _, _ = inputs
    distance, index, nearest = output
    ctx.mark_non_differentiable(index, nearest)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, keys, distance, nearest)


def _backward(ctx: Any, d_distance: Tensor | None, *_: None) -> tuple[Any, ...]:
    if d_distance is None:
        return (None,) * 4
    needs_query, needs_keys = ctx.needs_input_grad[:2]
    if transforms.differentiates_backward(d_distance):
        query, keys, distance, nearest = ctx.saved_tensors
        d_query, d_keys = transforms.gradients(
            lambda q, k: [formulas.distance_to(q, k, nearest, distance.detach())],
            [query, keys],
            [needs_query, needs_keys],
            [d_distance],
        )
        return d_query, d_keys, None, None
    d_query, d_keys = nearest_key_bwd(d_distance, *ctx.saved_tensors)
    return d_query if needs_query else None, d_keys if needs_keys else None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
