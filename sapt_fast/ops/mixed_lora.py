"""A linear layer plus a per-input mixture of all LoRA adapters of a pool, in one pass.

    y = x W^T + bias + sum_k mixture[.., k] scaling[k] (x A_k^T) B_k

(SAPT, ACL 2024, equation of the shared attentive aggregation; X-LoRA uses the same with weights
per token.) The adapters are stacked in lora_a [R, I] and lora_b [R, O], where R is the total rank.
The mixture is computed in rank space, [M, R], so no adapter's output is formed. The gradient of the
weights is `sum over rows and ranks of (dy B^T) * (x A^T)`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sapt_fast import dispatch
from sapt_fast.ops import formulas, transforms
from sapt_fast.ops._common import FLOATS, compute_dtype, kernel, require_tensors
from sapt_fast.ops._dropout import Dropout, as_argument, kept, mask, seeded
from sapt_fast.ops._mixed_lora_ops import differentiable
from sapt_fast.ops._presence import (
    present_product,
    present_ranks,
    rank_weights,
    without_undefined,
)
from sapt_fast.ops._scalars import number
from sapt_fast.ops.projection import PooledProjection, Projection, in_dtype, require_sizes
from sapt_fast.ops.rank_table import (
    RankTable,
    cached_table,
    rank_layout,
    rank_table,
    trained_rows,
)

DISPATCH = dispatch.Op(few_rows=(64, 64), most_row_ranks=8192)


def mixed_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mixture: Tensor,
    *,
    ranks: int | Sequence[int],
    scaling: float | Tensor = 1.0,
    grad_through_frozen: bool = True,
    trainable: Sequence[int] | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Computes `x W^T + bias` plus the mixture of all adapters.

    Differentiable in every float input.

    Args:
        x: [B, T, I] or [M, I]; float32, float16 or bfloat16 (float64 on the CPU).
        weight: [O, I] in x's dtype; may be a transposed view.
        bias: [O] in x's dtype, or None.
        lora_a: [R, I], the stacked A of all adapters; x's dtype or float32.
        lora_b: [R, O], the stacked B, transposed; x's dtype or float32.
        mixture: [B, K], one weight per sample and adapter, or [B, T, K] per token; [M, K] for a
            two-dimensional x. A weight of exactly 0 means that the adapter is absent for that
            sample: its infinities and NaNs reach neither y nor a gradient, and a non-finite
            gradient of the weight becomes 0. Any other 0 is an ordinary number.
        ranks: rank of every adapter, or a sequence of K ranks (0 allowed) whose sum is R.
        scaling: alpha / r for all adapters, or a tensor or array [K]; not differentiated. A
            scaling of exactly 0 counts as a weight of 0; infinities and NaNs multiply as usual.
        grad_through_frozen: False passes no gradient to x through adapters that are not in
            `trainable`, as in the original SAPT code.
        trainable: indices of the adapters whose rows get a gradient; None for all adapters.
        dropout_p: probability, rounded to a multiple of 2**-16, of dropping an element of the
            adapters' input: one mask for all adapters, and none for `x W^T`. A dropped element is
            0 even if x is not finite there. What is kept is divided by `1 - dropout_p`. Kernels
            compute the mask from the seed (Philox 4x32-10) and store neither it nor its product.
        seed: int64 tensor of one element on x's device, which determines the mask. Defaults to
            one that torch's generator of the device draws.
        backend: "reference", "cpu", "triton" or "cuda"; None selects one, as `dispatch.resolve`.

    Returns:
        y, [B, T, O] or [M, O], contiguous, in x's dtype.

    Raises:
        ValueError, TypeError: if a shape, rank, index, dtype or device does not fit.
        dispatch.BackendError: if the named backend cannot run here.

    Example:
        >>> import torch
        >>> from sapt_fast.ops import mixed_lora_linear
        >>> x, weight = torch.randn(2, 5, 8), torch.randn(6, 8)
        >>> lora_a, lora_b = torch.randn(3 * 4, 8), torch.randn(3 * 4, 6)
        >>> mixture = torch.softmax(torch.randn(2, 3), -1)
        >>> mixed_lora_linear(x, weight, None, lora_a, lora_b, mixture, ranks=4).shape
        torch.Size([2, 5, 6])
    """
    require_tensors(x=x, weight=weight, bias=bias, lora_b=lora_b)
    _check_x(x)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected [O, {x.shape[-1]}]")
    if lora_b.dim() != 2 or lora_b.shape[1] != weight.shape[0]:
        raise ValueError(
            f"lora_b: got shape {tuple(lora_b.shape)}, expected [R, {weight.shape[0]}]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected [{weight.shape[0]}]")
    return _checked(
        x,
        weight,
        bias,
        lora_a,
        lora_b,
        mixture,
        ranks,
        scaling,
        grad_through_frozen,
        trainable,
        seeded(dropout_p, seed, x),
        backend,
    )


