"""A linear layer plus a per-input mixture of all LoRA adapters of a pool, in one pass.

    y = x W^T + bias + sum_k mixture[.., k] scaling[k] (x A_k^T) B_k

(SAPT, ACL 2024, equation of the shared attentive aggregation; X-LoRA uses the same with weights
per token.) The adapters lie one after the other in lora_a [R, I] and lora_b [R, O], R the total
rank. Everything the mixture adds lives in rank space, [M, R]: no adapter's output is ever formed,
and the gradient of the weights is `sum over rows and ranks of (dy B^T) * (x A^T)`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sapt_fast import dispatch
from sapt_fast.ops.rank_table import (
    RankTable,
    cached_table,
    rank_layout,
    rank_table,
    trained_rows,
)

_OP = "mixed_lora"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)


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
    backend: str | None = None,
) -> Tensor:
    """`x W^T + bias` plus the mixture of all adapters; differentiable in every float input.

    Args:
        x: [B, T, I] or [M, I]; float32, float16 or bfloat16 (float64 on the CPU).
        weight: [O, I] in x's dtype; may be a transposed view.
        bias: [O] or None.
        lora_a: [R, I], the adapters stacked one after the other; x's dtype or float32.
        lora_b: [R, O], likewise.
        mixture: [B, K] one weight per sample and adapter, or [B, T, K] per token; for a
            two-dimensional x [M, K].
        ranks: rank of every adapter, or a sequence of K ranks (0 allowed) whose sum is R.
        scaling: alpha / r for all adapters, or a tensor [K]; not differentiated.
        grad_through_frozen: False keeps gradients from reaching x through adapters that are not
            in `trainable`, as the released SAPT does.
        trainable: indices of the adapters whose rows get a gradient; None for all of them.
        backend: "reference", "cpu", "triton" or "cuda"; None lets dispatch choose.

    Returns:
        y, [B, T, O] or [M, O], contiguous, in x's dtype.

    Raises:
        ValueError, TypeError: a shape, rank, index, dtype or device does not fit.
        dispatch.BackendError: the named backend cannot run here.

    Example:
        >>> import torch
        >>> from sapt_fast.ops import mixed_lora_linear
        >>> x, weight = torch.randn(2, 5, 8), torch.randn(6, 8)
        >>> lora_a, lora_b = torch.randn(3 * 4, 8), torch.randn(3 * 4, 6)
        >>> mixture = torch.softmax(torch.randn(2, 3), -1)
        >>> mixed_lora_linear(x, weight, None, lora_a, lora_b, mixture, ranks=4).shape
        torch.Size([2, 5, 6])
    """
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
    backend: str | None = None,
) -> Tensor:
    """What the mixture adds to a linear layer: `mixed_lora_linear` without the base product.

    Arguments, result and errors are those of `mixed_lora_linear`.
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
        backend,
    )


def mix(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mixture: Tensor,
    table: RankTable,
    train_a: list[Tensor],
    train_b: list[Tensor],
    train_rows: list[int],
    grad_through_frozen: bool = True,
    backend: str | None = None,
) -> Tensor:
    """The op on a pool that is already laid out; arguments are trusted (used by `pool`).

    Args:
        x: [..., I]; its rows are grouped by sample.
        lora_a, lora_b: the stacked values; gradients do not flow to them but to `train_a`,
            `train_b`.
        mixture: [S, K]; S divides the number of rows of x.
        table: of the same K adapters and R rows.
        train_a, train_b: the rows that train, as tensors that share lora_a's and lora_b's memory.
        train_rows: [start, stop] of each of them in the stack, flattened.
    """
    dtype = _compute_dtype(x)
    if dtype != x.dtype:
        x = x.to(dtype)
        weight = None if weight is None else weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if lora_a.dtype not in (dtype, torch.float32):
        lora_a, lora_b = lora_a.to(dtype), lora_b.to(dtype)
    accumulate = torch.promote_types(dtype, torch.float32)
    if mixture.dtype != accumulate:
        mixture = mixture.to(accumulate)
    if table.row_scale.dtype != accumulate:
        table = RankTable(table.row_adapter, table.row_scale.to(accumulate))
    rows = x if x.dim() == 2 else x.flatten(0, -2)
    if _eager_inference(x):
        y, _ = _kernel("mixed_lora_fwd", backend, rows)(
            rows, weight, bias, lora_a, lora_b, mixture, *table
        )
    else:
        y, _ = _forward_op(
            rows, weight, bias, lora_a, lora_b, train_a, train_b, mixture, *table,
            train_rows, grad_through_frozen, backend or "",
        )  # fmt: skip
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products: x's, or autocast's, which leaves float64 alone."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _kernel(name: str, backend: str | None, x: Tensor) -> Callable[..., Any]:
    """A kernel of the backend that dispatch chooses; autocast does not reach into it."""
    chosen = dispatch.resolve(_OP, x.device, backend, x.dtype)
    function = getattr(dispatch.kernels(_OP, chosen), name)
    if not torch.is_autocast_enabled(x.device.type):
        return function

    def without_autocast(*arguments: Any) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return function(*arguments)

    return without_autocast


