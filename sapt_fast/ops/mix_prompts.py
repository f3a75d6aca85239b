"""Soft prompts mixed per sample and inserted before the input embeddings.

    y[b] = [ sum_k mixture[b, k] prompts[k] ; embeds[b] ]

(SAPT, ACL 2024, with prompts instead of adapters.) The backward reads only the first P rows of each
sample's gradient; the embeddings' gradient is a view of the others.
"""

from typing import Any

import torch
from torch import Tensor

from sapt_fast import dispatch
from sapt_fast.ops import formulas, transforms
from sapt_fast.ops._common import FLOATS, require_ids_of_table, require_tensors, without_autocast
from sapt_fast.ops._presence import present_product, without_undefined
from sapt_fast.ops.pool_tokens import check_ids

_OP = "mix_prompts"
DISPATCH = dispatch.Op(few_rows=(4, 4))


def mix_prompts(
    prompts: Tensor, mixture: Tensor, embeds: Tensor, *, backend: str | None = None
) -> Tensor:
    """Inserts each sample's mixture of prompts before its embeddings.

    Differentiable in prompts, mixture and embeddings.

    Args:
        prompts: [K, P, D] in embeds' dtype or float32.
        mixture: [B, K], one weight per sample and prompt, any floating-point dtype. A weight of
            exactly 0 means that the prompt is absent for that sample: its infinities and NaNs
            reach neither the result nor a gradient, and a non-finite gradient of the weight
            becomes 0.
        embeds: [B, T, D]; float32, float16 or bfloat16 (float64 in the reference).
        backend: as in `dispatch.resolve`; float64 runs only in the reference.

    Returns:
        [B, P + T, D], contiguous, in embeds' dtype. The mixture is summed in float32 (float64 for
        float64 embeddings).

    Raises:
        ValueError, TypeError: if a shape, dtype or device does not fit.
        dispatch.BackendError: if the named backend cannot run here, or does not support float64.

    Example:
        >>> import torch
        >>> from sapt_fast.ops import mix_prompts
        >>> prompts, mixture = torch.randn(3, 10, 8), torch.softmax(torch.randn(2, 3), -1)
        >>> mix_prompts(prompts, mixture, torch.randn(2, 5, 8)).shape
        torch.Size([2, 15, 8])
    """
    require_tensors(prompts=prompts, mixture=mixture, embeds=embeds)
    if embeds.dim() != 3:
        raise ValueError(f"embeds: got shape {tuple(embeds.shape)}, expected [B, T, D]")
    return _checked(prompts, mixture, "embeds", embeds, None, backend)


