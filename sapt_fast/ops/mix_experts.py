"""A few LoRA experts per row, selected from a bank of many (mixture of memory experts).

    delta[m] = scaling sum_j weights[m, j] (x[m] A_n^T) B_n,    n = index[m, j]

Only the selected experts are read. The gradient of a bank can be sparse. It then needs memory only
for the experts of the batch, whatever the size of the bank.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sapt_fast import dispatch
from sapt_fast.ops import formulas, transforms
from sapt_fast.ops._common import FLOATS, compute_dtype, require_tensors, without_autocast
from sapt_fast.ops._presence import without_undefined
from sapt_fast.ops._scalars import number

_OP = "mix_experts"
DISPATCH = dispatch.Op()
# Elements of gathered experts that the reference holds at a time.
_GATHER_CHUNK = 1 << 22


class PairGroups(NamedTuple):
    """The P pairs (row, choice) sorted by expert, and the gradient's row of each expert.

    Attributes:
        order: [P] int64, as `pair_order` returns it.
        target: [P] int64, ascending: the row of the gradient to which the pair adds; negative, or
            `rows` or more, for pairs without an expert or weight.
        rows: number of rows of the gradient.
        ids: [rows] int64, the expert of each row, ascending; None for the whole bank.
    """

    order: Tensor
    target: Tensor
    rows: int
    ids: Tensor | None


def mix_experts(
    x: Tensor,
    bank_a: Tensor,
    bank_b: Tensor,
    index: Tensor,
    weights: Tensor,
    *,
    scaling: float = 1.0,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Computes the weighted sum of the selected experts' outputs; differentiable in every float.

    Args:
        x: [M, I]; float32, float16 or bfloat16, on a CPU also float64.
        bank_a: [N, r, I] in x's dtype or float32.
        bank_b: [N, r, O] in bank_a's dtype.
        index: [M, k] int64, the experts of each row (as `topk_keys` returns them); -1 for none
            (as `nearest_key` returns it). May contain an expert twice. Values are checked only on
            the CPU, because checking would wait for another device; there the kernels skip values
            out of range.
        weights: [M, k], any floating-point dtype. A weight of exactly 0 means that the expert is
            absent for that row: its infinities and NaNs reach neither delta nor a gradient, and a
            non-finite gradient of the weight becomes 0. Any other 0 is an ordinary number.
        scaling: alpha / r, for all experts; 0 counts as weights of 0.
        sparse_grad: whether the banks' gradients are `torch.sparse_coo` tensors over the selected
            experts, each once and in ascending order, for torch.optim.SparseAdam. This waits for
            the device, and raises an error under torch.compile.
        backend: as in `dispatch.resolve`.

    Returns:
        delta, [M, O], contiguous, in x's dtype.

    Raises:
        ValueError, TypeError: if a shape, index, dtype or device does not fit.
        dispatch.BackendError: if the named backend cannot run here.

    Example:
        >>> import torch
        >>> from sapt_fast.ops import mix_experts
        >>> x, index = torch.randn(2, 8), torch.tensor([[0, 4], [2, -1]])
        >>> bank_a, bank_b = torch.randn(5, 3, 8), torch.randn(5, 3, 6)
        >>> mix_experts(x, bank_a, bank_b, index, torch.rand(2, 2)).shape
        torch.Size([2, 6])
    """
    require_tensors(x=x, bank_a=bank_a, bank_b=bank_b, index=index, weights=weights)
    x = x.to(compute_dtype(x))
    _check(x, bank_a, bank_b, index, weights)
    compiling = torch.compiler.is_compiling()
    known = transforms.values(index) if index.device.type == "cpu" and index.numel() else None
    if known is not None:
        least, most = (int(v) for v in known.aminmax())
        if least < -1 or most >= bank_a.shape[0]:
            raise ValueError(
                f"index: got values from {least} to {most}, expected -1 to {bank_a.shape[0] - 1}"
            )
    scaling = number("scaling", scaling)
    weights = weights.to(torch.promote_types(x.dtype, torch.float32))
    if scaling == 0:
        weights = weights * 0.0  # no expert is there
    if transforms.active():
        if sparse_grad:
            raise ValueError(
                "sparse_grad: got True under a transform (torch.func, forward-mode AD), expected "
                "False"
            )
        dispatch.resolve(_OP, x.device, backend, x.dtype)
        return formulas.mix_experts(x, bank_a, bank_b, index, weights, float(scaling))
    if torch.is_grad_enabled() or compiling:
        if sparse_grad and compiling:
            raise ValueError("sparse_grad: got True under torch.compile, expected False")
        sort = bank_a.requires_grad or bank_b.requires_grad
        delta, _, _ = _forward_op(
            x, bank_a, bank_b, index, weights, scaling, sparse_grad, sort, backend or ""
        )
        return delta
    kernel = dispatch.kernels(_OP, dispatch.resolve(_OP, x.device, backend, x.dtype))
    delta, _ = kernel.mix_experts_fwd(x, bank_a, bank_b, index, weights, scaling)
    return delta