def mixed_lora(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    mixture: Tensor,
    *,
    ranks: int | Sequence[int],
    scaling: float | Tensor = 1.0,
    grad_through_frozen: bool = True,
    trainable: Sequence[int] | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Computes the mixture of all adapters: `mixed_lora_linear` without the base product.

    Args:
        x, lora_a, lora_b, mixture: as in `mixed_lora_linear`.
        ranks, scaling, grad_through_frozen, trainable, dropout_p, seed, backend: as in
            `mixed_lora_linear`.

    Returns:
        [B, T, O] or [M, O], contiguous, in x's dtype.

    Raises:
        ValueError, TypeError, dispatch.BackendError: as in `mixed_lora_linear`.

    Example:
        >>> import torch
        >>> from sapt_fast.ops import mixed_lora
        >>> x, lora_a, lora_b = torch.ones(1, 2), torch.ones(3, 2), torch.ones(3, 2)
        >>> mixed_lora(x, lora_a, lora_b, torch.tensor([[1.0, 0.5]]), ranks=[1, 2])
        tensor([[4., 4.]])
    """
    return _checked(
        x,
        None,
        None,
        lora_a,
        lora_b,
        mixture,
        ranks,
        scaling,
        grad_through_frozen,
        trainable,
        seeded(dropout_p, seed, x),
        backend,
    )


def mix(
    x: Tensor,
    mixture: Tensor,
    projections: Sequence[PooledProjection],
    grad_through_frozen: bool = True,
    backend: str | None = None,
    dropout: Dropout | None = None,
) -> list[Tensor]:
    """Runs the op on pools that are already stacked.

    Only the sizes of the arguments are checked, because kernels read memory by them.

    Args:
        x: [..., I] or [I], the input of all projections; its rows are grouped by sample.
        mixture: [S, K]; S divides the number of rows of x. Every pool has K adapters.
        projections: either all or none have a weight; the same holds for the bias, and for its
            number of dimensions.
        grad_through_frozen, backend: as in `mixed_lora_linear`.
        dropout: of the adapters' input, with a seed for each projection; None for none.

    Returns:
        y [..., O] of each projection.

    Raises:
        ValueError: if x is not as wide as a projection's lora_a.
        ValueError: if S does not divide the rows of x.
        ValueError: if the sizes of weight, bias and lora_b differ.
        ValueError: if there are not as many seeds as projections.
        RuntimeError: if x has no dimensions.
    """
    dims = x.dim()
    if dims == 0:
        raise RuntimeError("x: got a tensor without dimensions, expected [..., I]")
    dtype = compute_dtype(x)
    if dtype != x.dtype:
        x = x.to(dtype)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    if mixture.dtype != accumulate:
        mixture = mixture.to(accumulate)
    rows = x if dims == 2 else x.flatten(0, -2) if dims > 2 else x.unsqueeze(0)
    require_sizes(rows, mixture, projections)
    computed = [in_dtype(given.projection, dtype, accumulate) for given in projections]
    if dropout is not None and len(dropout.seeds) != len(projections):
        got, expected = len(dropout.seeds), len(projections)
        raise ValueError(f"dropout: got {got} seeds, expected {expected} (one of each projection)")
    feature = None if dropout is None else "dropout"
    if transforms.active():
        dispatch.resolve("mixed_lora", x.device, backend, x.dtype, feature=feature)  # may raise
        ys = formulas.mixed_lora(rows, mixture, computed, projections, grad_through_frozen, dropout)
        return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys]
    if _eager_inference(x):
        ranks = max((p.lora_a.shape[0] for p in computed), default=0)
        forward = kernel(
            "mixed_lora", "mixed_lora_fwd", backend, rows, rows.shape[0], ranks, feature
        )
        ys = [y for y, _ in forward(rows, mixture, computed, False, *as_argument(dropout))]
    else:
        ys = differentiable(
            rows, mixture, computed, projections, grad_through_frozen, backend, dropout
        )
    return ys if dims == 2 else [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


def _eager_inference(x: Tensor) -> bool:
    """Whether to call the kernel past torch's dispatcher, which costs more than a small op."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(x) in transforms.PLAIN
    )


def _check_x(x: Tensor) -> None:
    if x.dim() not in (2, 3):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, T, I] or [M, I]")
    if x.dtype not in FLOATS:
        raise TypeError(f"x: got dtype {x.dtype}, expected one of {FLOATS}")


