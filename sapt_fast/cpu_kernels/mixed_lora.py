"""Mixed LoRA on the CPU: stacked GEMMs by torch, the steps between them by `sapt_fast._C`.

The contract of both functions is that of the reference in `sapt_fast.ops.mixed_lora`. For small M
(decoding), one call computes everything, including the base product.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sapt_fast import _C
from sapt_fast.cpu_kernels.common import CODES
from sapt_fast.cpu_kernels.dropout import Mask
from sapt_fast.cpu_kernels.gemm import is_few, linear, multiply_tn, two_products
from sapt_fast.ops._dropout import Dropout
from sapt_fast.ops._presence import present_product, present_ranks
from sapt_fast.ops.projection import Projection

_Table = tuple[Tensor, Tensor, Tensor]

# Up to so many rows reading the adapters bounds the time: one call does all but the base product,
# or the whole layer where `gemm.is_few`.
_DECODE_ROWS = {torch.float32: 64, torch.bfloat16: 32, torch.float16: 32, torch.float64: 64}
# Up to so many trained ranks their gradient is one pass of our own; with more it is a GEMM.
_FACTOR_RANKS = {torch.float32: 16, torch.bfloat16: 8, torch.float16: 16, torch.float64: 0}


def mixed_lora_fwd(
    x: Tensor,
    mixture: Tensor,
    projections: Sequence[Projection],
    keep_h: bool = True,
    dropout: Dropout | None = None,
) -> list[tuple[Tensor, Tensor | None]]:
    """Computes `x W^T + bias` plus the mixture, for each projection.

    Returns:
        (y [M, O] in x's dtype, h = x A^T, [M, R], in x's dtype) of each projection; h may be None
        without `keep_h`. With dropout, h is as in the reference.
    """
    if any(_adds_bias(given) for given in projections):
        bare = [given._replace(bias=None) for given in projections]
        results = mixed_lora_fwd(x, mixture, bare, keep_h, dropout)
        for (y, _), given in zip(results, projections, strict=True):
            if given.bias is not None:
                y += given.bias
        return results
    if dropout is None and x.shape[0] <= _DECODE_ROWS[x.dtype]:
        return [_decode(x, mixture, given, keep_h) for given in projections]
    x, mixture = x.contiguous(), mixture.contiguous()
    masks = _masks(dropout, len(projections))
    return [
        _forward(x, mixture, _scaled(given, dropout), mask)
        for given, mask in zip(projections, masks, strict=True)
    ]


def _masks(dropout: Dropout | None, count: int) -> Sequence[Mask | None]:
    if dropout is None:
        return [None] * count
    return [Mask(dropout.drops, int(seed)) for seed in dropout.seeds]


def _scaled(projection: Projection, dropout: Dropout | None) -> Projection:
    """Returns the projection with the scalings that make up for what is dropped."""
    if dropout is None:
        return projection
    return projection._replace(row_scale=projection.row_scale * dropout.scale)


def _adds_bias(projection: Projection) -> bool:
    """Returns whether the bias is added at the end: it has rows, or there is no base product."""
    weight, bias, *_ = projection
    return bias is not None and (weight is None or bias.dim() == 2)


def _forward(
    x: Tensor, mixture: Tensor, projection: Projection, mask: Mask | None
) -> tuple[Tensor, Tensor]:
    weight, bias, lora_a, lora_b, row_adapter, row_scale = projection
    lora_a = lora_a.to(x.dtype)
    h = linear(x, lora_a) if mask is None else mask.shrink(x, lora_a)
    table = _table(mixture, row_adapter, row_scale)
    hw, lora_b = _weighted(h, table), lora_b.to(x.dtype)
    if not _has_absent(table) or _is_finite(lora_b):
        return two_products(x, _transposed(weight), bias, hw, lora_b), h
    y = present_product(hw, present_ranks(*table, x.shape[0]), lora_b)
    if weight is not None:
        y += linear(x, weight, bias)
    return y, h


def empty_h(x: Tensor, total_rank: int) -> Tensor:
    """Returns an uninitialised h as `mixed_lora_fwd` does."""
    return x.new_empty(x.shape[0], total_rank)


def mixed_lora_bwd(
    dys: Sequence[Tensor],
    x: Tensor,
    mixture: Tensor,
    projections: Sequence[Projection],
    hs: Sequence[Tensor | None],
    train_rows: Sequence[list[int]],
    needs_x: bool,
    needs_mixture: bool,
    grad_through_frozen: bool,
    dropout: Dropout | None = None,
) -> tuple[Tensor | None, Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """Returns the gradients of `mixed_lora_fwd`.

    Returns:
        dx [M, I] and d_mixture [S, K], summed over the projections, and (d_a [Rt, I],
        d_b [Rt, O]) of each; None for what is not needed.
    """
    x, mixture = x.contiguous(), mixture.contiguous()
    dx = d_mixture = None
    factors: list[tuple[Tensor | None, Tensor | None]] = []
    masks = _masks(dropout, len(projections))
    for dy, projection, h, spans, mask in zip(dys, projections, hs, train_rows, masks, strict=True):
        weight, _, lora_a, lora_b, row_adapter, row_scale = _scaled(projection, dropout)
        dy = dy.contiguous()
        g = linear(dy, lora_b.to(x.dtype))
        if h is None:  # nothing but x wants a gradient
            h = g
        table = _table(mixture, row_adapter, row_scale)
        own, packed_g, packed_h = _weighted_backward(g, h.contiguous(), table, spans, needs_mixture)
        if own is not None:
            d_mixture = own if d_mixture is None else d_mixture.add_(own)
        present = present_ranks(*table, x.shape[0]) if _has_absent(table) else None
        d_a = d_b = None
        if spans:  # before dx: dy may still be in a cache
            trained = None if present is None else present[:, _selected(spans)]
            d_b = _factor_grad(packed_h, dy, lora_b.dtype, trained)
            d_a = _factor_grad(packed_g, x, lora_a.dtype, trained, mask)
        if needs_x and present is not None and not _is_finite(lora_a):
            through: slice | Tensor = slice(None)
            if not grad_through_frozen:
                g, through = packed_g, _selected(spans)
            term = present_product(g, present[:, through], lora_a[through].to(x.dtype))
            if mask is not None:
                mask.drop(term)
            if weight is not None:
                term += linear(dy, weight.t())
            dx = term if dx is None else dx.add_(term)
        elif needs_x and mask is not None:
            rows = lora_a.to(x.dtype)
            if not grad_through_frozen:
                g, rows = packed_g, rows[_selected(spans)]
            # The base's part alone; without a base zeros, or what is there.
            dx = two_products(dy, weight, None, g[:, :0], rows[:0], dx)
            mask.add_product(dx, g, rows)
        elif needs_x and grad_through_frozen:
            dx = two_products(dy, weight, None, g, lora_a.to(x.dtype), dx)
        elif needs_x:
            dx = _through_trained(dy, weight, packed_g, lora_a, spans, dx)
        factors.append((d_a, d_b))
    return dx, d_mixture, factors


def _table(mixture: Tensor, row_adapter: Tensor, row_scale: Tensor) -> _Table:
    """Returns the three tensors from which `_C` computes the weight of every rank."""
    return mixture, row_adapter.contiguous(), row_scale.contiguous()


def _weighted(h: Tensor, table: _Table) -> Tensor:
    """Multiplies h by the weight of every rank, into a new tensor."""
    rows, ranks = h.shape
    out = torch.empty_like(h)
    _C.weight_ranks(
        CODES[h.dtype], out, h, *table,
        rows, *table[0].shape, ranks, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _weighted_backward(
    g: Tensor, h: Tensor, table: _Table, train_rows: list[int], needs_mixture: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Multiplies g by the weights in place, in the same pass that computes the results.

    Returns:
        d_mixture [S, K] or None, and the columns `train_rows` of the weighted g and h, [M, Rt].
    """
    rows, ranks = g.shape
    count = sum(train_rows[1::2]) - sum(train_rows[::2])
    packed_h = g.new_empty(rows, count)
    packed_g = g if count == ranks else g.new_empty(rows, count)
    d_mixture = None
    if needs_mixture:
        make = torch.empty if rows else torch.zeros
        d_mixture = make(*table[0].shape, dtype=table[0].dtype)
    _C.weight_ranks_backward(
        CODES[g.dtype], g, h, d_mixture, None if packed_g is g else packed_g, packed_h, train_rows,
        *table,
        rows, *table[0].shape, ranks, torch.get_num_threads(),
    )  # fmt: skip
    return d_mixture, packed_g, packed_h


