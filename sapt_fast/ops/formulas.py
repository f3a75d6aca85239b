"""The ops in plain torch, out of place and independent of values, so that torch can transform them.

Each function has the arguments of the op's kernels, after all checks, and returns the same numbers.
They run under `torch.func`, in forward-mode AD, and if a backward is differentiated. In all other
cases the kernels or references run. A weight or scaling of exactly zero excludes its adapter,
prompt or expert, even with infinities or NaNs; any other zero is an ordinary number.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sapt_fast.ops._common import without_autocast
from sapt_fast.ops._dropout import Dropout, kept
from sapt_fast.ops._keys import accumulation_dtype
from sapt_fast.ops.projection import PooledProjection, Projection
from sapt_fast.ops.transforms import values

# Elements of differences (or products) of queries and keys at a time.
_PAIR_CHUNK = 1 << 22


# --- mixed_lora --------------------------------------------------------------------------------


def mixed_lora(
    x: Tensor,
    mixture: Tensor,
    computed: Sequence[Projection],
    pooled: Sequence[PooledProjection],
    grad_through_frozen: bool,
    dropout: Dropout | None = None,
) -> list[Tensor]:
    """Computes y [M, O] of each projection; arguments as in `_mixed_lora_ops.differentiable`."""
    ys = []
    with without_autocast(x.device):
        for i, (projection, given) in enumerate(zip(computed, pooled, strict=True)):
            adapted = x
            if dropout is not None:
                adapted = kept(x, dropout.seeds[i], dropout.drops)
                row_scale = projection.row_scale * dropout.scale
                projection = projection._replace(row_scale=row_scale)
            ys.append(
                _mixed_projection(x, adapted, mixture, projection, given, grad_through_frozen)
            )
    return ys


def _mixed_projection(
    x: Tensor,
    adapted: Tensor,
    mixture: Tensor,
    projection: Projection,
    given: PooledProjection,
    grad_through_frozen: bool,
) -> Tensor:
    weight, bias, _, _, row_adapter, row_scale = projection
    lora_a = _stack(projection.lora_a, given.train_a, given.train_rows).to(x.dtype)
    lora_b = _stack(projection.lora_b, given.train_b, given.train_rows).to(x.dtype)
    samples = max(1, mixture.shape[0])
    if not mixture.shape[0]:  # no rows either
        mixture = mixture.new_zeros(1, mixture.shape[1])
    frozen = None if grad_through_frozen else _frozen_rows(lora_a, given.train_rows)
    by_sample = adapted.reshape(samples, x.shape[0] // samples, x.shape[1])
    own = mixture.index_select(1, row_adapter)
    # A weight of 0 stays one at any scale, and still has a derivative.
    row_scale = torch.where((own == 0) & ~torch.isfinite(row_scale), 0.0, row_scale)
    weights = own * row_scale
    h = _shrink(by_sample, lora_a, frozen)
    present = _present_rows(h, mixture, weights, row_adapter, lora_b)
    if not _all_true(present):
        # Absent rows are cut out of both factors, for each sample: 0 * NaN would be NaN.
        cut = present.unsqueeze(-1)
        weights = torch.where(present, weights, 0.0)
        lora_b = torch.where(cut, lora_b, 0.0)
        h = _shrink(by_sample, torch.where(cut, lora_a, 0.0), frozen)
    y = ((h * weights.unsqueeze(1)).to(x.dtype) @ lora_b).flatten(0, 1)
    if weight is not None:
        y = y + x @ weight.t()
    return y if bias is None else y + bias


def _stack(rows: Tensor, trained: Sequence[Tensor], spans: Sequence[int]) -> Tensor:
    """Returns all rows; those that train are the tensors that receive the gradient."""
    parts, last = [], 0
    for part, start, stop in zip(trained, spans[::2], spans[1::2], strict=True):
        parts += [rows[last:start].detach(), part.to(rows.dtype)]
        last = stop
    parts = [part for part in (*parts, rows[last:].detach()) if part.shape[0]]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else rows


def _frozen_rows(lora_a: Tensor, spans: Sequence[int]) -> Tensor:
    """Returns [R, 1], true for rows that do not train."""
    frozen = torch.ones(lora_a.shape[0], 1, dtype=torch.bool)
    for start, stop in zip(spans[::2], spans[1::2], strict=True):
        frozen[start:stop] = False
    return frozen.to(lora_a.device)


def _shrink(x: Tensor, lora_a: Tensor, frozen: Tensor | None) -> Tensor:
    """Computes x [S, T, I] A^T, A [R, I] or [S, R, I]; frozen rows pass no gradient to x."""
    if frozen is None:
        return x @ lora_a.transpose(-1, -2)
    trained = x @ torch.where(frozen, 0.0, lora_a).transpose(-1, -2)
    return trained + x.detach() @ torch.where(frozen, lora_a, 0.0).transpose(-1, -2)


def _present_rows(
    h: Tensor, mixture: Tensor, weights: Tensor, row_adapter: Tensor, lora_b: Tensor
) -> Tensor:
    """Returns whether a rank row is used, [S, R]: its adapter has a weight, or it is finite."""
    h, mixture, weights = h.detach(), mixture.detach(), weights.detach()
    broken = ~(torch.isfinite(h).all(1) & torch.isfinite(lora_b.detach()).all(1))
    count = torch.zeros_like(mixture).index_add(1, row_adapter, broken.to(mixture.dtype))
    return (weights != 0) | (count == 0).index_select(1, row_adapter)


def _all_true(mask: Tensor) -> bool:
    """Returns whether all values are known to be true."""
    known = values(mask)
    return known is not None and bool(known.all())


# --- mix_prompts -------------------------------------------------------------------------------


def mix_prompts(
    prompts: Tensor, mixture: Tensor, source: Tensor, input_ids: Tensor | None
) -> Tensor:
    """Computes [B, P + T, D]; arguments as in `mix_prompts_fwd`."""
    embeds = source if input_ids is None else F.embedding(input_ids, source)
    return torch.cat([mixed_prompts(prompts, mixture).to(source.dtype), embeds], 1)


def mixed_prompts(prompts: Tensor, mixture: Tensor) -> Tensor:
    """Computes the mixtures of prompts [B, P, D] in mixture's dtype."""
    flat = prompts.to(mixture.dtype).flatten(1)
    present = (mixture != 0).detach() | torch.isfinite(flat.detach()).all(1)
    with without_autocast(prompts.device):
        if _all_true(present):
            mixed = mixture @ flat
        else:
            kept = torch.where(present.unsqueeze(-1), flat, 0.0)
            mixed = (torch.where(present, mixture, 0.0).unsqueeze(1) @ kept).squeeze(1)
    return mixed.reshape(mixture.shape[0], *prompts.shape[1:])


