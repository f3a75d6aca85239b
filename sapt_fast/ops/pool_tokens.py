"""Pooling of a batch's input embeddings over the sequence, the input of the router."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sapt_fast import dispatch
from sapt_fast.ops import formulas, transforms
from sapt_fast.ops._common import require_ids_of_table, require_tensors
from sapt_fast.ops._scalars import require_float

_OP = "pool_tokens"
DISPATCH = dispatch.Op()
POOLINGS = ("max", "mean")
# Number of elements of gathered embeddings that the reference stores at once.
_GATHER_CHUNK = 1 << 22


def pool_tokens(
    input_ids: Tensor,
    table: Tensor,
    *,
    mask: Tensor | None = None,
    pooling: str = "max",
    backend: str | None = None,
) -> Tensor:
    """Pools the embeddings of token ids over the sequence, without storing B x T x D numbers.

    Args:
        input_ids: [B, T] int64 or int32, each in [0, V). For others, the Triton kernel returns
            NaN; on a CPU they raise an error.
        table: [V, D], the embedding matrix; differentiable. float32, float16 or bfloat16, on a CPU
            also float64.
        mask: [B, T], zero for tokens that are not pooled; None for no such tokens. A row without
            any token is pooled to zeros.
        pooling: "max" or "mean". A NaN at any position is the maximum. The gradient of a maximum
            goes to the first token that has it (of several NaNs, the first).
        backend: as in `dispatch.resolve`.

    Returns:
        [B, D] in table's dtype.

    Raises:
        ValueError, TypeError: if a shape, dtype, device or `pooling` does not fit.
        dispatch.BackendError: if the named backend cannot run here, or does not support float64.

    Example:
        >>> import torch
        >>> from sapt_fast.ops import pool_tokens
        >>> table = torch.tensor([[9.0, 9.0], [1.0, 4.0], [3.0, 2.0]])
        >>> ids, mask = torch.tensor([[1, 2, 0]]), torch.tensor([[1, 1, 0]])
        >>> pool_tokens(ids, table, mask=mask, pooling="max")
        tensor([[3., 4.]])
        >>> pool_tokens(ids, table, mask=mask, pooling="mean")
        tensor([[2., 3.]])
    """
    require_tensors(input_ids=input_ids, table=table, mask=mask)
    require_ids_of_table(input_ids, table)
    require_float("table", table)
    _check_pooling(pooling, mask, input_ids.shape)
    check_devices(table, input_ids=input_ids, mask=mask)
    check_ids(input_ids, table.shape[0], mask)
    chosen = dispatch.resolve(_OP, table.device, backend, table.dtype)
    if transforms.active():
        return formulas.pool_tokens(input_ids, table, mask, pooling)
    trains = table.requires_grad and torch.is_grad_enabled()
    compiling = torch.compiler.is_compiling()
    if chosen == "reference":
        if trains and not compiling and input_ids.numel():
            return _ReferencePool.apply(table, input_ids, mask, pooling)
        return pool_tokens_fwd(input_ids, table, mask, pooling)
    if trains or compiling:
        keep_winner = trains and pooling == "max"
        return _pool_op(input_ids, table, mask, pooling, keep_winner, chosen)[0]
    return dispatch.kernels(_OP, chosen).pool_tokens_fwd(input_ids, table, mask, pooling)[0]


def pool_embeds(embeds: Tensor, *, mask: Tensor | None = None, pooling: str = "max") -> Tensor:
    """Pools embeddings [B, T, D] over the sequence to [B, D]; otherwise as `pool_tokens`."""
    require_tensors(embeds=embeds, mask=mask)
    if embeds.dim() != 3:
        raise ValueError(f"embeds: got shape {tuple(embeds.shape)}, expected [B, T, D]")
    require_float("embeds", embeds)
    _check_pooling(pooling, mask, embeds.shape[:2])
    check_devices(embeds, mask=mask)
    if embeds.shape[1] == 0:
        return embeds.sum(1)
    if mask is None:
        return embeds.max(1).values if pooling == "max" else embeds.mean(1)
    keep = (mask != 0).unsqueeze(-1)
    if pooling == "mean":
        total = embeds.masked_fill(~keep, 0.0).sum(
            1, dtype=torch.promote_types(embeds.dtype, torch.float32)
        )
        return (total / keep.sum(1).clamp(min=1)).to(embeds.dtype)
    pooled = embeds.masked_fill(~keep, float("-inf")).max(1).values
    return torch.where(keep.any(1), pooled, 0.0)


def check_devices(reference: Tensor, **named: Tensor | None) -> None:
    """Raises ValueError if a named tensor is on another device than the first."""
    for name, tensor in named.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected {reference.device}")


def check_ids(input_ids: Tensor, rows: int, mask: Tensor | None = None) -> None:
    """Raises ValueError if a pooled id is not in [0, rows); checked only on the CPU."""
    known = transforms.values(input_ids) if input_ids.device.type == "cpu" else None
    if known is None or known.numel() == 0:
        return
    least, most = (int(v) for v in known.aminmax())
    if least >= 0 and most < rows:
        return
    kept = None if mask is None else transforms.values(mask)
    outside = (known < 0) | (known >= rows)
    if kept is None or kept.shape != known.shape or bool((outside & (kept != 0)).any()):
        raise ValueError(f"input_ids: got values from {least} to {most}, expected 0 to {rows - 1}")


def _check_pooling(pooling: str, mask: Tensor | None, shape: torch.Size) -> None:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: got {pooling!r}, expected one of {POOLINGS}")
    if mask is not None and mask.shape != shape:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected {tuple(shape)}")


# --- reference ---------------------------------------------------------------------------------


def pool_tokens_fwd(input_ids: Tensor, table: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """Computes `pool_embeds(table[input_ids])`, a few samples at a time; the mean by bags."""
    if input_ids.numel() == 0:
        return table.new_zeros(input_ids.shape[0], table.shape[1])
    keep = None if mask is None else mask != 0
    if pooling == "max":
        return _maximum(input_ids, table, keep)
    if keep is None:
        return F.embedding_bag(input_ids, table, mode="mean")
    share = keep.to(table.dtype) / keep.sum(1, keepdim=True).clamp(min=1).to(table.dtype)
    # A masked position repeats a pooled token, so that NaNs of masked tokens are not read.
    kept_id = input_ids.gather(1, keep.to(torch.uint8).argmax(1, keepdim=True))
    ids = torch.where(keep, input_ids, kept_id)
    pooled = F.embedding_bag(ids, table, mode="sum", per_sample_weights=share)
    return torch.where(keep.any(1, keepdim=True), pooled, 0.0)


def _maximum(input_ids: Tensor, table: Tensor, keep: Tensor | None) -> Tensor:
    """Returns the maximum [B, D] by `torch.max`: NaN is the largest, the first of equals wins."""
    samples, tokens = input_ids.shape
    step = samples
    if not torch.compiler.is_compiling():
        step = max(1, _GATHER_CHUNK // max(1, tokens * table.shape[1]))
    pooled = []
    for start in range(0, samples, step):
        rows = slice(start, start + step)
        if keep is None:
            pooled.append(F.embedding(input_ids[rows], table).max(1).values)
            continue
        kept = keep[rows]
        # Ids of masked tokens may be anything.
        ids = input_ids[rows].masked_fill(~kept, 0)
        embeds = F.embedding(ids, table).masked_fill(~kept.unsqueeze(-1), float("-inf"))
        some = kept.any(1, keepdim=True)
        pooled.append(torch.where(some, embeds.max(1).values, 0.0))
    return torch.cat(pooled)


class _ReferencePool(torch.autograd.Function):
    """`pool_tokens_fwd` with the formula's second derivative; embedding bags have none."""

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, input_ids: Tensor, mask: Tensor | None, pooling: str
    ) -> Tensor:
        ctx.save_for_backward(input_ids, mask, table)
        ctx.pooling = pooling
        with torch.enable_grad():
            ctx.leaf = table.detach().requires_grad_()
            ctx.pooled = pool_tokens_fwd(input_ids, ctx.leaf, mask, pooling)
        return cast(Tensor, ctx.pooled.detach())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None]:
        if transforms.differentiates_backward(dy):
            return _formula_grad(ctx, dy), None, None, None
        [d_table] = torch.autograd.grad(ctx.pooled, ctx.leaf, dy, retain_graph=True)
        return d_table, None, None, None