def _decode(
    x: Tensor, mixture: Tensor, projection: Projection, keep_h: bool
) -> tuple[Tensor, Tensor | None]:
    weight, bias, lora_a, lora_b, row_adapter, row_scale = projection
    rows, inputs = x.shape
    ranks, outputs = lora_b.shape
    dtype = x.dtype
    if dtype == torch.float64:
        lora_a, lora_b = lora_a.to(dtype), lora_b.to(dtype)
    h = x.new_empty(rows, ranks) if keep_h else None
    accumulate = False
    if weight is not None and not is_few(x, weight):
        y = linear(x.contiguous(), weight, bias)
        weight, bias, accumulate = None, None, True
    else:
        y = x.new_empty(rows, outputs)
    codes = CODES[dtype], CODES[lora_a.dtype]
    read = x, weight, bias, lora_a, lora_b, mixture, row_adapter, row_scale
    sizes = rows, inputs, outputs, *mixture.shape, ranks
    threads = torch.get_num_threads()
    if not _C.mixed_lora_decode(*codes, y, h, *read, *sizes, accumulate, threads):
        whole = [None if t is None else t.contiguous() for t in read]
        _C.mixed_lora_decode(*codes, y, h, *whole, *sizes, accumulate, threads)
    return y, h


def _has_absent(table: _Table) -> bool:
    """Returns whether a weight or a scaling is exactly 0."""
    mixture, _, row_scale = table
    return not (mixture.all() and row_scale.all())


