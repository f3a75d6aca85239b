"""Op `mixed_lora` in eager mode: an autograd Function over the same kernels and gradients.

Torch calls a registered op through layers that cost more than the kernels of a small layer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sapt_fast import dispatch
from sapt_fast.ops import transforms
from sapt_fast.ops._common import guarded
from sapt_fast.ops._dropout import Dropout, as_argument
from sapt_fast.ops._mixed_lora_backward import (
    OP,
    bias_grads,
    formula_gradients,
    kernel_gradients,
    weight_grads,
)
from sapt_fast.ops.projection import PooledProjection, Projection

_PLAIN_OR_NONE = transforms.PLAIN | {type(None)}


class _Options(NamedTuple):
    """What the backward needs besides tensors that autograd saves.

    Attributes:
        tables: row_adapter and row_scale of each projection.
        rows: the ranges [start, stop, ...] of each projection that train.
        weights, biases: how many there are.
        biases_have_rows: whether they are [M, O].
        grad_through_frozen: as in `ops.mixed_lora_linear`.
        ran: the backend.
        drops: of `Dropout`; 0 without seeds.
    """

    tables: list[tuple[Tensor, Tensor]]
    rows: list[list[int]]
    weights: int
    biases: int
    biases_have_rows: bool
    grad_through_frozen: bool
    ran: str
    drops: int


def is_eager(*tensors: Tensor | None) -> bool:
    """Returns whether autograd alone must see the op: no graph, mode or kind of tensor."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and _PLAIN_OR_NONE.issuperset(map(type, tensors))
    )


def apply(
    x: Tensor,
    mixture: Tensor,
    computed: Sequence[Projection],
    pooled: Sequence[PooledProjection],
    grad_through_frozen: bool,
    backend: str | None,
    dropout: Dropout | None = None,
) -> list[Tensor]:
    """Computes y [M, O] of each projection; arguments as of `_mixed_lora_ops.differentiable`."""
    weights = [p.weight for p in computed if p.weight is not None]
    biases = [p.bias for p in computed if p.bias is not None]
    train_a = [t for given in pooled for t in given.train_a]
    train_b = [t for given in pooled for t in given.train_b]
    options = _Options(
        [p[4:] for p in computed],
        [given.train_rows for given in pooled],
        len(weights),
        len(biases),
        biases != [] and biases[0].dim() == 2,
        grad_through_frozen,
        dispatch.resolve(
            OP, x.device, backend, x.dtype, feature=None if dropout is None else "dropout"
        ),
        0 if dropout is None else dropout.drops,
    )
    seeds = () if dropout is None else dropout.seeds
    leaves = *seeds, *weights, *train_a, *train_b, *biases
    return [*_Function.apply(options, computed, x, mixture, *leaves)]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        options: _Options,
        computed: Sequence[Projection],
        x: Tensor,
        mixture: Tensor,
        *leaves: Tensor,
    ) -> tuple[Tensor, ...]:
        """Computes y of each projection.

        Args:
            leaves: the seeds of the dropout, the weights, the rows that train of each A, of each
                B, and the biases.
        """
        seeds = leaves[: len(computed)] if options.drops else ()
        dropped = as_argument(Dropout(options.drops, seeds) if seeds else None)
        forward = guarded(dispatch.kernels(OP, options.ran).mixed_lora_fwd, x)
        # h is for the gradients of the mixture and of the rows that train.
        needs_mixture = ctx.needs_input_grad[3]
        keeps = [needs_mixture or len(rows) > 0 for rows in options.rows]
        results = forward(x, mixture, computed, True in keeps, *dropped)
        hs = [h if keep else None for (_, h), keep in zip(results, keeps, strict=True)]
        ctx.options = options
        ctx.set_materialize_grads(False)
        # The rows that train share the stacks' memory; saving them detects later writes.
        stacks = [p.lora_a for p in computed] + [p.lora_b for p in computed]
        saved = leaves[: len(leaves) - options.biases]
        ctx.save_for_backward(x, mixture, *saved, *stacks, *hs)
        return tuple([y for y, _ in results])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Returns a gradient for each argument of `forward`."""
        tables, rows, weights, biases, have_rows, through, ran, drops = ctx.options
        count = len(tables)
        seeded = count if drops else 0
        x, mixture, *saved = ctx.saved_tensors
        needs_x, needs_mixture, *needs = ctx.needs_input_grad[2:]
        dropout = Dropout(drops, saved[:seeded]) if drops else None
        saved, needs = saved[seeded:], needs[seeded:]
        own, a, b = saved[:weights], saved[-3 * count : -2 * count], saved[-2 * count : -count]
        projections = [
            Projection(own[i] if own else None, None, a[i], b[i], *tables[i]) for i in range(count)
        ]
        d_weights: Sequence[Tensor | None]
        if transforms.differentiates_backward(*grads):
            trained = saved[weights : -3 * count]
            wanted = needs_x, needs_mixture, *needs[: weights + len(trained)]
            half = len(trained) // 2
            dx, d_mixture, d_weights, d_a, d_b = formula_gradients(
                grads, x, mixture, projections, trained[:half], trained[half:], rows, wanted,
                through, dropout,
            )  # fmt: skip
        else:
            dx, d_mixture, d_a, d_b = kernel_gradients(
                grads, x, mixture, projections, saved[-count:], rows,
                (needs_x, needs_mixture, through), ran, dropout,
            )  # fmt: skip
            d_weights = weight_grads(grads, x, needs[:weights])
        d_biases = bias_grads(grads, needs[len(needs) - biases :], have_rows)
        nothing = [None] * seeded
        return None, None, dx, d_mixture, *nothing, *d_weights, *d_a, *d_b, *d_biases
