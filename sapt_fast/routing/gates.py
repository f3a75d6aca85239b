"""Forwards of a model whose layers weigh their experts by gates, and the loss that balances these.

Each gated layer computes the weights of its tokens from its own input, so that nothing is routed
above the layers. In training (with gradients) it also computes a balance loss over the tokens that
are no padding. The mean over the layers is added to the loss of the model's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.routing.forward import Balance, Forward
from sapt_fast.routing.installed import Installed
from sapt_fast.routing.recompute import Checkpoint, Recomputation, require_gradient

__all__ = ["BalancedCheckpoint", "Gates"]


class Gates(Installed):
    """What the gated layers of one model know of the running forward.

    Args:
        model: the transformers model.
        coefficient: of the balance loss; 0 for none.
        in_loss: whether it is added to the loss of the model's output.
    """

    def __init__(self, model: Any, coefficient: float, in_loss: bool) -> None:
        super().__init__(model, bool, int)  # nothing is routed above the layers
        self.coefficient = coefficient
        self.in_loss = in_loss
        self.recomputation = Recomputation(model, self, BalancedCheckpoint)

    # --- what layers and the handle read ---

    def mixture(self, x: Tensor, pool: Any, kind: str) -> Tensor:
        """Returns the weights [M, K] of the experts of a layer, for its input x [..., I]."""
        forward = self.forward
        balance = None if forward is None or not pool.training else forward.balance
        weights: Tensor
        weights, loss = pool.weights(x, balance is not None, _counted(balance, x, pool))
        if balance is not None:
            balance.losses.append(loss)
        return weights

    @property
    def balance_loss(self) -> Tensor | None:
        """The balance loss of this thread's last forward, times the coefficient.

        It has no gradient if it is part of the output's loss. None after a forward that does not
        train.
        """
        return getattr(self._thread, "balance_loss", None)

    # --- installing ---

    def install(self) -> None:
        """Adds the hooks and stand-ins; `remove` takes them away again."""
        for root in dict.fromkeys((self.model, self.model.base_model)):
            self._hook(root, self._enter, self._leave)
        self._stand_in(self.recomputation.stand_ins())
        self.recomputation.install()

    # --- forwards ---

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "torch.nn.DataParallel: its replicas would lose the balance loss: use "
                "DistributedDataParallel, or launch with torchrun or accelerate"
            )
        running = self.current()
        if running is not None and module is not self.model:
            return  # inside the model with its head
        forward = self.begin(module)
        self._thread.balance_loss = None
        if self.coefficient and module.training and torch.is_grad_enabled():
            forward.balance = _begin_balance(module, self._named(module, args, kwargs))

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        forward = self.forward
        if forward is None or forward.module is not module:
            return None
        self.end(module)
        losses = [] if forward.balance is None else forward.balance.losses
        if output is None or not losses:  # no output after an error
            return None
        mean = torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
        balance = self.coefficient * mean
        given = self._named(module, args, kwargs)
        own = _loss_of(output, given) if self.in_loss else None
        self._thread.balance_loss = balance if own is None else balance.detach()
        if own is None:
            return None
        share = _share_of_batch(module, given)
        return _with_loss(output, own + (balance * share).to(own.device))

    @contextmanager
    def again(self, balance: Balance | None) -> Iterator[list[Tensor]]:
        """Lets layers run on their own, and collects their balance losses.

        Args:
            balance: that of the forward which they are part of.
        """
        losses: list[Tensor] = []
        before = self.forward
        forward = self._thread.forward = Forward(None, before, None)
        forward.balance = None if balance is None else balance._replace(losses=losses)
        try:
            yield losses
        finally:
            self._thread.forward = before


class BalancedCheckpoint(Checkpoint):
    """A checkpoint function whose layers' balance losses are outputs of the checkpoint.

    So they have gradients in reentrant checkpoints too, and a recomputation adds none.
    """

    running: Gates

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        forward = self.running.forward
        balance = None if forward is None else forward.balance
        if balance is None or torch.compiler.is_compiling():
            return self.function(layer, *args, **kwargs)
        found: list[tuple[bool, int]] = []

        def run(*inner: Any) -> tuple[Any, ...]:
            with self.running.again(balance) as losses:
                output = layer(*inner)
            several = isinstance(output, tuple)
            found.append((several, len(losses)))
            return (*(output if several else (output,)), *losses)

        outputs = self.function(run, *args, **kwargs)
        several, count = found[0]
        first = len(outputs) - count
        balance.losses.extend(outputs[first:])
        require_gradient(layer, outputs[0])
        return outputs[:first] if several else outputs[0]


def _begin_balance(module: Any, given: dict[str, Any]) -> Balance:
    """Returns which tokens of a forward count: those that are no padding.

    A decoder without a mask of its own has padding where the labels are -100.
    """
    mask = _mask_of(given, "attention_mask")
    if not _has_encoder(module):
        return Balance(mask, mask, [])
    own = _mask_of(given, "decoder_attention_mask")
    labels = given.get("labels")
    if own is None and isinstance(labels, Tensor) and labels.dim() == 2:
        own = labels != -100
    return Balance(own, mask, [])


def _mask_of(given: dict[str, Any], name: str) -> Tensor | None:
    mask = given.get(name)
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return mask
    got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(
        f"{name}: got {got}, expected [B, T], from which the balance loss reads the padding; pass "
        "such a mask, or patch the model with balance=0"
    )


def _counted(balance: Balance | None, x: Tensor, pool: Any) -> Tensor | None:
    """Returns which rows of a layer's input x [..., I] count, [M]; None for all.

    All count if its rows are not the tokens of the mask (patches of an image, pooled texts).
    """
    if balance is None:
        return None
    mask = balance.encoder_tokens if pool.reads_encoder else balance.tokens
    if mask is None:
        return None
    lead = x.shape[:-1]
    if lead != mask.shape and not (len(lead) == 1 and lead[0] == mask.numel()):
        return None
    return mask.reshape(-1).to(x.device)


def _loss_of(output: Any, given: dict[str, Any]) -> Tensor | None:
    """Returns the loss of an output, if labels were given."""
    if given.get("labels") is None:
        return None
    loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.dim() == 0 else None


def _with_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output.loss = loss
    return output


def _share_of_batch(module: Any, given: dict[str, Any]) -> Tensor | float:
    """Returns the share of this forward in a batch that is divided over several.

    A Trainer that accumulates gradients passes the number of labels of all of them, by which the
    model divides its loss. The balance losses are then averaged with the same shares.
    """
    total = given.get("num_items_in_batch")
    if total is None:
        return 1.0
    labels = given.get("shift_labels")
    if labels is None:
        labels = given["labels"]
        labels = labels[..., 1:] if _shifts_labels(module) else labels
    return (labels != -100).sum() / total


def _shifts_labels(module: Any) -> bool:
    """Returns whether the model predicts label i + 1 at token i, as Trainer finds out."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    shifts = LOSS_MAPPING.get(str(getattr(module, "loss_type", None))) is ForCausalLMLoss
    return shifts and not _has_encoder(module)


def _has_encoder(module: Any) -> bool:
    return bool(getattr(module.config, "is_encoder_decoder", False))