def _is_finite(values: Tensor) -> bool:
    """Returns whether all values are finite, in one pass; may be False for the largest floats."""
    if not values.numel():
        return True
    least, most = values.aminmax()
    return bool((most - least).isfinite())


def _factor_grad(
    packed: Tensor,
    x: Tensor,
    dtype: torch.dtype,
    present: Tensor | None,
    mask: Mask | None = None,
) -> Tensor:
    """Computes packed [M, Rt]^T . x [M, I], over the pairs that are `present` [M, Rt], if given.

    With a mask, of the dropped x.
    """
    if mask is None:
        out = _plain_factor_grad(packed, x, dtype)
    else:
        out = mask.factor_grad(packed, x).to(dtype)
    if present is None or _is_finite(out):
        return out
    dropped = x if mask is None else mask.drop(x, out=torch.empty_like(x))
    return present_product(packed.t(), present.t(), dropped).to(dtype)


def _plain_factor_grad(packed: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    ranks, columns = packed.shape[1], x.shape[1]
    if ranks > _FACTOR_RANKS[x.dtype]:
        return multiply_tn(packed, x).to(dtype)
    out = x.new_empty(ranks, columns, dtype=dtype)
    _C.factor_grad(
        CODES[x.dtype], CODES[dtype], out, packed, x, x.shape[0], ranks, columns,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _selected(train_rows: list[int]) -> Tensor:
    spans = zip(train_rows[::2], train_rows[1::2], strict=True)
    return torch.tensor([j for i, k in spans for j in range(i, k)], dtype=torch.int64)


def _transposed(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.t()


def _through_trained(
    dy: Tensor,
    weight: Tensor | None,
    packed_g: Tensor,
    lora_a: Tensor,
    train_rows: list[int],
    onto: Tensor | None,
) -> Tensor:
    """Returns the gradient of x through the trained adapters only; lora_a is not copied."""
    spans = list(zip(train_rows[::2], train_rows[1::2], strict=True))
    parts = packed_g.split([stop - start for start, stop in spans], dim=1) if spans else (packed_g,)
    rows = [lora_a[start:stop].to(dy.dtype) for start, stop in spans] or [lora_a[:0].to(dy.dtype)]
    dx = two_products(dy, weight, None, parts[0], rows[0], onto)
    for part, row in zip(parts[1:], rows[1:], strict=True):
        dx = two_products(dy, None, None, part, row, dx)
    return dx
