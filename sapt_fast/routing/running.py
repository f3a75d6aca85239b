"""The mixture weights of the forwards that run now, in each thread.

A router computes the weights once, above the layers, and every layer reads them here. Each thread
has its own forwards and weights, so concurrent callers never see each other's. A layer that is
called outside of a forward (a part of the model called on its own, or activation checkpointing
that transformers does not know of) finds no weights and raises.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sapt_fast.ops import transforms
from sapt_fast.routing.forward import Forward, Waiting


class Aligned(Protocol):
    """What must be in place before layers run: an adapter pool, or all pools of a PEFT model."""

    def realign(self) -> None:
        """Puts rows back in place whose parameters were moved."""


class Restorable(Protocol):
    """A mixture that is merged into the base weights."""

    def restore(self) -> None:
        """Gives the base weights the bits that they had before."""


def _thread_state() -> threading.local:
    """What runs in each thread, at first nothing.

    forward: the innermost forward, maybe one that was interrupted. pinned: weights that override
    the router's. generating: whether the model's `generate` runs. weights, segments: of the
    forward that ended last.
    """
    # Not a subclass, in which a compiled step of `generate` did not find the forward.
    state = threading.local()
    # Present from the start: a compiled forward is compiled again when an attribute appears.
    state.forward = state.pinned = state.segments = None
    state.generating = False
    return state


class Running:
    """The running mixture weights of one patched model, as its layers and its handle see them.

    Args:
        active: whether there is anything to mix; if not, the router is not called.
        count: K, the number of weights per row that a caller has to give.

    Attributes:
        merged: the mixture that the base weights contain, so that nothing is routed; or None.
        pools: those of the layers. A forward calls their `realign` before its layers run, because
            layers may be compiled even if the forward is not.
    """

    def __init__(self, active: Callable[[], bool], count: Callable[[], int]) -> None:
        self.active = active
        self.count = count
        self.merged: Restorable | None = None
        self.pools: list[Aligned] = []
        self._thread = _thread_state()

    # --- what layers and callers read ---

    @property
    def weights(self) -> Tensor | None:
        """[B, K] (or [B, T, K]) of the forward that ended last in this thread."""
        return transforms.alive(getattr(self._thread, "weights", None))

    @weights.setter
    def weights(self, value: Tensor | None) -> None:
        self._thread.weights = value

    @property
    def weights_of_texts(self) -> Tensor | None:
        """`weights`; for packed rows one row [K] for each text."""
        weights, segments = self.weights, getattr(self._thread, "segments", None)
        return weights if weights is None or segments is None else segments.of_texts(weights)

    @property
    def running(self) -> Tensor | None:
        """What a layer mixes by: the weights of the forward that it runs in, else the pinned."""
        forward = self.forward
        return self.pinned if forward is None else forward.weights

    def mixture(self, x: Tensor, pool: Any, kind: str) -> Tensor:
        """Returns the weights by which a layer mixes its pool.

        Args:
            x: the input of the layer, [..., I].
            pool: the adapters of the layer.
            kind: the layer's class, for messages.

        Returns:
            [S, K] on the device of x, where S divides the rows of x.

        Raises:
            RuntimeError: if there are no weights, or they do not fit.
        """
        return checked_mixture(self.running, x, len(pool), kind)

    @property
    def waiting(self) -> Waiting | None:
        """Where layers of the running forward leave results for each other."""
        forward = self.forward
        return None if forward is None else forward.waiting

    @property
    def is_running(self) -> bool:
        """Whether a forward of the model runs in this thread."""
        return self.forward is not None

    @property
    def pinned(self) -> Tensor | None:
        """Weights that override the router's until released, in this thread."""
        return getattr(self._thread, "pinned", None)

    @property
    def is_generating(self) -> bool:
        """Whether the model's `generate` runs in this thread."""
        return getattr(self._thread, "generating", False)

    @property
    def routes(self) -> bool:
        """Whether the router is called where no weights are given."""
        return self.merged is None and self.active()

    # --- weights from a caller ---

    def checked(self, weights: Tensor) -> Tensor:
        """Weights from a caller, as [1, K], [B, K] or [B, T, K].

        Raises:
            ValueError: if the shape does not fit, or weights are integers or, on a CPU, not finite.
            RuntimeError: if a mixture is merged into the base weights.
        """
        self.require_unmerged()
        weights, count = torch.as_tensor(weights), self.count()
        empty = 0 in weights.shape[:-1]
        if weights.dim() not in (1, 2, 3) or weights.shape[-1] != count or empty:
            raise ValueError(
                f"weights: got shape {tuple(weights.shape)}, expected [{count}], [B, {count}] or "
                f"[B, T, {count}]"
            )
        # On a GPU the look would wait for all that runs there.
        known = transforms.values(weights) if weights.device.type == "cpu" else None
        infinite = known is not None and not bool(torch.isfinite(known).all())
        if not weights.is_floating_point() or infinite:
            raise ValueError("weights: got non-finite or integer values, expected finite floats")
        return weights[None] if weights.dim() == 1 else weights

    @contextmanager
    def pin(self, weights: Tensor | None) -> Iterator[None]:
        """Uses `weights` in every forward of this thread while the context lasts."""
        self.current()
        before, self._thread.pinned = self.pinned, weights
        try:
            yield
        finally:
            self._thread.pinned = before

    # --- merged mixtures ---

    def unmerge(self) -> None:
        """Takes a merged mixture out of the base weights, where there is one."""
        if self.merged is not None:
            self.merged.restore()
            self.merged = None

    def require_unmerged(self) -> None:
        """Raises RuntimeError if a mixture is merged into the base weights."""
        if self.merged is not None:
            raise RuntimeError(
                "a mixture is merged into the base weights: call model.sapt.unmerge() first"
            )

    # --- forwards ---

    @property
    def forward(self) -> Forward | None:
        """The innermost forward of this thread, maybe one that was interrupted."""
        return getattr(self._thread, "forward", None)

    def current(self) -> Forward | None:
        """Returns the innermost forward of this thread; forgets forwards that were interrupted."""
        forward = self.forward
        if not torch.compiler.is_compiling():
            while forward is not None and forward.interrupted():
                forward = forward.outer
            self._thread.forward = forward
        return forward

    def begin(self, module: nn.Module) -> Forward:
        """Starts a forward of `module`, whose own pre-hook must be the caller."""
        frame = None
        if not torch.compiler.is_compiling():
            frame = sys._getframe(2)  # calls the pre-hook, then the module's forward
        for pool in self.pools:
            pool.realign()
        forward = self._thread.forward = Forward(module, self.forward, frame)
        return forward

    def end(self, module: nn.Module) -> None:
        """Ends the forward of `module`, if that is the innermost."""
        forward = self.forward
        if forward is not None and forward.module is module:
            self.weights, self._thread.segments = forward.per_row, forward.segments
            self._thread.forward = forward.outer

    @contextmanager
    def resume(self, weights: Tensor | None) -> Iterator[None]:
        """Lets layers run outside of their forward, with the weights that it had."""
        before = self.forward
        forward = self._thread.forward = Forward(None, before, None)
        forward.weights = weights
        try:
            yield
        finally:
            self._thread.forward = before

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Lets the model run inside one of its own forwards, of which that one knows nothing."""
        before, self._thread.forward = self.forward, None
        weights, segments = self.weights, getattr(self._thread, "segments", None)
        try:
            yield
        finally:
            self._thread.forward = before
            self.weights, self._thread.segments = weights, segments

    # --- one call of generate ---

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Marks a call of `generate`; weights that it pinned are released at its end."""
        before, pinned = self.is_generating, self.pinned
        self._thread.generating = True
        try:
            yield
        finally:
            self._thread.generating, self._thread.pinned = before, pinned

    def keep_while_generating(self, weights: Tensor) -> None:
        """Pins weights until the running `generate` ends."""
        self._thread.pinned = weights

    # What runs belongs to a thread: a copy of the model starts without any.
    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_thread"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _thread=_thread_state())


