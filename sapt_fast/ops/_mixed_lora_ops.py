"""Op `mixed_lora` registered with torch, with fake kernels and its autograd formula.

A registered op takes tensors, numbers and lists of them. So projections are passed as one list per
field, and the rows that train as triples (index of the projection, start, stop) in one list.

Eager calls on plain tensors take `_mixed_lora_eager` instead, which costs less time on the host.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sapt_fast import dispatch
from sapt_fast.ops import _mixed_lora_eager, transforms
from sapt_fast.ops._common import kernel
from sapt_fast.ops._dropout import Dropout, as_argument
from sapt_fast.ops._mixed_lora_backward import (
    OP,
    bias_grads,
    flattened,
    formula_gradients,
    kernel_gradients,
    run_backward,
    split,
    weight_grads,
)
from sapt_fast.ops.projection import PooledProjection, Projection


def differentiable(
    x: Tensor,
    mixture: Tensor,
    computed: Sequence[Projection],
    pooled: Sequence[PooledProjection],
    grad_through_frozen: bool,
    backend: str | None,
    dropout: Dropout | None = None,
) -> list[Tensor]:
    """Computes y [M, O] of each projection, by the registered op unless the call is eager.

    Args:
        x: [M, I].
        mixture: [S, K].
        computed: the projections, in the dtypes of the product.
        pooled: the rows of each projection that train.
        grad_through_frozen, backend: as in `ops.mixed_lora_linear`.
        dropout: with a seed for each projection; None for none.
    """
    seeds = [] if dropout is None else [*dropout.seeds]
    tensors: list[Tensor | None] = [x, mixture, *seeds]
    for given, own in zip(pooled, computed, strict=True):
        tensors += [*own, *given.train_a, *given.train_b]
    if _mixed_lora_eager.is_eager(*tensors):
        return _mixed_lora_eager.apply(
            x, mixture, computed, pooled, grad_through_frozen, backend, dropout
        )
    train_a = [t for given in pooled for t in given.train_a]
    train_b = [t for given in pooled for t in given.train_b]
    rows = _triples([given.train_rows for given in pooled])
    drops = 0 if dropout is None else dropout.drops
    options = rows, grad_through_frozen, seeds, drops, backend or ""
    fields = flattened(computed)
    return _forward_op(x, mixture, *fields, train_a, train_b, *options)[: len(pooled)]


def _projections(count: int, *fields: Sequence[Tensor]) -> list[Projection]:
    """Returns the inverse of `flattened`."""
    filled: list[Sequence[Any]] = [field or [None] * count for field in fields]
    return [Projection(*values) for values in zip(*filled, strict=True)]


def _triples(train_rows: Sequence[Sequence[int]]) -> list[int]:
    """Returns [index, start, stop] of each range, flattened, for the registered ops."""
    triples: list[int] = []
    for index, rows in enumerate(train_rows):
        for start, stop in zip(rows[::2], rows[1::2], strict=True):
            triples += (index, start, stop)
    return triples


def _dropout(drops: int, seeds: Sequence[Tensor]) -> Dropout | None:
    return Dropout(drops, seeds) if drops else None


def _feature(drops: int) -> str | None:
    """Returns what the kernels must have besides."""
    return "dropout" if drops else None


def _rows(count: int, triples: Sequence[int]) -> list[list[int]]:
    """Returns the ranges [start, stop, ...] of each of `count` projections."""
    rows: list[list[int]] = [[] for _ in range(count)]
    for at in range(0, len(triples), 3):
        rows[triples[at]] += triples[at + 1 : at + 3]
    return rows


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
    seeds: Sequence[Tensor],
    drops: int,
    backend: str,
) -> list[Tensor]:
    """Returns y of each projection, then h of each; `train_rows` are triples, see `_triples`."""
    transforms.require_no_tangents(OP)
    projections = _projections(len(lora_a), weights, biases, lora_a, lora_b, row_adapter, row_scale)
    forward = kernel(OP, "mixed_lora_fwd", backend, x, feature=_feature(drops))
    results = forward(x, mixture, projections, True, *as_argument(_dropout(drops, seeds)))
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
    seeds: Sequence[Tensor],
    drops: int,
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Calls `run_backward`; returns empty tensors instead of None."""
    count = len(dys)
    projections = _projections(count, weights, (), lora_a, lora_b, row_adapter, row_scale)
    dx, d_mixture, d_a, d_b = run_backward(
        dys, x, mixture, projections, hs, _rows(count, train_rows),
        (needs_x, needs_mixture, grad_through_frozen),
        dispatch.resolve(OP, x.device, backend, x.dtype, feature=_feature(drops)),
        _dropout(drops, seeds),
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
    empty_h = kernel(OP, "empty_h", others[-1], x)
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
    """Keeps for the backward what the op was given, and each h that it made."""
    (x, mixture, weights, biases, lora_a, lora_b, row_adapter, row_scale, train_a, train_b,
     train_rows, grad_through_frozen, seeds, drops, backend) = inputs  # fmt: skip
    count = len(lora_a)
    made = output[count:]
    ctx.mark_non_differentiable(*made)
    ctx.set_materialize_grads(False)
    ctx.rows = _rows(count, train_rows)
    ctx.grad_through_frozen, ctx.drops, ctx.backend = grad_through_frozen, drops, backend
    given = [x, mixture], weights, train_a, train_b, biases
    ctx.needs = [[t.requires_grad for t in tensors] for tensors in given]
    ctx.biases_have_rows = any(bias.dim() == 2 for bias in biases)
    needs_mixture = mixture.requires_grad
    hs = [h if needs_mixture or rows else None for h, rows in zip(made, ctx.rows, strict=True)]
    # The last two share lora_a's and lora_b's memory; saving them detects later writes.
    fields = weights, lora_a, lora_b, row_adapter, row_scale, hs, train_a, train_b, seeds
    ctx.sizes = [len(field) for field in fields]
    ctx.save_for_backward(x, mixture, *chain(*fields))


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Returns a gradient for each argument of the op."""
    x, mixture, *saved = ctx.saved_tensors
    weights, *stacks, hs, train_a, train_b, seeds = split(saved, ctx.sizes)
    dropout = _dropout(ctx.drops, seeds)
    count, rows, through = len(ctx.rows), ctx.rows, ctx.grad_through_frozen
    dys, projections = grads[:count], _projections(count, weights, (), *stacks)
    (needs_x, needs_mixture), needs_weight, needs_a, needs_b, needs_bias = ctx.needs
    d_weights: Sequence[Tensor | None]
    if transforms.differentiates_backward(*dys):
        needs = needs_x, needs_mixture, *needs_weight, *needs_a, *needs_b
        dx, d_mixture, d_weights, d_a, d_b = formula_gradients(
            dys, x, mixture, projections, train_a, train_b, rows, needs, through, dropout
        )
    else:
        dx, d_mixture, d_a, d_b = kernel_gradients(
            dys, x, mixture, projections, hs, rows, (needs_x, needs_mixture, through), ctx.backend,
            dropout, _run_op,
        )  # fmt: skip
        d_weights = weight_grads(dys, x, needs_weight)
    nothing = [None] * count
    return (
        dx if needs_x else None,
        d_mixture if needs_mixture else None,
        d_weights,
        bias_grads(dys, needs_bias, ctx.biases_have_rows),
        *[nothing] * 4,
        [d if need else None for d, need in zip(d_a, needs_a, strict=True)],
        [d if need else None for d, need in zip(d_b, needs_b, strict=True)],
        # An empty list of ints counts as a list of tensors, whose gradient is a list.
        None if needs_a else [],
        None,
        [None] * len(seeds),
        None,
        None,
    )


def _run_op(
    dys: Sequence[Tensor],
    x: Tensor,
    mixture: Tensor,
    projections: Sequence[Projection],
    hs: Sequence[Tensor | None],
    rows: Sequence[list[int]],
    needs: tuple[bool, bool, bool],
    backend: str,
    dropout: Dropout | None,
) -> Any:
    """Calls the registered backward with the arguments of `run_backward`."""
    weights, _, *stacks = flattened(projections)
    drops, seeds = (0, []) if dropout is None else (dropout.drops, [*dropout.seeds])
    options = *needs, seeds, drops, backend
    return _backward_op(dys, x, mixture, weights, *stacks, hs, _triples(rows), *options)


_forward_op.register_autograd(_backward, setup_context=_setup_context)