def _eager_inference(x: Tensor) -> bool:
    """Whether to call the kernel past torch's dispatcher, which costs more than a small op."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and type(x) in _PLAIN


def _check_x(x: Tensor) -> None:
    if x.dim() not in (2, 3):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, T, I] or [M, I]")
    if x.dtype not in _FLOATS:
        raise TypeError(f"x: got dtype {x.dtype}, expected one of {_FLOATS}")


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
    backend: str | None,
) -> Tensor:
    _check_x(x)
    if lora_a.dim() != 2 or lora_a.shape[1] != x.shape[-1]:
        raise ValueError(f"lora_a: got shape {tuple(lora_a.shape)}, expected [R, {x.shape[-1]}]")
    if lora_b.dim() != 2 or lora_b.shape[0] != lora_a.shape[0]:
        raise ValueError(
            f"lora_b: got shape {tuple(lora_b.shape)}, expected [{lora_a.shape[0]}, O]"
            " (the rows of lora_a)"
        )
    named = {"weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b}
    for name, tensor in {**named, "mixture": mixture}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected {x.device} (that of x)")
    for name, tensor in named.items():
        allowed: tuple[torch.dtype, ...] = (x.dtype,)
        if name.startswith("lora"):
            allowed = (x.dtype, torch.float32)
        if _compute_dtype(x) != x.dtype:
            allowed = _FLOATS
        if tensor is not None and tensor.dtype not in allowed:
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
    trains = lora_a.requires_grad or lora_b.requires_grad
    shape = tuple(scaling.shape) if isinstance(scaling, Tensor) else ()
    if shape not in ((), (count,)) or not isinstance(scaling, (int, float, Tensor)):
        raise ValueError(f"scaling: got {scaling!r}, expected a number or a tensor [{count}]")
    train_rows = trained_rows(layout, trainable)
    if grad_through_frozen and not trains:
        train_rows = []
    spans = list(zip(train_rows[::2], train_rows[1::2], strict=True))
    return mix(
        x, weight, bias, lora_a.detach(), lora_b.detach(),
        mixture.reshape(-1, count),
        _table(layout, scaling, x),
        [lora_a[i:j] for i, j in spans] if lora_a.requires_grad else [],
        [lora_b[i:j] for i, j in spans] if lora_b.requires_grad else [],
        train_rows, grad_through_frozen, backend,
    )  # fmt: skip


def _table(layout: tuple[int, ...], scaling: float | Tensor, x: Tensor) -> RankTable:
    dtype = torch.promote_types(_compute_dtype(x), torch.float32)
    if isinstance(scaling, Tensor):
        values = scaling.detach().to(device=x.device, dtype=dtype).expand(len(layout))
        return rank_table(layout, values, x.device, dtype)
    if torch.compiler.is_compiling() or type(x) not in _PLAIN:  # a fake table must not be kept
        return rank_table(layout, [scaling] * len(layout), x.device, dtype)
    return cached_table(layout, float(scaling), x.device, dtype)


# --- reference ---------------------------------------------------------------------------------


def mixed_lora_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mixture: Tensor,
    row_adapter: Tensor,
    row_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """The specification of the forward: `(y [M, O], h [M, R] = x A^T)`."""
    h = x @ lora_a.to(x.dtype).t()
    y = _weighted(h, mixture, row_adapter, row_scale) @ lora_b.to(x.dtype)
    if weight is not None:
        y = torch.addmm(y, x, weight.t())
    return (y if bias is None else y + bias), h


def mixed_lora_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mixture: Tensor,
    row_adapter: Tensor,
    row_scale: Tensor,
    h: Tensor,
    train_rows: list[int],
    needs_x: bool,
    needs_mixture: bool,
    grad_through_frozen: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The specification of the backward: `(dx, d_mixture, d_a, d_b)`, None where not asked for."""
    lora_a_x, lora_b_x = lora_a.to(x.dtype), lora_b.to(x.dtype)
    g = dy @ lora_b_x.t()
    dx = d_mixture = d_a = d_b = None
    if needs_mixture:
        product = g.to(mixture.dtype) * h.to(mixture.dtype) * row_scale
        samples = mixture.shape[0]
        per_sample = _by_sample(product, samples).sum(1) if samples else product
        d_mixture = torch.zeros_like(mixture).index_add_(1, row_adapter.long(), per_sample)
    gw = _weighted(g, mixture, row_adapter, row_scale)
    rows = _selected(train_rows, x.device)
    if train_rows:
        hw = _weighted(h[:, rows], mixture, row_adapter[rows], row_scale[rows])
        d_a = (gw[:, rows].t() @ x).to(lora_a.dtype)
        d_b = (hw.t() @ dy).to(lora_b.dtype)
    if needs_x:
        dx = gw @ lora_a_x if grad_through_frozen else gw[:, rows] @ lora_a_x[rows]
        if weight is not None:
            dx = torch.addmm(dx, dy, weight)
    return dx, d_mixture, d_a, d_b


