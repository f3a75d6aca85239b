"""Gradient checkpointing: the recomputation of a layer gets the weights of the first run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sapt_fast.routing.running import Running


class Checkpoint:
    """A checkpoint function that hands the weights to the recomputation as an input.

    A reentrant checkpoint computes no gradients if no input of the layer requires one. A layer
    whose parameters train then raises RuntimeError.

    Args:
        running: where the weights are.
        function: called as function(layer, *args, **kwargs); `torch.utils.checkpoint.checkpoint`,
            usually.
    """

    def __init__(self, running: Running, function: Callable[..., Any]) -> None:
        self.running = running
        self.function = function

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.function(layer, *args, **kwargs)

        def run(weights: Tensor | None, *inner: Any) -> Any:
            with self.running.resume(weights):
                return layer(*inner)

        output = self.function(run, self.running.running, *args, **kwargs)
        require_gradient(layer, output)
        return output


def require_gradient(layer: Any, output: Any) -> None:
    """Raises RuntimeError if a layer's parameters train, but its output has no gradient."""
    first = output[0] if isinstance(output, tuple) else output
    if not torch.is_grad_enabled() or not isinstance(first, Tensor) or first.requires_grad:
        return
    # transformers passes partial(forward, module); earlier versions a method of the module.
    arguments, function = getattr(layer, "args", ()), getattr(layer, "func", layer)
    module = arguments[0] if arguments else getattr(function, "__self__", None)
    if isinstance(module, nn.Module) and any(p.requires_grad for p in module.parameters()):
        raise RuntimeError(
            f"gradient checkpointing: a {type(module).__name__} whose parameters train gets no "
            "input that requires a gradient, so that a reentrant checkpoint computes none: call "
            "gradient_checkpointing_enable(gradient_checkpointing_kwargs="
            '{"use_reentrant": False})'
        )


class Recomputation:
    """Wraps the checkpoint functions of one model, those set now and those set later.

    Args:
        model: the transformers model.
        running: its running weights.
        kind: of the wrappers.
    """

    def __init__(self, model: Any, running: Running, kind: type[Checkpoint] = Checkpoint) -> None:
        self.model = model
        self.running = running
        self.kind = kind

    def stand_ins(self) -> dict[str, Callable[..., Any]]:
        """By name, the methods that stand in for the model's own."""
        return {"_set_gradient_checkpointing": self._set_gradient_checkpointing}

    def install(self) -> None:
        """Wraps the functions that are set already."""
        for module in self.model.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None:
                module._gradient_checkpointing_func = self.kind(self.running, function)

    def remove(self) -> None:
        """Unwraps all of them."""
        for module in self.model.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None:
                module._gradient_checkpointing_func = _unwrapped(function, self.running)

    def _set_gradient_checkpointing(
        self,
        own: Callable[..., Any],
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        **options: Any,
    ) -> None:
        wrapped = self.kind(self.running, gradient_checkpointing_func)
        own(enable=enable, gradient_checkpointing_func=wrapped, **options)


def _unwrapped(function: Callable[..., Any], running: Running) -> Callable[..., Any]:
    """Returns the function without the wrapper of these weights; wrappers of others stay."""
    if not isinstance(function, Checkpoint):
        return function
    if function.running is running:
        return function.function
    function.function = _unwrapped(function.function, running)
    return function
