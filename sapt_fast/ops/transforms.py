"""How the ops behave under `torch.func`, forward-mode AD and a second derivative.

Kernels see raw memory, so none of them runs on a tensor that a transform has wrapped or given a
tangent. There the ops compute their plain formulas (`ops.formulas`), which torch transforms itself;
their backwards do the same when they are differentiated in turn.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

PLAIN = frozenset((Tensor, torch.nn.Parameter))
"""Kinds of tensor that nothing but torch itself gives a meaning to."""
_interpreters: Callable[[], object] = _functorch.peek_interpreter_stack


@torch.compiler.assume_constant_result
def active() -> bool:
    """Whether a transform of `torch.func` or a level of forward-mode AD is running."""
    return _interpreters() is not None or forward_ad._current_level >= 0


def differentiates_backward(*d_outputs: Tensor | None) -> bool:
    """Whether a registered backward must be differentiable (create_graph) or run under vmap.

    `torch.autograd.grad(is_grads_batched=True)` has a vmap of its own, seen in its tensors only.
    """
    return (
        torch.is_grad_enabled()
        or active()
        or any(d is not None and _functorch.is_legacy_batchedtensor(d) for d in d_outputs)
    )


def require_no_tangents(op: str) -> None:
    """Raises RuntimeError if a registered op is reached in forward-mode AD, which it would lose.

    The ops' own functions never do; a graph that was compiled before the transform does.
    """
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            f"op '{op}' has no forward-mode derivative inside a compiled graph: put the transform "
            "inside the compiled function, or call the function without torch.compile"
        )


def is_tracked(tensor: Tensor) -> bool:
    """Whether a transform that differentiates (grad, vjp, jvp) has wrapped a tensor, or a tangent
    belongs to it."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    if forward_ad._current_level < 0 or not tensor.is_floating_point():
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None


def values(tensor: Tensor) -> Tensor | None:
    """The numbers inside a wrapped tensor, those of all of vmap's samples; None where traced.

    They are for checks alone: neither vmap nor a derivative sees them.
    """
    if torch.compiler.is_compiling():
        return None
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor if type(tensor) in PLAIN and not tensor.is_meta else None


def alive(tensor: Tensor | None) -> Tensor | None:
    """A tensor that was kept; None if it belongs to a transform that has ended."""
    if tensor is None or active() or not _functorch.is_functorch_wrapped_tensor(tensor):
        return tensor
    return None


def gradients(
    formula: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    d_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of a formula in its inputs, themselves differentiable in inputs and d_outputs.

    Args:
        formula: gives the outputs from the inputs.
        inputs: saved by a forward, with their history.
        needs: which inputs' gradients are wanted.
        d_outputs: of each output, None for one that the loss does not depend on.

    Returns:
        The gradient of each input, zeros where it has none; None where not wanted.
    """
    with torch.enable_grad():
        # Views, because an input may have been computed from another one.
        own = [tensor.view_as(tensor) for tensor in inputs]
        outputs = formula(*own)
    pairs = [
        (output, grad)
        for output, grad in zip(outputs, d_outputs, strict=True)
        if grad is not None and output.requires_grad
    ]
    wanted = [tensor for tensor, needed in zip(own, needs, strict=True) if needed]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if pairs and wanted:
        ys, dys = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            ys, wanted, dys, create_graph=torch.is_grad_enabled(), allow_unused=True
        )
    left = iter(found)
    results: list[Tensor | None] = []
    for tensor, needed in zip(inputs, needs, strict=True):
        grad = next(left) if needed else None
        results.append(torch.zeros_like(tensor) if needed and grad is None else grad)
    return results