# --- pool_tokens -------------------------------------------------------------------------------


def pool_tokens(input_ids: Tensor, table: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """Computes [B, D]; the first of equal maxima gets the gradient, as in the kernels."""
    if input_ids.numel() == 0:
        return table.new_zeros(input_ids.shape[0], table.shape[1])
    keep = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask != 0
    embeds = F.embedding(
        torch.where(keep, input_ids, 0), table
    )  # the ids of others may be anything
    some = keep.any(1, keepdim=True)
    if pooling == "mean":
        wide = accumulation_dtype(table.dtype)
        share = keep.to(wide) / keep.sum(1, keepdim=True).clamp(min=1).to(wide)
        total = torch.where(keep.unsqueeze(-1), embeds.to(wide), 0.0) * share.unsqueeze(-1)
        return total.sum(1).to(table.dtype)
    pooled = embeds.masked_fill(~keep.unsqueeze(-1), float("-inf")).max(1).values
    return torch.where(some, pooled, 0.0)


# --- searches ----------------------------------------------------------------------------------


def nearest_key(query: Tensor, keys: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Computes (distance [M], index [M]); arguments as in `nearest_key_fwd`."""
    wide = radius.dtype
    q = query.to(wide)
    if keys.shape[0] == 0:
        none = q.new_full(q.shape[:1], float("inf"))
        return none, torch.full_like(none, -1, dtype=torch.int64)
    least, at = _nearest(q.detach().contiguous(), keys.detach().to(wide).contiguous())
    nearest = torch.where(least < float("inf"), at, -1)
    accepted = (nearest >= 0) & (least <= radius[at])
    return distance_to(query, keys, nearest, least), torch.where(accepted, at, -1)


def distance_to(query: Tensor, keys: Tensor, nearest: Tensor, distance: Tensor) -> Tensor:
    """Returns `distance` [M] as a function of queries and keys; constant if zero or infinite.

    Args:
        query, keys: [M, D] and [N, D].
        distance: [M].
        nearest: [M], the key of each query's distance; -1 for none.
    """
    apart = (nearest >= 0) & (distance > 0)
    q, at = query.to(distance.dtype), nearest.clamp(min=0)
    difference = torch.where(apart.unsqueeze(1), q - keys[at].to(distance.dtype), 0.0)
    # The root of zero has no derivative: where nothing is apart it is the root of a constant.
    root = torch.where(apart, difference.square().sum(1), 1.0).sqrt()
    return torch.where(apart, root, distance)


def _nearest(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the smallest distance, and the lowest index among equals, over chunks of keys."""
    least = torch.full_like(query[:, 0], float("inf"))
    at = torch.zeros_like(least, dtype=torch.int64)
    step = _keys_at_a_time(query)
    for start in range(0, keys.shape[0], step):
        part = keys[start : start + step]
        squares = (query.unsqueeze(1) - part).square().sum(-1)
        pairs = torch.where(squares.isnan(), float("inf"), squares).sqrt()
        best, where = pairs.min(1)
        closer = best < least
        at = torch.where(closer, where + start, at)
        least = torch.where(closer, best, least)
    return least, at


def topk_keys(query: Tensor, keys: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """Computes (scores [M, k], index [M, k]); arguments as in `topk_keys_fwd`."""
    wide = accumulation_dtype(query.dtype)
    # Contiguous, so that equal keys have equal scores: see `topk_keys._all_scores`.
    q = query.detach().to(wide).contiguous().unsqueeze(1)
    table = keys.detach().to(wide).contiguous()
    parts = table.split(_keys_at_a_time(query))
    found = torch.cat([pair_scores(q, part, metric) for part in parts], 1)
    # Ascending and stable: NaN goes last, equal scores keep the order of their indices.
    index = found.neg().sort(dim=1, stable=True).indices[:, :k]
    return scores_of(query, keys, index, metric), index


def scores_of(query: Tensor, keys: Tensor, index: Tensor, metric: str) -> Tensor:
    """Computes the scores [M, k] of the keys `index` [M, k]."""
    wide = accumulation_dtype(query.dtype)
    return pair_scores(query.to(wide).unsqueeze(1), keys[index].to(wide), metric)


def pair_scores(query: Tensor, keys: Tensor, metric: str) -> Tensor:
    if metric == "l2":
        return -(query - keys).square().sum(-1)
    dot = (query * keys).sum(-1)
    return dot * _inverse_norm(query) * _inverse_norm(keys) if metric == "cosine" else dot


def _inverse_norm(vectors: Tensor) -> Tensor:
    square = vectors.square().sum(-1)
    return torch.where(square == 0, 0.0, torch.where(square == 0, 1.0, square).rsqrt())


def _keys_at_a_time(query: Tensor) -> int:
    return max(1, _PAIR_CHUNK // max(1, query.numel()))


# --- mix_experts -------------------------------------------------------------------------------


def mix_experts(
    x: Tensor, bank_a: Tensor, bank_b: Tensor, index: Tensor, weights: Tensor, scaling: float
) -> Tensor:
    """Computes delta [M, O]; arguments as in `mix_experts_fwd`."""
    if bank_a.shape[0] == 0 or index.shape[1] == 0:
        return x.new_zeros(x.shape[0], bank_b.shape[2])
    named = (index >= 0) & (index < bank_a.shape[0])
    safe = torch.where(named, index, 0)
    a, b = (bank[safe].to(weights.dtype) for bank in (bank_a, bank_b))
    wide = x.to(weights.dtype)
    with without_autocast(x.device):
        h = torch.einsum("mi,mkri->mkr", wide.detach(), a.detach())
        finite = torch.isfinite(h).all(-1) & torch.isfinite(b.detach()).flatten(2).all(-1)
        present = named & ((weights.detach() != 0) | finite)
        cut = present[..., None, None]
        a, b = torch.where(cut, a, 0.0), torch.where(cut, b, 0.0)
        chosen = torch.where(present, weights * scaling, 0.0)
        h = torch.einsum("mi,mkri->mkr", wide, a)
        delta = torch.einsum("mkr,mkro->mo", h * chosen.unsqueeze(-1), b)
    return delta.to(x.dtype)


# --- own_lora ----------------------------------------------------------------------------------


def own_lora(
    x: Tensor, base: Tensor, adapters: Sequence[tuple[Tensor, Tensor, float]], owner: Sequence[int]
) -> Tensor:
    """Returns base [M, O] plus each sample's own adapter of x [M, I]; B divides M."""
    count = x.shape[0] // max(1, len(owner))
    parts = []
    for sample, k in enumerate(owner):
        rows = slice(sample * count, (sample + 1) * count)
        part = base[rows]
        if k >= 0:
            a, b, scaling = adapters[k]
            wide = torch.promote_types(x.dtype, a.dtype)
            delta = x[rows].to(wide) @ a.to(wide).t() @ b.to(wide).t() * scaling
            part = (part.to(wide) + delta).to(base.dtype)
        parts.append(part)
    return torch.cat(parts) if parts else base