def _check(x: Tensor, bank_a: Tensor, bank_b: Tensor, index: Tensor, weights: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [M, I]")
    if bank_a.dim() != 3 or bank_a.shape[2] != x.shape[1]:
        raise ValueError(f"bank_a: got shape {tuple(bank_a.shape)}, expected [N, r, {x.shape[1]}]")
    if bank_b.dim() != 3 or bank_b.shape[:2] != bank_a.shape[:2]:
        n, r = bank_a.shape[:2]
        raise ValueError(f"bank_b: got shape {tuple(bank_b.shape)}, expected [{n}, {r}, O]")
    if index.dim() != 2 or index.shape[0] != x.shape[0]:
        raise ValueError(f"index: got shape {tuple(index.shape)}, expected [{x.shape[0]}, k]")
    if weights.shape != index.shape:
        raise ValueError(
            f"weights: got shape {tuple(weights.shape)}, expected {tuple(index.shape)}"
            " (that of index)"
        )
    if x.dtype not in FLOATS:
        raise TypeError(f"x: got dtype {x.dtype}, expected one of {FLOATS}")
    if bank_a.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"bank_a: got dtype {bank_a.dtype}, expected {x.dtype} (that of x) or torch.float32"
        )
    if bank_b.dtype != bank_a.dtype:
        raise TypeError(
            f"bank_b: got dtype {bank_b.dtype}, expected {bank_a.dtype} (that of bank_a)"
        )
    if index.dtype != torch.int64:
        raise TypeError(f"index: got dtype {index.dtype}, expected torch.int64")
    if not weights.is_floating_point():
        raise TypeError(f"weights: got dtype {weights.dtype}, expected a floating-point dtype")
    named = {"bank_a": bank_a, "bank_b": bank_b, "index": index, "weights": weights}
    for name, tensor in named.items():
        if tensor.device != x.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected {x.device} (that of x)")


# --- reference ---------------------------------------------------------------------------------