def mix_prompts_with_tokens(
    prompts: Tensor,
    mixture: Tensor,
    input_ids: Tensor,
    table: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Computes `mix_prompts(prompts, mixture, table[input_ids])` in one pass.

    Args:
        prompts, mixture, backend: as in `mix_prompts`, with table instead of embeds.
        input_ids: [B, T] int64 or int32, each in [0, V). The Triton kernel returns NaN for others.
        table: [V, D], the embedding matrix; differentiable, with a dense gradient.

    Returns:
        [B, P + T, D], contiguous, in table's dtype.

    Raises:
        ValueError, TypeError, dispatch.BackendError: as in `mix_prompts`.

    Example:
        >>> import torch
        >>> from sapt_fast.ops import mix_prompts_with_tokens
        >>> prompts, table = torch.zeros(2, 3, 8), torch.randn(50, 8)
        >>> ids, mixture = torch.tensor([[4, 9], [7, 7]]), torch.full((2, 2), 0.5)
        >>> y = mix_prompts_with_tokens(prompts, mixture, ids, table)
        >>> torch.equal(y[:, 3:], table[ids])
        True
    """
    require_tensors(prompts=prompts, mixture=mixture, input_ids=input_ids, table=table)
    require_ids_of_table(input_ids, table)
    return _checked(prompts, mixture, "table", table, input_ids, backend)


def _checked(
    prompts: Tensor,
    mixture: Tensor,
    source_name: str,
    source: Tensor,
    input_ids: Tensor | None,
    backend: str | None,
) -> Tensor:
    batch = (source if input_ids is None else input_ids).shape[0]
    width = source.shape[-1]
    if source.dtype not in FLOATS:
        raise TypeError(f"{source_name}: got dtype {source.dtype}, expected one of {FLOATS}")
    if prompts.dim() != 3 or prompts.shape[2] != width:
        raise ValueError(f"prompts: got shape {tuple(prompts.shape)}, expected [K, P, {width}]")
    if prompts.dtype not in (source.dtype, torch.float32):
        allowed = " or ".join(str(d) for d in dict.fromkeys((source.dtype, torch.float32)))
        raise TypeError(f"prompts: got dtype {prompts.dtype}, expected {allowed}")
    if tuple(mixture.shape) != (batch, prompts.shape[0]):
        raise ValueError(
            f"mixture: got shape {tuple(mixture.shape)}, expected [{batch}, {prompts.shape[0]}]"
        )
    if not mixture.is_floating_point():
        raise TypeError(f"mixture: got dtype {mixture.dtype}, expected a floating-point dtype")
    named = {"prompts": prompts, "mixture": mixture, "input_ids": input_ids}
    for name, tensor in named.items():
        if tensor is not None and tensor.device != source.device:
            raise ValueError(
                f"{name}: got device {tensor.device}, expected {source.device}"
                f" (that of {source_name})"
            )
    if input_ids is not None:
        check_ids(input_ids, source.shape[0])
    mixture = mixture.to(torch.promote_types(source.dtype, torch.float32))
    if transforms.active():
        dispatch.resolve(_OP, source.device, backend, source.dtype)
        return formulas.mix_prompts(prompts, mixture, source, input_ids)
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        backend = dispatch.resolve(_OP, source.device, backend, source.dtype, batch)
    return _forward_op(prompts, mixture, source, input_ids, backend or "")


# --- reference ---------------------------------------------------------------------------------


def mix_prompts_fwd(
    prompts: Tensor, mixture: Tensor, source: Tensor, input_ids: Tensor | None
) -> Tensor:
    """Specifies the forward: returns [B, P + T, D] in source's dtype, newly allocated.

    Args:
        prompts: [K, P, D] in source's dtype or float32.
        mixture: [B, K] float32 (float64 for a float64 source), which is the dtype of the sums.
        source: the embeddings [B, T, D], or with `input_ids` the table [V, D] of their rows.
        input_ids: [B, T] int32 or int64, or None.
    """
    with without_autocast(source.device):
        flat = prompts.to(mixture.dtype).flatten(1)
        mixed = _product(mixture, flat)
    embeds = source if input_ids is None else torch.nn.functional.embedding(input_ids, source)
    mixed = mixed.view(mixture.shape[0], *prompts.shape[1:]).to(source.dtype)
    return torch.cat([mixed, embeds], 1)


def mix_prompts_bwd(
    dy: Tensor, prompts: Tensor, mixture: Tensor, needs_prompts: bool, needs_mixture: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Specifies the backward: returns `(d_prompts, d_mixture)`, None for what is not needed.

    Args:
        dy: [B, P + T, D], any strides; only its first P rows are read.
        prompts, mixture: as in the forward; the results have their dtypes.
    """
    d_mixed = dy[:, : prompts.shape[1]].flatten(1).to(mixture.dtype)
    d_prompts = d_mixture = None
    with without_autocast(dy.device):
        if needs_prompts:
            d_prompts = _product(mixture.t(), d_mixed)
            d_prompts = d_prompts.view(prompts.shape).to(prompts.dtype)
        if needs_mixture:
            d_mixture = d_mixed @ prompts.to(mixture.dtype).flatten(1).t()
            d_mixture = without_undefined(d_mixture, mixture)
    return d_prompts, d_mixture


def _product(weights: Tensor, rows: Tensor) -> Tensor:
    """Returns `weights @ rows`, in which rows of weight 0 are absent.

    On a CPU one pass over the rows finds whether they are finite, which a finite sum shows: then it
    is the plain product. Elsewhere the host would have to wait for the answer.
    """
    if rows.device.type == "cpu" and bool(rows.sum().isfinite()):
        return weights @ rows
    return present_product(weights, weights != 0, rows)


# --- registered ops ----------------------------------------------------------------------------


@torch.library.custom_op("sapt_fast::mix_prompts_fwd", mutates_args=())
def _forward_op(
    prompts: Tensor, mixture: Tensor, source: Tensor, input_ids: Tensor | None, backend: str
) -> Tensor:
    transforms.require_no_tangents(_OP)
    kernel = dispatch.kernels(_OP, dispatch.resolve(_OP, source.device, backend, source.dtype))
    return kernel.mix_prompts_fwd(prompts, mixture, source, input_ids)


@torch.library.custom_op("sapt_fast::mix_prompts_bwd", mutates_args=())
def _backward_op(
    dy: Tensor,
    prompts: Tensor,
    mixture: Tensor,
    needs_prompts: bool,
    needs_mixture: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Calls `mix_prompts_bwd` of the backend; returns empty tensors instead of None."""
    ran = dispatch.resolve(_OP, dy.device, backend, dy.dtype)
    kernel = dispatch.kernels(_OP, dispatch.backward(_OP, ran))
    grads = kernel.mix_prompts_bwd(dy, prompts, mixture, needs_prompts, needs_mixture)
    d_prompts, d_mixture = (dy.new_empty(0) if grad is None else grad for grad in grads)
    return d_prompts, d_mixture


@_forward_op.register_fake
def _forward_fake(
    prompts: Tensor, mixture: Tensor, source: Tensor, input_ids: Tensor | None, backend: str
) -> Tensor:
    batch, tokens = (source if input_ids is None else input_ids).shape[:2]
    return source.new_empty(batch, prompts.shape[1] + tokens, source.shape[-1])


@_backward_op.register_fake
def _backward_fake(
    dy: Tensor, prompts: Tensor, mixture: Tensor, needs_prompts: bool, needs_mixture: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        prompts.new_empty(prompts.shape) if needs_prompts else dy.new_empty(0),
        mixture.new_empty(mixture.shape) if needs_mixture else dy.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    prompts, mixture, source, input_ids, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.needs = prompts.requires_grad, mixture.requires_grad
    ctx.needs_source = source.requires_grad
    ctx.table_rows, ctx.backend = source.shape[0], backend
    needs_ids = ctx.needs_source and input_ids is not None
    ctx.save_for_backward(prompts, mixture, input_ids if needs_ids else None)


def _backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    prompts, mixture, input_ids = ctx.saved_tensors
    d_prompts = d_mixture = d_source = None
    if any(ctx.needs) and transforms.differentiates_backward(dy):
        d_mixed = dy[:, : prompts.shape[1]].to(mixture.dtype)
        d_prompts, d_mixture = transforms.gradients(
            lambda *own: [formulas.mixed_prompts(*own)], [prompts, mixture], ctx.needs, [d_mixed]
        )
    elif any(ctx.needs):
        d_prompts, d_mixture = _backward_op(dy, prompts, mixture, *ctx.needs, ctx.backend)
    if ctx.needs_source:
        d_source = dy[:, prompts.shape[1] :]
        if input_ids is not None:
            d_source = torch.ops.aten.embedding_dense_backward(
                d_source, input_ids, ctx.table_rows, -1, False
            )
    return (
        d_prompts if ctx.needs[0] else None,
        d_mixture if ctx.needs[1] else None,
        d_source,
        None,
        None,
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)