def _formula_grad(ctx: Any, dy: Tensor) -> Tensor | None:
    """Returns the gradient of the table, differentiable in dy."""
    input_ids, mask, *_, table = ctx.saved_tensors
    [d_table] = transforms.gradients(
        lambda own: [formulas.pool_tokens(input_ids, own, mask, ctx.pooling)], [table], [True], [dy]
    )
    return d_table


# --- registered ops ----------------------------------------------------------------------------
# For the other backends; autograd and compilers can process the reference, which is plain torch.


@torch.library.custom_op("sapt_fast::pool_tokens_fwd", mutates_args=())
def _pool_op(
    input_ids: Tensor,
    table: Tensor,
    mask: Tensor | None,
    pooling: str,
    keep_winner: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Calls `pool_tokens_fwd` of the backend; returns an empty tensor for no winner."""
    transforms.require_no_tangents(_OP)
    kernel = dispatch.kernels(_OP, backend)
    pooled, winner = kernel.pool_tokens_fwd(input_ids, table, mask, pooling, keep_winner)
    return pooled, table.new_empty(0, dtype=torch.int32) if winner is None else winner


@torch.library.custom_op("sapt_fast::pool_tokens_bwd", mutates_args=())
def _pool_backward_op(
    dy: Tensor,
    input_ids: Tensor,
    mask: Tensor | None,
    winner: Tensor | None,
    vocabulary: int,
    pooling: str,
    backend: str,
) -> Tensor:
    kernel = dispatch.kernels(_OP, backend)
    return kernel.pool_tokens_bwd(dy, input_ids, mask, winner, vocabulary, pooling)


@_pool_op.register_fake
def _pool_fake(
    input_ids: Tensor, table: Tensor, mask: Tensor | None, pooling: str, keep_winner: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (input_ids.shape[0], table.shape[1])
    winner = table.new_empty(shape if keep_winner else 0, dtype=torch.int32)
    return table.new_empty(shape), winner


@_pool_backward_op.register_fake
def _pool_backward_fake(
    dy: Tensor, input_ids: Tensor, mask: Tensor | None, winner: Tensor | None, vocabulary: int,
    pooling: str, backend: str,
) -> Tensor:  # fmt: skip
    return dy.new_empty(vocabulary, dy.shape[1])


def _pool_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input_ids, table, mask, ctx.pooling, keep_winner, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(input_ids, mask, output[1] if keep_winner else None, table)


def _pool_backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    *given, table = ctx.saved_tensors
    d_table: Tensor | None
    if transforms.differentiates_backward(dy):
        d_table = _formula_grad(ctx, dy)
    else:
        d_table = _pool_backward_op(dy, *given, table.shape[0], ctx.pooling, ctx.backend)
    return None, d_table, None, None, None, None


_pool_op.register_autograd(_pool_backward, setup_context=_pool_setup)
