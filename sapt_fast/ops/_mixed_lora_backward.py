"""The gradients of op `mixed_lora`, for eager calls and for the registered op alike."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from types import ModuleType
from typing import Any

from torch import Tensor

from sapt_fast import dispatch
from sapt_fast.ops import formulas, transforms
from sapt_fast.ops._common import guarded, without_autocast
from sapt_fast.ops._dropout import Dropout, as_argument
from sapt_fast.ops.projection import PooledProjection, Projection

OP = "mixed_lora"

Gradients = list[Tensor | None]
Found = tuple[Tensor | None, Tensor | None, Gradients, Gradients]


def kernel_gradients(
    dys: Sequence[Tensor | None],
    x: Tensor,
    mixture: Tensor,
    projections: Sequence[Projection],
    hs: Sequence[Tensor | None],
    rows: Sequence[list[int]],
    needs: tuple[bool, bool, bool],
    ran: str,
    dropout: Dropout | None = None,
    run: Callable[..., Found] | None = None,
) -> tuple[Tensor | None, Tensor | None, Gradients, Gradients]:
    """Computes the gradients by the kernels of a backend.

    Args:
        dys: as of `ops.mixed_lora.mixed_lora_bwd`; None if the loss does not depend on it.
        x, mixture, projections, hs: as there.
        rows: the ranges [start, stop, ...] of each projection that train.
        needs: needs_x, needs_mixture and grad_through_frozen.
        ran: the backend that computed the forward.
        dropout: that of the forward.
        run: takes the same arguments in the place of `run_backward`.

    Returns:
        dx, d_mixture, and the gradients of the rows that train, of each range of each projection.
    """
    run = run or run_backward
    present = [dy for dy in dys if dy is not None]
    if len(present) == len(dys):
        dx, d_mixture, d_a, d_b = run(
            present, x, mixture, projections, hs, rows, needs, ran, dropout
        )
        return dx, d_mixture, _by_range(d_a, rows), _by_range(d_b, rows)
    dx = d_mixture = None
    all_a: Gradients = [None] * len(dys)
    all_b = [*all_a]
    if present:
        chosen = [i for i, dy in enumerate(dys) if dy is not None]
        dx, d_mixture, d_a, d_b = run(
            present, x, mixture, [projections[i] for i in chosen], [hs[i] for i in chosen],
            [rows[i] for i in chosen], needs, ran, None if dropout is None else dropout.of(chosen),
        )  # fmt: skip
        for i, own_a, own_b in zip(chosen, d_a, d_b, strict=True):
            all_a[i], all_b[i] = own_a, own_b
    return dx, d_mixture, _by_range(all_a, rows), _by_range(all_b, rows)


def run_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    mixture: Tensor,
    projections: Sequence[Projection],
    hs: Sequence[Tensor | None],
    rows: Sequence[list[int]],
    needs: tuple[bool, bool, bool],
    ran: str,
    dropout: Dropout | None = None,
) -> Found:
    """Calls `mixed_lora_bwd`; returns dx, d_mixture, and d_a and d_b of each projection.

    Arguments as of `kernel_gradients`, all with a dy.
    """
    through, kernels = _backward_of(ran)
    if through != ran and any(h is not None for h in hs):
        # A backend without a backward keeps no h: the other one computes its own, and no y.
        ranks = [p._replace(weight=None, bias=None, lora_b=p.lora_b[:, :1]) for p in projections]
        forward = guarded(kernels.mixed_lora_fwd, x)
        hs = [h for _, h in forward(x, mixture, ranks, True, *as_argument(dropout))]
    dx, d_mixture, factors = guarded(kernels.mixed_lora_bwd, x)(
        dys, x, mixture, projections, hs, rows, *needs, *as_argument(dropout)
    )
    return dx, d_mixture, [d_a for d_a, _ in factors], [d_b for _, d_b in factors]


@cache
def _backward_of(ran: str) -> tuple[str, ModuleType]:
    """Returns the backend that computes the gradients for another, and its kernels."""
    through = dispatch.backward(OP, ran)
    return through, dispatch.kernels(OP, through)


def formula_gradients(
    dys: Sequence[Tensor | None],
    x: Tensor,
    mixture: Tensor,
    projections: Sequence[Projection],
    train_a: Sequence[Tensor],
    train_b: Sequence[Tensor],
    rows: Sequence[list[int]],
    needs: Sequence[bool],
    grad_through_frozen: bool,
    dropout: Dropout | None = None,
) -> tuple[Tensor | None, Tensor | None, Gradients, Gradients, Gradients]:
    """Computes the gradients of the plain formula, for a second derivative or under vmap.

    Args:
        dys, x, mixture, projections, rows: as of `kernel_gradients`.
        train_a, train_b: the rows that train, of all projections.
        needs: whether to compute the gradient of x, of the mixture, of each weight, and of each of
            train_a and train_b.
        grad_through_frozen: as in `ops.mixed_lora_linear`.
        dropout: that of the forward.

    Returns:
        The gradients of x, the mixture, the weights, train_a and train_b.
    """
    weights = [p.weight for p in projections if p.weight is not None]
    sizes = len(weights), len(train_a), len(train_b)

    def formula(x: Tensor, mixture: Tensor, *others: Tensor) -> list[Tensor]:
        own, given_a, given_b = split(others, sizes)
        pooled, at = [], 0
        for i, (projection, spans) in enumerate(zip(projections, rows, strict=True)):
            stop = at + len(spans) // 2
            base = projection._replace(weight=own[i] if own else None)
            pooled.append(PooledProjection(base, given_a[at:stop], given_b[at:stop], spans))
            at = stop
        computed = [each.projection for each in pooled]
        return formulas.mixed_lora(x, mixture, computed, pooled, grad_through_frozen, dropout)

    inputs = [x, mixture, *weights, *train_a, *train_b]
    dx, d_mixture, *found = transforms.gradients(formula, inputs, needs, dys)
    d_weights, d_a, d_b = split(found, sizes)
    return dx, d_mixture, d_weights, d_a, d_b


def split(values: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """Splits values into consecutive parts of the given sizes."""
    stops = [*accumulate(sizes)]
    return [[*values[stop - size : stop]] for size, stop in zip(sizes, stops, strict=True)]


def weight_grads(dys: Sequence[Tensor | None], x: Tensor, needs: Sequence[bool]) -> Gradients:
    """Returns the gradient [O, I] of each weight; None if it is not needed, or without dy."""
    if True not in needs:
        return [None] * len(needs)
    with without_autocast(x.device):
        return [
            dy.t() @ x if need and dy is not None else None
            for dy, need in zip(dys, needs, strict=True)
        ]


def bias_grads(dys: Sequence[Tensor | None], needs: Sequence[bool], have_rows: bool) -> Gradients:
    """Returns the gradient [O] of each bias; None if it is not needed, or without dy.

    With `have_rows` biases and gradients are [M, O].
    """
    return [
        None if dy is None or not need else dy if have_rows else dy.sum(0)
        for dy, need in zip(dys, needs, strict=False)
    ]


def flattened(projections: Sequence[Projection]) -> list[list[Any]]:
    """Returns one list per field, empty if the field is None."""
    fields = zip(*projections, strict=True)
    return [[t for t in field if t is not None] for field in fields]


def _by_range(grads: Sequence[Tensor | None], rows: Sequence[list[int]]) -> Gradients:
    """Returns the gradient of each range of rows, which is a separate input."""
    parts: Gradients = []
    for grad, spans in zip(grads, rows, strict=True):
        if grad is None or len(spans) == 2:
            parts += [grad] * (len(spans) // 2)
        elif spans:
            starts, stops = spans[::2], spans[1::2]
            parts += grad.split([j - i for i, j in zip(starts, stops, strict=True)])
    return parts
