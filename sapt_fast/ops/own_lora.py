"""A different LoRA for each sample, to serve many adapters at once.

    y[s] = x[s] W^T + bias + scaling[k] (x[s] A_k^T) B_k^T,    k = owner[s]

The adapters are read in place, in PEFT's layout, and only for their samples. So the number of
operations is that of one adapter for the batch, however many adapters there are.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sapt_fast import dispatch
from sapt_fast.ops import formulas, transforms
from sapt_fast.ops._common import FLOATS, kernel, require_tensors
from sapt_fast.ops._scalars import integers, number

DISPATCH = dispatch.Op()
# The base of an output: the weight [O, I] and bias [O] of a linear layer, or its output.
Base = tuple[Tensor, Tensor | None] | Tensor


class Adapter(NamedTuple):
    """One LoRA in PEFT's layout.

    Attributes:
        a: [r, I], in x's dtype or float32.
        b: [O, r], in a's dtype.
        scaling: alpha / r.
    """

    a: Tensor
    b: Tensor
    scaling: float


def own_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    owner: Sequence[int],
    *,
    backend: str | None = None,
) -> Tensor:
    """Computes a linear layer in which each sample has its own adapter; not differentiable.

    Args:
        x: [B, ..., I]; float32, float16, bfloat16 or float64.
        weight: [O, I] in x's dtype.
        bias: [O] in x's dtype, or None.
        adapters: adapters of any ranks, all of one dtype.
        owner: for each of the B samples, the index of its adapter, or -1 for none.
        backend: as in `dispatch.resolve`.

    Returns:
        [B, ..., O] in x's dtype.

    Raises:
        ValueError, TypeError: if a shape, index, dtype or device does not fit.
        ValueError, TypeError: if an input requires a gradient.
        dispatch.BackendError: if the named backend cannot run here.

    Example:
        >>> import torch
        >>> from sapt_fast.ops.own_lora import Adapter, own_lora
        >>> adapters = [Adapter(torch.ones(2, 3), torch.ones(4, 2), 0.5)]
        >>> own_lora(torch.ones(2, 3), torch.ones(4, 3), None, adapters, [0, -1])
        tensor([[6., 6., 6., 6.],
                [3., 3., 3., 3.]])
    """
    require_tensors(x=x, weight=weight, bias=bias)
    if weight.dim() != 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected [O, I]")
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, ..., I]")
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(f"x: got width {x.shape[-1]}, expected {weight.shape[1]} (that of weight)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected [{weight.shape[0]}]")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {x.dtype} (that of x)")
    outputs, owner = weight.shape[0], _owners(owner)
    _check(x, outputs, adapters, owner, {"weight": weight, "bias": bias})
    y = _run(x.flatten(0, -2), (weight, bias), adapters, owner, backend)
    return y.reshape(*x.shape[:-1], outputs)


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
        y: [B, ..., O] contiguous, the base layer's output; float32, float16, bfloat16 or float64.
        x: [B, ..., I] in y's dtype, the layer's input.
        adapters: adapters of any ranks, all of one dtype.
        owner: for each of the B samples, the index of its adapter, or -1 for none.
        backend: as in `dispatch.resolve`.

    Returns:
        y.

    Raises:
        ValueError, TypeError: if a shape, index, dtype or device does not fit.
        ValueError, TypeError: if an input requires a gradient.
        dispatch.BackendError: if the named backend cannot run here.

    Example:
        >>> import torch
        >>> from sapt_fast.ops.own_lora import Adapter, add_own_lora_
        >>> adapters = [Adapter(torch.ones(2, 3), torch.ones(4, 2), 0.5)]
        >>> add_own_lora_(torch.zeros(2, 4), torch.ones(2, 3), adapters, [0, -1])
        tensor([[3., 3., 3., 3.],
                [0., 0., 0., 0.]])
    """
    require_tensors(x=x, y=y)
    if y.shape[:-1] != x.shape[:-1] or not y.is_contiguous():
        raise ValueError(
            f"y: got shape {tuple(y.shape)}, strides {y.stride()}, expected contiguous "
            f"{[*x.shape[:-1], 'O']}"
        )
    if y.dtype != x.dtype:
        raise TypeError(f"x: got dtype {x.dtype}, expected {y.dtype} (that of y)")
    owner = _owners(owner)
    _check(x, y.shape[-1], adapters, owner, {"y": y})
    added = _run(x.flatten(0, -2), y.flatten(0, -2), adapters, owner, backend)
    if transforms.active():  # out of place there
        y.copy_(added.reshape(y.shape))
    return y