def _weighted(h: Tensor, mixture: Tensor, row_adapter: Tensor, row_scale: Tensor) -> Tensor:
    """`h * w` with every rank column times its adapter's weight and scaling, in h's dtype."""
    samples = mixture.shape[0]
    if samples == 0:
        return h
    w = mixture.index_select(1, row_adapter) * row_scale
    return (_by_sample(h, samples) * w.unsqueeze(1)).to(h.dtype).view_as(h)


def _by_sample(rows: Tensor, samples: int) -> Tensor:
    return rows.view(samples, rows.shape[0] // samples, rows.shape[1])


def _selected(train_rows: list[int], device: torch.device) -> Tensor:
    spans = zip(train_rows[::2], train_rows[1::2], strict=True)
    return torch.tensor(
        [j for i, k in spans for j in range(i, k)], dtype=torch.int64, device=device
    )


# --- registered ops ----------------------------------------------------------------------------


@torch.library.custom_op("sapt_fast::mixed_lora_fwd", mutates_args=())
def _forward_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    train_a: list[Tensor],
    train_b: list[Tensor],
    mixture: Tensor,
    row_adapter: Tensor,
    row_scale: Tensor,
    train_rows: list[int],
    grad_through_frozen: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _kernel("mixed_lora_fwd", backend, x)(
        x, weight, bias, lora_a, lora_b, mixture, row_adapter, row_scale
    )


@torch.library.custom_op("sapt_fast::mixed_lora_bwd", mutates_args=())
def _backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mixture: Tensor,
    row_adapter: Tensor,
    row_scale: Tensor,
    h: Tensor | None,
    train_rows: list[int],
    needs_x: bool,
    needs_mixture: bool,
    grad_through_frozen: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`mixed_lora_bwd` of the backend, with empty tensors in place of None."""
    grads = _kernel("mixed_lora_bwd", backend, x)(
        dy, x, weight, lora_a, lora_b, mixture, row_adapter, row_scale, h,
        train_rows, needs_x, needs_mixture, grad_through_frozen,
    )  # fmt: skip
    dx, d_mixture, d_a, d_b = (x.new_empty(0) if grad is None else grad for grad in grads)
    return dx, d_mixture, d_a, d_b


@_forward_op.register_fake
def _forward_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    h = _kernel("empty_h", others[-1], x)(x, lora_a.shape[0])
    return x.new_empty(x.shape[0], lora_b.shape[1]), h


@_backward_op.register_fake
def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, lora_a: Tensor, lora_b: Tensor, mixture: Tensor,
    row_adapter: Tensor, row_scale: Tensor, h: Tensor | None, train_rows: list[int],
    needs_x: bool, needs_mixture: bool, *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows = sum(train_rows[1::2]) - sum(train_rows[::2])
    return (
        x.new_empty(x.shape) if needs_x else x.new_empty(0),
        mixture.new_empty(mixture.shape) if needs_mixture else x.new_empty(0),
        lora_a.new_empty(rows, lora_a.shape[1]) if rows else x.new_empty(0),
        lora_b.new_empty(rows, lora_b.shape[1]) if rows else x.new_empty(0),
    )


def empty_h(x: Tensor, total_rank: int) -> Tensor:
    """An uninitialised h as `mixed_lora_fwd` returns it, for the fake kernel."""
    return x.new_empty(x.shape[0], total_rank)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    (x, weight, bias, lora_a, lora_b, train_a, train_b, mixture, row_adapter, row_scale,
     train_rows, grad_through_frozen, backend) = inputs  # fmt: skip
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.train_sizes = [t.shape[0] for t in (train_a or train_b)]
    ctx.needs_a = [t.requires_grad for t in train_a]
    ctx.needs_b = [t.requires_grad for t in train_b]
    ctx.needs_x, ctx.needs_mixture = x.requires_grad, mixture.requires_grad
    ctx.needs_weight = weight is not None and weight.requires_grad
    ctx.needs_bias = bias is not None and bias.requires_grad
    ctx.train_rows, ctx.grad_through_frozen, ctx.backend = train_rows, grad_through_frozen, backend
    needs_h = ctx.needs_mixture or bool(train_rows)
    # The last two share lora_a's and lora_b's memory; saved, they tell if it was changed since.
    ctx.save_for_backward(
        x, weight, lora_a, lora_b, mixture, row_adapter, row_scale,
        output[1] if needs_h else None, *train_a, *train_b,
    )  # fmt: skip


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Any, ...]:
    # An empty list of ints counts as a list of tensors, whose gradient is a list.
    no_rows: list[None] | None = None if ctx.train_rows else []
    if dy is None:
        empty = [None] * len(ctx.needs_a), [None] * len(ctx.needs_b)
        return (*(None,) * 5, *empty, None, None, None, no_rows, None, None)
    x, weight, lora_a, lora_b, mixture, row_adapter, row_scale, h = ctx.saved_tensors[:8]
    dx, d_mixture, d_a, d_b = _backward_op(
        dy, x, weight, lora_a, lora_b, mixture, row_adapter, row_scale, h,
        ctx.train_rows, ctx.needs_x, ctx.needs_mixture, ctx.grad_through_frozen, ctx.backend,
    )  # fmt: skip
    return (
        dx if ctx.needs_x else None,
        _weight_grad(dy, x) if ctx.needs_weight else None,
        dy.sum(0) if ctx.needs_bias else None,
        None,
        None,
        _split(d_a, ctx.train_sizes, ctx.needs_a),
        _split(d_b, ctx.train_sizes, ctx.needs_b),
        d_mixture if ctx.needs_mixture else None,
        None,
        None,
        no_rows,
        None,
        None,
    )


def _weight_grad(dy: Tensor, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return dy.t() @ x


def _split(grad: Tensor, sizes: list[int], needed: list[bool]) -> list[Tensor | None]:
    if not any(needed):
        return [None] * len(needed)
    parts = grad.split(sizes)
    return [part if need else None for part, need in zip(parts, needed, strict=True)]


_forward_op.register_autograd(_backward, setup_context=_setup_context)
