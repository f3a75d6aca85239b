"""Op `mixed_lora` registered with torch, with fake kernels and its autograd formula.

A registered op takes tensors, numbers and lists of them. So projections are passed as one list per
field, and the rows that train as triples (index of the projection, start, stop) in one list.

Torch calls a registered op through layers that cost more than the kernels of a small layer. So
eager calls on plain tensors take a `torch.autograd.Function` over the same kernels and formula.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from sapt_fast import dispatch
from sapt_fast.ops import formulas, transforms
from sapt_fast.ops._common import guarded, kernel, without_autocast
from sapt_fast.ops.projection import PooledProjection, Projection

_OP = "mixed_lora"


def differentiable(
    x: Tensor,
    mixture: Tensor,
    computed: Sequence[Projection],
    pooled: Sequence[PooledProjection],
    grad_through_frozen: bool,
    backend: str | None,
) -> list[Tensor]:
    """Computes y [M, O] of each projection, by the registered op unless `_is_eager`.

    Args:
        x: [M, I].
        mixture: [S, K].
        computed: the projections, in the dtypes of the product.
        pooled: the rows of each projection that train.
        grad_through_frozen, backend: as in `ops.mixed_lora_linear`.
    """
    fields = _flattened(computed)
    train_a = [t for given in pooled for t in given.train_a]
    train_b = [t for given in pooled for t in given.train_b]
    rows = _triples([given.train_rows for given in pooled])
    options = rows, grad_through_frozen, backend or ""
    if _is_eager(x, mixture, *chain(*fields), *train_a, *train_b):
        weights, biases, *stacks = fields
        leaves = *weights, *biases, *train_a, *train_b
        return list(_EagerFunction.apply(computed, stacks, options, x, mixture, *leaves))
    return _forward_op(x, mixture, *fields, train_a, train_b, *options)[: len(pooled)]


def _is_eager(*tensors: Tensor) -> bool:
    """Returns whether autograd alone must see the op: no graph, mode or kind of tensor."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and transforms.PLAIN.issuperset(map(type, tensors))
    )


class _EagerFunction(torch.autograd.Function):
    """The registered op without torch's dispatcher: autograd alone sees it."""

    @staticmethod
    def forward(
        ctx: Any,
        computed: Sequence[Projection],
        stacks: Sequence[Sequence[Tensor]],
        options: tuple[list[int], bool, str],
        x: Tensor,
        mixture: Tensor,
        *leaves: Tensor,
    ) -> tuple[Tensor, ...]:
        """Computes y of each projection.

        Args:
            computed: the projections; `stacks` has their lora_a, lora_b, row_adapter and row_scale.
            options: train_rows, grad_through_frozen and backend, as the registered op takes them.
            leaves: the weights, biases, and rows that train, of those that are given.
        """
        results = kernel(_OP, "mixed_lora_fwd", options[2], x)(x, mixture, computed)
        first = computed[0]
        ranges = len(options[0]) // 3
        sizes = (
            0 if first.weight is None else len(computed),
            0 if first.bias is None else len(computed),
            ranges,
            ranges,
        )
        weights, biases, train_a, train_b = _split(leaves, sizes)
        fields = x, mixture, weights, biases, *stacks, train_a, train_b, *options
        _keep(ctx, fields, [h for _, h in results])
        return tuple(y for y, _ in results)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        """Returns a gradient for each argument of `forward`."""
        dx, d_mixture, d_weights, d_biases, *_, d_a, d_b, _, _, _ = _gradients(
            ctx, dys, _run_backward
        )
        return None, None, None, dx, d_mixture, *d_weights, *d_biases, *d_a, *d_b


def _flattened(projections: Sequence[Projection]) -> list[list[Any]]:
    """Converts projections for the registered ops: one list per field, empty if it is None."""
    fields = zip(*projections, strict=True)
    return [[t for t in field if t is not None] for field in fields]