def _checked(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mixture: Tensor,
    ranks: int | Sequence[int],
    scaling: float | Tensor,
    grad_through_frozen: bool,
    trainable: Sequence[int] | None,
    dropout: Dropout | None,
    backend: str | None,
) -> Tensor:
    require_tensors(x=x, lora_a=lora_a, lora_b=lora_b, mixture=mixture)
    _check_x(x)
    if lora_a.dim() != 2 or lora_a.shape[1] != x.shape[-1]:
        raise ValueError(f"lora_a: got shape {tuple(lora_a.shape)}, expected [R, {x.shape[-1]}]")
    if lora_b.dim() != 2 or lora_b.shape[0] != lora_a.shape[0]:
        raise ValueError(
            f"lora_b: got shape {tuple(lora_b.shape)}, expected [{lora_a.shape[0]}, O]"
            " (the rows of lora_a)"
        )
    device, dtype = x.device, x.dtype
    named = {"weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b}
    for name, tensor in {**named, "mixture": mixture}.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: got device {tensor.device}, expected {device} (that of x)")
    casts = compute_dtype(x) != dtype
    for name, tensor in named.items():
        if tensor is None or tensor.dtype == dtype:
            continue
        allowed: tuple[torch.dtype, ...] = (dtype,)
        if name.startswith("lora"):
            allowed = (dtype, torch.float32)
        if casts:
            allowed = FLOATS
        if tensor.dtype not in allowed:
            raise TypeError(
                f"{name}: got dtype {tensor.dtype}, expected {' or '.join(map(str, allowed))}"
            )
    if lora_a.dtype != lora_b.dtype:
        raise TypeError(
            f"lora_b: got dtype {lora_b.dtype}, expected {lora_a.dtype} (that of lora_a)"
        )
    per_sample, per_token = tuple(x.shape[:1]), tuple(x.shape[:-1])
    if tuple(mixture.shape[:-1]) not in (per_sample, per_token) or mixture.dim() == 0:
        expected = " or ".join(str([*lead, "K"]) for lead in dict.fromkeys((per_sample, per_token)))
        raise ValueError(f"mixture: got shape {tuple(mixture.shape)}, expected {expected}")
    if mixture.shape[-1] == 0:
        raise ValueError(
            f"mixture: got shape {tuple(mixture.shape)}, expected at least one adapter"
        )
    if not mixture.is_floating_point():
        raise TypeError(f"mixture: got dtype {mixture.dtype}, expected a floating-point dtype")
    count = mixture.shape[-1]
    layout = rank_layout(ranks, count, lora_a.shape[0])
    # A transform tracks tensors that do not require grad.
    trains = lora_a.requires_grad or lora_b.requires_grad or transforms.active()
    scaling = _scaling(scaling, count)
    train_rows = trained_rows(layout, trainable)
    if grad_through_frozen and not trains:
        train_rows = []
    spans = list(zip(train_rows[::2], train_rows[1::2], strict=True))
    projection = Projection(
        weight, bias, lora_a.detach(), lora_b.detach(), *_table(layout, scaling, x)
    )
    pooled = PooledProjection(
        projection,
        [lora_a[i:j] for i, j in spans],
        [lora_b[i:j] for i, j in spans],
        train_rows,
    )
    return mix(x, mixture.reshape(-1, count), [pooled], grad_through_frozen, backend, dropout)[0]


def _scaling(scaling: Any, count: int) -> float | Tensor:
    """Converts a scaling to a float, or to a tensor of one or `count` numbers."""
    if not isinstance(scaling, Tensor) and getattr(scaling, "ndim", 0) > 0:
        scaling = torch.as_tensor(scaling)
    if not isinstance(scaling, Tensor):
        return number("scaling", scaling)
    if tuple(scaling.shape) not in ((), (count,)):
        raise ValueError(f"scaling: got {scaling!r}, expected a number or a tensor [{count}]")
    if scaling.is_complex() or scaling.dtype == torch.bool:
        raise TypeError(f"scaling: got dtype {scaling.dtype}, expected real numbers")
    return scaling


def _table(layout: tuple[int, ...], scaling: float | Tensor, x: Tensor) -> RankTable:
    dtype = torch.promote_types(compute_dtype(x), torch.float32)
    if isinstance(scaling, Tensor):
        values = scaling.detach().to(device=x.device, dtype=dtype).expand(len(layout))
        return rank_table(layout, values, x.device, dtype)
    traced = torch.compiler.is_compiling() or type(x) not in transforms.PLAIN
    if traced or transforms.active():  # a fake or wrapped table must not be kept
        return rank_table(layout, [scaling] * len(layout), x.device, dtype)
    return cached_table(layout, (float(scaling),) * len(layout), x.device, dtype)


# --- reference ---------------------------------------------------------------------------------


def mixed_lora_fwd(
    x: Tensor,
    mixture: Tensor,
    projections: Sequence[Projection],
    keep_h: bool = True,
    dropout: Dropout | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Specifies the forward: returns `(y [M, O], h [M, R] = x A^T)` of each projection.

    Without `keep_h`, h is not read, and a backend may return any value for it. With dropout, h is
    that of x with zeros for what is dropped; the factor of what is kept belongs to the scalings.
    """
    results = []
    for i, (weight, bias, lora_a, lora_b, row_adapter, row_scale) in enumerate(projections):
        adapted = x
        if dropout is not None:
            adapted = kept(x, dropout.seeds[i], dropout.drops)
            row_scale = row_scale * dropout.scale
        h = adapted @ lora_a.to(x.dtype).t()
        hw = _weighted(h, mixture, row_adapter, row_scale)
        present = present_ranks(mixture, row_adapter, row_scale, x.shape[0])
        y = present_product(hw, present, lora_b.to(x.dtype))
        if weight is not None:
            y = torch.addmm(y, x, weight.t())
        results.append((y if bias is None else y + bias, h))
    return results


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
    """Specifies the backward.

    Args:
        dys: [M, O] of each projection; not written to.
        x, mixture, projections: as in the forward.
        hs: h of each projection from the forward; None if neither the mixture nor a row of the
            projection trains.
        train_rows: ascending disjoint ranges [start, stop, start, stop, ...] of each projection.
        needs_x, needs_mixture: whether to compute dx and d_mixture.
        grad_through_frozen: as in `mixed_lora_linear`.
        dropout: as in the forward.

    Returns:
        dx [M, I] and d_mixture [S, K], summed over the projections, and (d_a [Rt, I],
        d_b [Rt, O]) of each, rows in the order of its ranges. None for results that are not
        needed.
    """
    dx = x.new_zeros(x.shape) if needs_x else None
    d_mixture = torch.zeros_like(mixture) if needs_mixture else None
    factors: list[tuple[Tensor | None, Tensor | None]] = []
    for i, (dy, projection, h, spans) in enumerate(
        zip(dys, projections, hs, train_rows, strict=True)
    ):
        weight, _, lora_a, lora_b, row_adapter, row_scale = projection
        adapted = x
        if dropout is not None:
            keeps = mask(dropout.seeds[i], dropout.drops, *x.shape)
            adapted = torch.where(keeps, x, 0.0)
            row_scale = row_scale * dropout.scale
        lora_a_x, lora_b_x = lora_a.to(x.dtype), lora_b.to(x.dtype)
        g = dy @ lora_b_x.t()
        if d_mixture is not None and h is not None:
            product = g.to(mixture.dtype) * h.to(mixture.dtype)
            product = torch.where(row_scale == 0, 0.0, product * row_scale)
            samples = mixture.shape[0]
            per_sample = _by_sample(product, samples).sum(1) if samples else product
            own = torch.zeros_like(mixture).index_add_(1, row_adapter.long(), per_sample)
            d_mixture += without_undefined(own, mixture)
        present = present_ranks(mixture, row_adapter, row_scale, x.shape[0])
        gw = _weighted(g, mixture, row_adapter, row_scale)
        rows = _selected(spans, x.device)
        d_a = d_b = None
        if spans and h is not None:
            hw = _weighted(h[:, rows], mixture, row_adapter[rows], row_scale[rows])
            d_a = present_product(gw[:, rows].t(), present[:, rows].t(), adapted).to(lora_a.dtype)
            d_b = present_product(hw.t(), present[:, rows].t(), dy).to(lora_b.dtype)
        factors.append((d_a, d_b))
        if dx is not None:
            through = slice(None) if grad_through_frozen else rows
            term = present_product(gw[:, through], present[:, through], lora_a_x[through])
            dx += term if dropout is None else torch.where(keeps, term, 0.0)
            if weight is not None:
                dx = torch.addmm(dx, dy, weight)
    return dx, d_mixture, factors


def empty_h(x: Tensor, total_rank: int) -> Tensor:
    """Returns an uninitialised h as `mixed_lora_fwd` does, for the fake kernel."""
    return x.new_empty(x.shape[0], total_rank)


def _weighted(h: Tensor, mixture: Tensor, row_adapter: Tensor, row_scale: Tensor) -> Tensor:
    """Multiplies every rank column of h by its adapter's weight and scaling, in h's dtype."""
    samples = mixture.shape[0]
    if samples == 0:
        return h
    w = rank_weights(mixture, row_adapter, row_scale).unsqueeze(1)
    return torch.where(w == 0, 0.0, _by_sample(h, samples) * w).to(h.dtype).view_as(h)


def _by_sample(rows: Tensor, samples: int) -> Tensor:
    return rows.view(samples, rows.shape[0] // samples, rows.shape[1])


def _selected(train_rows: list[int], device: torch.device) -> Tensor:
    spans = zip(train_rows[::2], train_rows[1::2], strict=True)
    return torch.tensor(
        [j for i, k in spans for j in range(i, k)], dtype=torch.int64, device=device
    )
