"""One LoRA per sample, each another one, added to a layer's output: serving many adapters at once.

    y[s] += scaling[k] (x[s] A_k^T) B_k^T,    k = owner[s]

The adapters are read where they lie, in PEFT's layout, and only by the samples that own them: the
arithmetic is that of one adapter for the batch, however many there are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sapt_fast import dispatch


class Adapter(NamedTuple):
    """One LoRA as PEFT keeps it.

    Attributes:
        a: [r, I], in x's dtype or float32. b: [O, r], likewise.
        scaling: alpha / r.
    """

    a: Tensor
    b: Tensor
    scaling: float


def add_own_lora_(
    y: Tensor,
    x: Tensor,
    adapters: Sequence[Adapter],
    owner: Sequence[int],
    *,
    backend: str | None = None,
) -> Tensor:
    """Adds each sample's own adapter to y, in place; not differentiable.

    Args:
        y: [B, ..., O] contiguous, as the base layer gave it; float32, float16, bfloat16 or float64.
        x: [B, ..., I] in y's dtype, the layer's input.
        adapters: of any ranks, all of one dtype.
        owner: of each of the B samples the index of its adapter, -1 for none.
        backend: as in `dispatch.resolve`.

    Returns:
        y.

    Raises:
        ValueError, TypeError: a shape, index or dtype does not fit, or something wants a gradient.
        dispatch.BackendError: the named backend cannot run here.

    Example:
        >>> import torch
        >>> from sapt_fast.ops.own_lora import Adapter, add_own_lora_
        >>> adapters = [Adapter(torch.ones(2, 3), torch.ones(4, 2), 0.5)]
        >>> add_own_lora_(torch.zeros(2, 4), torch.ones(2, 3), adapters, [0, -1])
        tensor([[3., 3., 3., 3.],
                [0., 0., 0., 0.]])
    """
    _check(y, x, adapters, owner)
    chosen = dispatch.resolve("own_lora", x.device, backend, x.dtype)
    rows_y, rows_x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    dispatch.kernels("own_lora", chosen).own_lora_fwd(rows_y, rows_x, adapters, owner)
    return y


def _check(y: Tensor, x: Tensor, adapters: Sequence[Adapter], owner: Sequence[int]) -> None:
    if x.dim() < 2 or y.shape[:-1] != x.shape[:-1] or not y.is_contiguous():
        raise ValueError(
            f"y: got shape {tuple(y.shape)}, strides {y.stride()}, expected contiguous "
            f"{[*x.shape[:-1], 'O']}"
        )
    if y.dtype != x.dtype:
        raise TypeError(f"x: got dtype {x.dtype}, expected {y.dtype} (that of y)")
    if len(owner) != x.shape[0]:
        raise ValueError(f"owner: got {len(owner)} samples, expected {x.shape[0]} (those of x)")
    if owner and not -1 <= min(owner) <= max(owner) < len(adapters):
        raise ValueError(f"owner: got {list(owner)}, expected -1 to {len(adapters) - 1}")
    dtypes = {tensor.dtype for a, b, _ in adapters for tensor in (a, b)}
    if len(dtypes) > 1 or not dtypes <= {x.dtype, torch.float32}:
        raise TypeError(f"adapters: got {dtypes}, expected one of {x.dtype} or torch.float32")
    for k, (a, b, _) in enumerate(adapters):
        if a.shape[1:] != x.shape[-1:] or b.shape != (y.shape[-1], a.shape[0]):
            raise ValueError(
                f"adapters[{k}]: got A {tuple(a.shape)} and B {tuple(b.shape)}, expected "
                f"[r, {x.shape[-1]}] and [{y.shape[-1]}, r]"
            )
    if torch.is_grad_enabled():
        tensors = [y, x, *(t for a, b, _ in adapters for t in (a, b))]
        if any(t.requires_grad for t in tensors):
            raise ValueError("add_own_lora_: got tensors that require gradients; it has none")


def own_lora_fwd(y: Tensor, x: Tensor, adapters: Sequence[Adapter], owner: Sequence[int]) -> None:
    """The specification: y [M, O] += each sample's adapter of x [M, I]; B divides M."""
    samples = len(owner)
    if not samples:
        return
    count = x.shape[0] // samples
    start = 0
    while start < samples:
        stop = start + 1
        while stop < samples and owner[stop] == owner[start]:
            stop += 1
        if owner[start] >= 0:
            a, b, scaling = adapters[owner[start]]
            rows = slice(start * count, stop * count)
            wide = torch.promote_types(x.dtype, a.dtype)
            a, b = a.to(wide), b.to(wide)
            h = x[rows].to(wide) @ a.t()
            if wide == y.dtype:
                y[rows].addmm_(h, b.t(), alpha=scaling)
            else:
                y[rows] += (h @ b.t() * scaling).to(y.dtype)
        start = stop