def _projections(count: int, *fields: Sequence[Tensor]) -> list[Projection]:
    """Returns the inverse of `_flattened`."""
    filled: list[Sequence[Any]] = [field or [None] * count for field in fields]
    return [Projection(*values) for values in zip(*filled, strict=True)]


def _triples(train_rows: Sequence[Sequence[int]]) -> list[int]:
    """Returns [index, start, stop] of each range, flattened, for the registered ops."""
    triples: list[int] = []
    for index, rows in enumerate(train_rows):
        for start, stop in zip(rows[::2], rows[1::2], strict=True):
            triples += (index, start, stop)
    return triples


def _rows(count: int, triples: Sequence[int]) -> list[list[int]]:
    """Returns the ranges [start, stop, ...] of each of `count` projections."""
    rows: list[list[int]] = [[] for _ in range(count)]
    for at in range(0, len(triples), 3):
        rows[triples[at]] += triples[at + 1 : at + 3]
    return rows


def _run_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    mixture: Tensor,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    row_adapter: Sequence[Tensor],
    row_scale: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    train_rows: Sequence[int],
    needs_x: bool,
    needs_mixture: bool,
    grad_through_frozen: bool,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Calls `mixed_lora_bwd` of the backend: dx, d_mixture, d_a and d_b of each projection."""
    projections = _projections(len(dys), weights, (), lora_a, lora_b, row_adapter, row_scale)
    ran = dispatch.resolve(_OP, x.device, backend, x.dtype)
    through = dispatch.backward(_OP, ran)
    kernels = dispatch.kernels(_OP, through)
    if through != ran and any(h is not None for h in hs):
        # A backend without a backward keeps no h: the other one computes its own, and no y.
        ranks = [p._replace(weight=None, bias=None, lora_b=p.lora_b[:, :1]) for p in projections]
        hs = [h for _, h in guarded(kernels.mixed_lora_fwd, x)(x, mixture, ranks)]
    dx, d_mixture, factors = guarded(kernels.mixed_lora_bwd, x)(
        dys, x, mixture, projections, hs, _rows(len(dys), train_rows),
        needs_x, needs_mixture, grad_through_frozen,
    )  # fmt: skip
    return dx, d_mixture, [d_a for d_a, _ in factors], [d_b for _, d_b in factors]


@torch.library.custom_op("sapt_fast::mixed_lora_fwd", mutates_args=())
def _forward_op(
    x: Tensor,
    mixture: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    row_adapter: Sequence[Tensor],
    row_scale: Sequence[Tensor],
    train_a: Sequence[Tensor],
    train_b: Sequence[Tensor],
    train_rows: Sequence[int],
    grad_through_frozen: bool,
    backend: str,
) -> list[Tensor]:
    """Returns y of each projection, then h of each; `train_rows` are triples, see `_triples`."""
    transforms.require_no_tangents(_OP)
    projections = _projections(len(lora_a), weights, biases, lora_a, lora_b, row_adapter, row_scale)
    results = kernel(_OP, "mixed_lora_fwd", backend, x)(x, mixture, projections)
    return [y for y, _ in results] + [h for _, h in results]


@torch.library.custom_op("sapt_fast::mixed_lora_bwd", mutates_args=())
def _backward_op(
    dys: Sequence[Tensor],
    x: Tensor,
    mixture: Tensor,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    row_adapter: Sequence[Tensor],
    row_scale: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    train_rows: Sequence[int],
    needs_x: bool,
    needs_mixture: bool,
    grad_through_frozen: bool,
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Calls `_run_backward`; returns empty tensors instead of None."""
    dx, d_mixture, d_a, d_b = _run_backward(
        dys, x, mixture, weights, lora_a, lora_b, row_adapter, row_scale, hs, train_rows,
        needs_x, needs_mixture, grad_through_frozen, backend,
    )  # fmt: skip

    def filled(t: Tensor | None) -> Tensor:
        return x.new_empty(0) if t is None else t

    return filled(dx), filled(d_mixture), [*map(filled, d_a)], [*map(filled, d_b)]


