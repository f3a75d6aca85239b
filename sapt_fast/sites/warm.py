"""Layers run on zeros, so that their kernels are compiled and their launches recorded."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.routing.running import Running


def run_mixed(layers: Iterable[nn.Module], weights: Tensor, tokens: int) -> None:
    """Runs a model's mixed layers, those that share an input together.

    Args:
        layers: the layers, which are `Mixed`.
        weights: the mixture, [B, K].
        tokens: T, of inputs [B, T, in_features].
    """
    done: set[nn.Module] = set()
    for layer in layers:
        group: Any = getattr(layer, "sapt_group", None)
        members: list[Any] = [layer] if group is None else group.layers
        if layer not in done:
            done.update(members)
            rows = members[0].sapt_pool.a
            held = getattr(layer, "weight", None)
            run_on_zeros(
                members, members[0].sapt_routing, weights, (tokens, rows.width),
                [held, rows.trainable],
            )  # fmt: skip


def run_on_zeros(
    layers: Sequence[Any],
    routing: Running,
    weights: Tensor,
    size: tuple[int, int],
    alike: Sequence[Tensor | None],
) -> None:
    """Runs layers on one input of zeros, without the hooks on them.

    Args:
        layers: the layers, in the order in which a model calls them.
        routing: the model's running weights.
        weights: the mixture, [B, K].
        size: tokens and width of the input.
        alike: the input has device and dtype of the first that is not quantised.
    """
    like = next(t for t in alike if t is not None and t.is_floating_point() and t.itemsize > 1)
    # accelerate loads an offloaded weight when the layer is called, and moves the input there.
    device = weights.device if like.is_meta else like.device
    grad = torch.is_grad_enabled()
    x = like.new_zeros(len(weights), *size, device=device, requires_grad=grad)
    with routing.resume(weights):
        run_backward(lambda: [layer.forward(x) for layer in layers], [x, weights])


def run_backward(function: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]) -> None:
    """Runs a function and, where gradients are enabled, its backward to the inputs.

    `.grad` stays as it is, and hooks of other leaves are not called.
    """
    outputs = [y for y in function() if y.requires_grad]
    leaves = [leaf for leaf in inputs if leaf.requires_grad]
    if outputs and leaves:
        zeros = [torch.zeros_like(y) for y in outputs]
        torch.autograd.grad(outputs, leaves, zeros, allow_unused=True)