def checked_mixture(weights: Tensor | None, x: Tensor, count: int, kind: str) -> Tensor:
    """Returns the running weights as a layer mixes by them.

    Args:
        weights: [1, K], [B, K] or [B, T, K]; None if nothing runs.
        x: the input of the layer; [B, ..., I], or tokens of all samples one after the other.
        count: K, the adapters of the layer.
        kind: the layer's class, for messages.

    Returns:
        [S, K] on the device of x, where S divides the rows of x.

    Raises:
        RuntimeError: if there are no weights, or they do not fit the adapters or the input.
    """
    if weights is None:
        raise RuntimeError(
            f"no mixture weights for {kind}: call the patched model itself, or run its parts "
            "inside model.sapt.fixed(weights); to recompute activations, use the model's own "
            "gradient_checkpointing_enable()"
        )
    if weights.shape[-1] != count:
        raise RuntimeError(
            f"mixture weights for {weights.shape[-1]} adapters, but this layer has {count}: they "
            "were computed before the last add_task; run a full forward again"
        )
    if weights.device != x.device:
        weights = weights.to(x.device)
    if weights.dim() == 2 and weights.shape[0] == 1:
        return weights
    samples = weights.shape[:-1]
    if x.dim() > 2:
        fits = x.shape[: len(samples)] == samples
    else:  # samples' tokens one after the other
        rows, given = x.shape[:-1].numel(), samples.numel()
        fits = rows == given or (weights.dim() == 2 and given > 0 and rows % given == 0)
    if not fits:
        raise RuntimeError(
            f"{kind}: got an input of shape {tuple(x.shape)} for mixture weights of shape "
            f"{tuple(weights.shape)}, expected {[*samples, '...']}. A layer whose first dimension "
            "is not the batch can only mix one weight per adapter for all samples: leave it out of "
            "target_modules, or use model.sapt.fixed(weights [K])"
        )
    return weights.reshape(-1, count)