@_forward_op.register_fake
def _forward_fake(
    x: Tensor,
    mixture: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    *others: Any,
) -> list[Tensor]:
    empty_h = kernel(_OP, "empty_h", others[-1], x)
    ys = [x.new_empty(x.shape[0], b.shape[1]) for b in lora_b]
    return ys + [empty_h(x, a.shape[0]) for a in lora_a]


@_backward_op.register_fake
def _backward_fake(
    dys: Sequence[Tensor],
    x: Tensor,
    mixture: Tensor,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    row_adapter: Sequence[Tensor],
    row_scale: Sequence[Tensor],
    hs: Sequence[Tensor | None],
    train_rows: Sequence[int],
    needs_x: bool,
    needs_mixture: bool,
    *others: Any,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    def trained(stack: Tensor, index: int) -> Tensor:
        spans = _rows(len(lora_a), train_rows)[index]
        rows = sum(spans[1::2]) - sum(spans[::2])
        return stack.new_empty(rows, stack.shape[1]) if rows else x.new_empty(0)

    return (
        x.new_empty(x.shape) if needs_x else x.new_empty(0),
        mixture.new_empty(mixture.shape) if needs_mixture else x.new_empty(0),
        [trained(a, i) for i, a in enumerate(lora_a)],
        [trained(b, i) for i, b in enumerate(lora_b)],
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hs = output[len(output) // 2 :]
    ctx.mark_non_differentiable(*hs)
    _keep(ctx, inputs, hs)


def _keep(ctx: Any, inputs: tuple[Any, ...], made: Sequence[Tensor]) -> None:
    """Keeps for the backward what the op was given, and each h that it made."""
    (x, mixture, weights, biases, lora_a, lora_b, row_adapter, row_scale, train_a, train_b,
     train_rows, grad_through_frozen, backend) = inputs  # fmt: skip
    ctx.count = len(lora_a)
    ctx.weights = len(weights)
    ctx.set_materialize_grads(False)
    ctx.needs_a = [t.requires_grad for t in train_a]
    ctx.needs_b = [t.requires_grad for t in train_b]
    ctx.needs_x, ctx.needs_mixture = x.requires_grad, mixture.requires_grad
    ctx.needs_weight = [w.requires_grad for w in weights]
    ctx.needs_bias = [b.requires_grad for b in biases]
    ctx.train_rows, ctx.grad_through_frozen, ctx.backend = train_rows, grad_through_frozen, backend
    owners = train_rows[::3]
    hs = [h if ctx.needs_mixture or i in owners else None for i, h in enumerate(made)]
    # The last two share lora_a's and lora_b's memory; saving them detects later writes.
    ctx.save_for_backward(
        x, mixture, *weights, *lora_a, *lora_b, *row_adapter, *row_scale, *hs, *train_a, *train_b
    )


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    return _gradients(ctx, grads, _backward_op)


def _gradients(
    ctx: Any, grads: Sequence[Tensor | None], run: Callable[..., Any]
) -> tuple[Any, ...]:
    """Returns a gradient for each argument of the op; `run` calls `_run_backward`."""
    if transforms.differentiates_backward(*grads):
        return _differentiable_backward(ctx, grads)
    # Projections on which the loss does not depend have no dy and are left out.
    dys = {i: dy for i, dy in enumerate(grads[: ctx.count]) if dy is not None}
    x, mixture, *saved = ctx.saved_tensors
    weights = saved[: ctx.weights]
    fields = [weights, *_chunks(saved[ctx.weights :], ctx.count)[:5]]
    dx = d_mixture = None
    d_a: dict[int, Tensor] = {}
    d_b: dict[int, Tensor] = {}
    if dys:
        every = _rows(ctx.count, ctx.train_rows)
        rows = _triples([every[i] for i in dys])
        dx, d_mixture, *factors = run(
            list(dys.values()), x, mixture, *([f[i] for i in dys] if f else [] for f in fields),
            rows, ctx.needs_x, ctx.needs_mixture, ctx.grad_through_frozen, ctx.backend,
        )  # fmt: skip
        d_a, d_b = (dict(zip(dys, grad, strict=True)) for grad in factors)
    nothing = [None] * ctx.count
    return (
        dx if ctx.needs_x else None,
        d_mixture if ctx.needs_mixture else None,
        [
            _weight_grad(dys[i], x) if needed and i in dys else None
            for i, needed in enumerate(ctx.needs_weight)
        ],
        [dys[i].sum(0) if needed and i in dys else None for i, needed in enumerate(ctx.needs_bias)],
        nothing,
        nothing,
        nothing,
        nothing,
        _by_range(d_a, ctx.train_rows, ctx.needs_a),
        _by_range(d_b, ctx.train_rows, ctx.needs_b),
        # An empty list of ints counts as a list of tensors, whose gradient is a list.
        None if ctx.train_rows else [],
        None,
        None,
    )


def _differentiable_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Returns the gradients of the plain formula, for a second derivative or under vmap."""
    count, dys = ctx.count, grads[: ctx.count]
    x, mixture, *saved = ctx.saved_tensors
    weights, saved = saved[: ctx.weights], saved[ctx.weights :]
    stacks, trained = _chunks(saved[: 4 * count], count), saved[5 * count :]
    sizes = len(weights), len(ctx.needs_a), len(ctx.needs_b)

    def formula(x: Tensor, mixture: Tensor, *others: Tensor) -> list[Tensor]:
        own, train_a, train_b = _split(others, sizes)
        computed, rows = _projections(count, own, (), *stacks), _rows(count, ctx.train_rows)
        pooled = [
            PooledProjection(
                projection,
                _of_projection(i, train_a, ctx.train_rows),
                _of_projection(i, train_b, ctx.train_rows),
                rows[i],
            )
            for i, projection in enumerate(computed)
        ]
        return formulas.mixed_lora(x, mixture, computed, pooled, ctx.grad_through_frozen)

    needs = [ctx.needs_x, ctx.needs_mixture, *ctx.needs_weight, *ctx.needs_a, *ctx.needs_b]
    dx, d_mixture, *found = transforms.gradients(
        formula, [x, mixture, *weights, *trained], needs, dys
    )
    d_weights, d_a, d_b = _split(found, sizes)
    d_biases = [
        dy.sum(0) if needed and dy is not None else None
        for needed, dy in zip(ctx.needs_bias, dys, strict=False)
    ]
    nothing = [None] * count
    return (
        dx, d_mixture, d_weights, d_biases, nothing, nothing, nothing, nothing, d_a, d_b,
        None if ctx.train_rows else [], None, None,
    )  # fmt: skip


def _of_projection(index: int, values: Sequence[Tensor], triples: Sequence[int]) -> list[Tensor]:
    """Returns the values of the trained ranges that belong to one projection."""
    return [v for v, owner in zip(values, triples[::3], strict=True) if owner == index]


def _split(values: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """Splits values into consecutive parts of the given sizes."""
    stops = [*accumulate(sizes)]
    return [[*values[stop - size : stop]] for size, stop in zip(sizes, stops, strict=True)]


def _chunks(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def _weight_grad(dy: Tensor, x: Tensor) -> Tensor:
    with without_autocast(x.device):
        return dy.t() @ x


def _by_range(
    grads: dict[int, Tensor], train_rows: Sequence[int], needed: list[bool]
) -> list[Tensor | None]:
    """Returns the gradient of each range of rows, which is a separate input."""
    parts: list[Tensor | None] = []
    done: dict[int, int] = {}
    triples = _chunks(train_rows, 3)
    for (owner, start, stop), need in zip(triples, needed, strict=True):
        first = done.get(owner, 0)
        done[owner] = last = first + stop - start
        grad = grads.get(owner) if need else None
        if grad is not None and grad.shape[0] != stop - start:
            grad = grad[first:last]
        parts.append(grad)
    return parts


_forward_op.register_autograd(_backward, setup_context=_setup_context)
