"""Gradient checkpointing: the recomputation of a layer gets the weights of the first run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sapt_fast.routing.running import Running


class Checkpoint:
    """A checkpoint function that hands the weights to the recomputation as an input.

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

        return self.function(run, self.running.running, *args, **kwargs)


class Recomputation:
    """Wraps the checkpoint functions of one model, those set now and those set later.

    Args:
        model: the transformers model.
        running: its running weights.
    """

    def __init__(self, model: Any, running: Running) -> None:
        self.model = model
        self.running = running

    def stand_ins(self) -> dict[str, Callable[..., Any]]:
        """By name, the methods that stand in for the model's own."""
        return {"_set_gradient_checkpointing": self._set_gradient_checkpointing}

    def install(self) -> None:
        """Wraps the functions that are set already."""
        for module in self.model.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None:
                module._gradient_checkpointing_func = Checkpoint(self.running, function)

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
        wrapped = Checkpoint(self.running, gradient_checkpointing_func)
        own(enable=enable, gradient_checkpointing_func=wrapped, **options)


def _unwrapped(function: Callable[..., Any], running: Running) -> Callable[..., Any]:
    """Returns the function without the wrapper of these weights; wrappers of others stay."""
    if not isinstance(function, Checkpoint):
        return function
    if function.running is running:
        return function.function
    function.function = _unwrapped(function.function, running)
    return function
