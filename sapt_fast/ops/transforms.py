"""Supports the ops under `torch.func`, forward-mode AD and second derivatives.

Kernels read raw memory, so they cannot run on a tensor that a transform has wrapped or given a
tangent. For these the ops compute their plain formulas (`ops.formulas`), which torch transforms.
Backwards do the same when they are differentiated.
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
    """Returns whether a transform of `torch.func` or a level of forward-mode AD is running."""
    return _interpreters() is not None or forward_ad._current_level >= 0


def differentiates_backward(*d_outputs: Tensor | None) -> bool:
    """Returns whether a registered backward must be differentiable (create_graph) or under vmap.

    `torch.autograd.grad(is_grads_batched=True)` has its own vmap, which only its tensors show.
    """
    return (
        torch.is_grad_enabled()
        or active()
        or any(d is not None and _functorch.is_legacy_batchedtensor(d) for d in d_outputs)
    )


def require_no_tangents(op: str) -> None:
    """Raises RuntimeError if a registered op is called in forward-mode AD, which it would ignore.

    The ops' own functions never do this; a graph that was compiled before the transform does.
    """
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            f"op '{op}' has no forward-mode derivative inside a compiled graph: put the transform "
            "inside the compiled function, or call the function without torch.compile"
        )


def is_tracked(tensor: Tensor) -> bool:
    """Returns whether a transform differentiates (grad, vjp, jvp) a tensor, or it has a tangent."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    if forward_ad._current_level < 0 or not tensor.is_floating_point():
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None


def values(tensor: Tensor) -> Tensor | None:
    """Returns the numbers inside a wrapped tensor, for all samples of vmap; None if traced.

    Use them only for checks: neither vmap nor derivatives apply to them.
    """
    if torch.compiler.is_compiling():
        return None
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor if type(tensor) in PLAIN and not tensor.is_meta else None


def alive(tensor: Tensor | None) -> Tensor | None:
    """Returns a stored tensor; None if it belongs to a transform that has ended."""
    if tensor is None or active() or not _functorch.is_functorch_wrapped_tensor(tensor):
        return tensor
    return None


def gradients(
    formula: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    d_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Returns the gradients of a formula, which are differentiable in inputs and d_outputs.

    Args:
        formula: computes the outputs from the inputs.
        inputs: the inputs saved by a forward, with their history.
        needs: for each input, whether to compute its gradient.
        d_outputs: the gradient of each output; None if the loss does not depend on it.

    Returns:
        The gradient of each input, zeros if it has none; None for what is not needed.
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