def mix_experts_fwd(
    x: Tensor,
    bank_a: Tensor,
    bank_b: Tensor,
    index: Tensor,
    weights: Tensor,
    scaling: float,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Specifies the forward: returns `(delta [M, O], h [M, k, r] = x A^T)`.

    weights and h are float32, or float64 for float64 inputs; h is 0 for pairs without an expert.
    `order` is that of `pair_order`, if it is known, for backends that take pairs in this order.
    """
    delta = x.new_zeros(x.shape[0], bank_b.shape[2])
    h = weights.new_zeros(*index.shape, bank_a.shape[1])
    chosen = _weights_of_chosen(index, weights, scaling)
    present = _present(index, weights)
    for rows in _row_chunks(index, bank_a, bank_b):
        h[rows] = _einsum("mi,mkri->mkr", x[rows].to(h), _gather(bank_a, index[rows], h))
        h[rows].masked_fill_((index[rows] < 0).unsqueeze(-1), 0.0)
        hw = _weighted(h[rows], chosen[rows])
        delta[rows] = _einsum("mkr,mkro->mo", hw, _gather(bank_b, present[rows], h)).to(x)
    return delta, h


def mix_experts_bwd(
    dy: Tensor,
    x: Tensor,
    bank_a: Tensor,
    bank_b: Tensor,
    index: Tensor,
    weights: Tensor,
    h: Tensor,
    scaling: float,
    groups: PairGroups | None,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Specifies the backward: returns `(dx, d_weights, d_a, d_b)`, None for what is not needed.

    d_a [rows, r, I] and d_b [rows, r, O] are computed with `groups`. Sums have a fixed order.
    """
    chosen = _weights_of_chosen(index, weights, scaling)
    present = _present(index, weights)
    g = torch.zeros_like(h)
    dx = x.new_zeros(x.shape) if needs_x else None
    for rows in _row_chunks(index, bank_a, bank_b):
        g[rows] = _einsum("mo,mkro->mkr", dy[rows].to(h), _gather(bank_b, index[rows], h))
        if dx is not None:
            gw = _weighted(g[rows], chosen[rows])
            dx[rows] = _einsum("mkr,mkri->mi", gw, _gather(bank_a, present[rows], h)).to(x)
    d_weights = None
    if needs_weights:
        d_weights = without_undefined((g * h).sum(-1) * scaling, weights)
    if groups is None:
        return dx, d_weights, None, None
    gw, hw = _weighted(g, chosen).flatten(0, 1), _weighted(h, chosen).flatten(0, 1)
    d_a = _bank_grad(gw, x, groups, index.shape[1]).to(bank_a.dtype)
    d_b = _bank_grad(hw, dy, groups, index.shape[1]).to(bank_b.dtype)
    return dx, d_weights, d_a, d_b


def pair_order(index: Tensor, weights: Tensor, experts: int) -> Tensor:
    """Returns the positions m * k + j in the flattened index, sorted by expert; int64.

    Pairs without an expert come first or last, then, also by expert, those whose weight is 0.
    """
    return _sort_keys(index, weights, experts).sort(stable=True).indices


def pair_groups(
    index: Tensor, weights: Tensor, experts: int, order: Tensor, compact: bool
) -> PairGroups:
    """Returns the groups of the pairs, from their `pair_order`.

    The gradient has a row for each expert of the bank, or, if `compact`, for each selected expert
    (which waits for the device)."""
    ids = _sort_keys(index, weights, experts)[order].long()
    if not compact:
        return PairGroups(order, ids, experts, None)
    inside = (ids >= 0) & (ids < experts)
    unique, target = torch.unique_consecutive(ids[inside], return_inverse=True)
    rows = unique.shape[0]
    return PairGroups(
        order, torch.where(ids < 0, -1, rows).masked_scatter_(inside, target), rows, unique
    )


def _sort_keys(index: Tensor, weights: Tensor, experts: int) -> Tensor:
    """Returns [M k]: the expert of a pair; -1, or `experts` or more, without expert or weight.

    Narrow integers take a radix sort fewer passes.
    """
    greatest = 2 * experts + 1
    narrow = torch.int16 if greatest < 2**15 else torch.int32 if greatest < 2**31 else torch.int64
    keys = index.clamp(-1, experts) + (weights == 0) * (experts + 1)
    return keys.to(narrow).flatten()


def _bank_grad(coefficients: Tensor, rows: Tensor, groups: PairGroups, k: int) -> Tensor:
    """out[target] = sum over its pairs p of coefficients[p] [r] (x) rows[p // k] [D]."""
    r, width = coefficients.shape[1], rows.shape[1]
    out = coefficients.new_zeros(groups.rows, r, width)
    step = max(1, _GATHER_CHUNK // max(1, r * width))
    for start in range(0, len(groups.order) if groups.rows else 0, step):
        pairs, target = groups.order[start : start + step], groups.target[start : start + step]
        share = coefficients[pairs]
        product = share.unsqueeze(2) * rows[pairs // k].to(share).unsqueeze(1)
        outside = (target < 0) | (target >= groups.rows)
        product.masked_fill_(outside[:, None, None], 0.0)
        # index_put sorts the indices on a GPU: the same sum every time, unlike index_add.
        out.index_put_((target.masked_fill(outside, 0),), product, accumulate=True)
    return out


def _weights_of_chosen(index: Tensor, weights: Tensor, scaling: float) -> Tensor:
    return torch.where((index >= 0) & (weights != 0), weights * scaling, 0.0)


def _present(index: Tensor, weights: Tensor) -> Tensor:
    """Returns the index, with -1 if the weight is exactly 0: that expert is absent."""
    return index.masked_fill(weights == 0, -1)


def _weighted(h: Tensor, chosen: Tensor) -> Tensor:
    """Multiplies h [.., k, r] by chosen [.., k]; 0 times an infinity or a NaN is 0."""
    chosen = chosen.unsqueeze(-1)
    return torch.where(chosen == 0, 0.0, h * chosen)


def _einsum(equation: str, a: Tensor, b: Tensor) -> Tensor:
    with without_autocast(a.device):
        return torch.einsum(equation, a, b)


def _gather(bank: Tensor, index: Tensor, like: Tensor) -> Tensor:
    absent = (index < 0)[..., None, None]
    return bank[index.clamp(min=0)].to(like).masked_fill_(absent, 0.0)


def _row_chunks(index: Tensor, bank_a: Tensor, bank_b: Tensor) -> list[slice]:
    """Chunks of rows; none where no row has anything to gather."""
    per_row = index.shape[1] * bank_a.shape[1] * max(bank_a.shape[2], bank_b.shape[2])
    if bank_a.shape[0] == 0 or per_row == 0:
        return []
    step = max(1, _GATHER_CHUNK // per_row)
    return [slice(row, row + step) for row in range(0, index.shape[0], step)]


# --- registered ops ----------------------------------------------------------------------------


@torch.library.custom_op("sapt_fast::mix_experts_fwd", mutates_args=())
def _forward_op(
    x: Tensor,
    bank_a: Tensor,
    bank_b: Tensor,
    index: Tensor,
    weights: Tensor,
    scaling: float,
    sparse_grad: bool,
    sort: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """delta, h and, if `sort`, the order of the pairs; otherwise that is empty."""
    transforms.require_no_tangents(_OP)
    kernel = dispatch.kernels(_OP, dispatch.resolve(_OP, x.device, backend, x.dtype))
    order = pair_order(index, weights, bank_a.shape[0]) if sort else None
    delta, h = kernel.mix_experts_fwd(x, bank_a, bank_b, index, weights, scaling, order)
    return delta, h, index.new_empty(0) if order is None else order


@torch.library.custom_op("sapt_fast::mix_experts_bwd", mutates_args=())
def _backward_op(
    dy: Tensor,
    x: Tensor,
    bank_a: Tensor,
    bank_b: Tensor,
    index: Tensor,
    weights: Tensor,
    h: Tensor,
    order: Tensor,
    scaling: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dense gradients of x, weights and (together) the banks, empty where `needs` says no."""
    kernel = dispatch.kernels(_OP, dispatch.resolve(_OP, x.device, backend, x.dtype))
    groups = None
    if needs[2]:
        groups = pair_groups(index, weights, bank_a.shape[0], order, False)
    grads = kernel.mix_experts_bwd(
        dy, x, bank_a, bank_b, index, weights, h, scaling, groups, needs[0], needs[1]
    )
    dx, d_weights, d_a, d_b = (x.new_empty(0) if grad is None else grad for grad in grads)
    return dx, d_weights, d_a, d_b


@_forward_op.register_fake
def _forward_fake(
    x: Tensor, bank_a: Tensor, bank_b: Tensor, index: Tensor, weights: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    h = weights.new_empty(index.shape[0], index.shape[1], bank_a.shape[1])
    _, _, sort, _ = options
    order = index.new_empty(index.shape[0] * index.shape[1] if sort else 0)
    return x.new_empty(x.shape[0], bank_b.shape[2]), h, order


@_backward_op.register_fake
def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, x, bank_a, bank_b, _, weights, _, _, _, needs, _ = arguments
    return (
        x.new_empty(x.shape if needs[0] else 0),
        weights.new_empty(weights.shape) if needs[1] else x.new_empty(0),
        bank_a.new_empty(bank_a.shape) if needs[2] else x.new_empty(0),
        bank_b.new_empty(bank_b.shape) if needs[2] else x.new_empty(0),
    )


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, bank_a, bank_b, index, weights, ctx.scaling, ctx.sparse_grad, _, ctx.backend = inputs
    _, h, order = output
    ctx.mark_non_differentiable(h, order)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, bank_a, bank_b, index, weights, h, order)


def _backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 9
    needs_x, needs_a, needs_b, _, needs_weights = ctx.needs_input_grad[:5]
    tensors = ctx.saved_tensors
    if transforms.differentiates_backward(dy):
        if ctx.sparse_grad:
            raise RuntimeError(
                "sparse_grad: got True in a backward that is differentiated or runs under vmap, "
                "expected False"
            )
        x, bank_a, bank_b, index, weights, *_ = tensors
        dx, d_a, d_b, d_weights = transforms.gradients(
            lambda x, a, b, w: [formulas.mix_experts(x, a, b, index, w, ctx.scaling)],
            [x, bank_a, bank_b, weights],
            [needs_x, needs_a, needs_b, needs_weights],
            [dy],
        )
        return dx, d_a, d_b, None, d_weights, None, None, None, None
    if ctx.sparse_grad and (needs_a or needs_b):
        dx, d_weights, d_a, d_b = _sparse_backward(ctx, dy, needs_x, needs_weights)
    else:
        needs = [needs_x, needs_weights, needs_a or needs_b]
        dx, d_weights, d_a, d_b = _backward_op(dy, *tensors, ctx.scaling, needs, ctx.backend)
    return (
        dx if needs_x else None,
        d_a if needs_a else None,
        d_b if needs_b else None,
        None,
        d_weights if needs_weights else None,
        None,
        None,
        None,
        None,
    )


def _sparse_backward(
    ctx: Any, dy: Tensor, needs_x: bool, needs_weights: bool
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Computes the backward, with gradients of the banks over the selected experts only."""
    x, bank_a, bank_b, index, weights, h, order = ctx.saved_tensors
    kernel = dispatch.kernels(_OP, dispatch.resolve(_OP, x.device, ctx.backend, x.dtype))
    groups = pair_groups(index, weights, bank_a.shape[0], order, True)
    dx, d_weights, d_a, d_b = kernel.mix_experts_bwd(
        dy, x, bank_a, bank_b, index, weights, h, ctx.scaling, groups, needs_x, needs_weights
    )
    return dx, d_weights, _sparse(groups, d_a, bank_a), _sparse(groups, d_b, bank_b)


def _sparse(groups: PairGroups, values: Tensor, bank: Tensor) -> Tensor:
    assert groups.ids is not None
    return torch.sparse_coo_tensor(
        groups.ids.unsqueeze(0), values, bank.shape, check_invariants=False, is_coalesced=True
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)