def _run(
    x: Tensor, base: Base, adapters: Sequence[Adapter], owner: Sequence[int], backend: str | None
) -> Tensor:
    if any(type(adapter.scaling) is not float for adapter in adapters):
        adapters = [
            adapter._replace(scaling=number(f"adapters[{k}].scaling", adapter.scaling))
            for k, adapter in enumerate(adapters)
        ]
    if transforms.active():
        dispatch.resolve("own_lora", x.device, backend, x.dtype)
        y = base if isinstance(base, Tensor) else F.linear(x, *base)
        return formulas.own_lora(x, y, adapters, owner)
    return cast(Tensor, kernel("own_lora", "own_lora_fwd", backend, x)(x, base, adapters, owner))


def _owners(owner: Sequence[int]) -> Sequence[int]:
    several = isinstance(owner, Sequence) or getattr(owner, "ndim", 0) > 0
    if isinstance(owner, (str, bytes)) or not several:
        raise TypeError(f"owner: got {type(owner).__name__}, expected a sequence")
    return owner if all(type(k) is int for k in owner) else integers("owner", owner)


def _check(
    x: Tensor,
    outputs: int,
    adapters: Sequence[Adapter],
    owner: Sequence[int],
    others: Mapping[str, Tensor | None],
) -> None:
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, ..., I]")
    if x.dtype not in FLOATS:
        raise TypeError(f"x: got dtype {x.dtype}, expected one of {FLOATS}")
    if isinstance(adapters, (str, bytes)) or not isinstance(adapters, Sequence):
        raise TypeError(f"adapters: got {type(adapters).__name__}, expected a sequence")
    if len(owner) != x.shape[0]:
        raise ValueError(f"owner: got {len(owner)} samples, expected {x.shape[0]} (those of x)")
    if owner and not -1 <= min(owner) <= max(owner) < len(adapters):
        raise ValueError(f"owner: got {list(owner)}, expected -1 to {len(adapters) - 1}")
    inputs, device = x.shape[-1], x.device
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: got device {tensor.device}, expected {device} (that of x)")
    for k, (a, b, _) in enumerate(adapters):
        if a.dim() != 2 or a.shape[1] != inputs or b.shape != (outputs, a.shape[0]):
            raise ValueError(
                f"adapters[{k}]: got A {tuple(a.shape)} and B {tuple(b.shape)}, expected "
                f"[r, {inputs}] and [{outputs}, r]"
            )
        if a.device != device or b.device != device:
            raise ValueError(
                f"adapters[{k}]: got A on {a.device} and B on {b.device}, expected {device} "
                "(that of x)"
            )
    dtypes = {tensor.dtype for a, b, _ in adapters for tensor in (a, b)}
    if len(dtypes) > 1 or not dtypes <= {x.dtype, torch.float32}:
        raise TypeError(f"adapters: got {dtypes}, expected one of {x.dtype} or torch.float32")
    transformed = transforms.active()
    if transformed or torch.is_grad_enabled():
        given = [t for t in others.values() if t is not None]
        tensors = [x, *given, *(t for a, b, _ in adapters for t in (a, b))]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise ValueError("own_lora: got tensors that require gradients; it has none")
        if transformed and any(map(transforms.is_tracked, tensors)):
            raise ValueError(
                "own_lora: got tensors that a transform differentiates (grad, vjp, jvp, dual "
                "tensors); it has no derivative: use mixed_lora with one-hot weights"
            )


def own_lora_fwd(
    x: Tensor, base: Base, adapters: Sequence[Adapter], owner: Sequence[int]
) -> Tensor:
    """Specifies the op: returns the base output of x [M, I] plus each sample's adapter.

    Args:
        base: the weight and bias of the base layer, or its output [M, O], which is changed in
            place. B divides M.
    """
    y = base if isinstance(base, Tensor) else F.linear(x, *base)
    samples = len(owner)
    if not samples:
        return y
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
    return y
