"""The layers that a patched model has in place of its own: the same module, another forward."""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from sapt_fast.pool import AdapterPool
    from sapt_fast.routing import Routing


class _Mixed:
    """What every mixed layer has besides its base class's own attributes.

    Attributes:
        sapt_pool: the layer's adapters. sapt_routing: where the running weights are.
        sapt_dropout: on the adapters' input, in training.
        sapt_grad_through_frozen: of `ops.mixed_lora_linear`.
    """

    sapt_pool: "AdapterPool"
    sapt_routing: "Routing"
    sapt_dropout: float
    sapt_grad_through_frozen: bool
    training: bool

    def _mixed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        pool = self.sapt_pool
        if not len(pool):
            return F.linear(x, weight, bias)
        mixture = _checked_mixture(self.sapt_routing.running, x, len(pool), type(self).__name__)
        through = self.sapt_grad_through_frozen
        if self.training and self.sapt_dropout:
            dropped = F.dropout(x, self.sapt_dropout)
            delta = pool(dropped, None, None, mixture, grad_through_frozen=through)
            return F.linear(x, weight, bias) + delta
        return pool(x, weight, bias, mixture, grad_through_frozen=through)


class MixedLinear(_Mixed, nn.Linear):
    """`nn.Linear` plus the mixture of its pool."""

    def forward(self, x: Tensor) -> Tensor:
        return self._mixed(x, self.weight, self.bias)


class MixedConv1D(_Mixed, Conv1D):
    """GPT-2's `Conv1D` plus the mixture of its pool."""

    def forward(self, x: Tensor) -> Tensor:
        return self._mixed(x, self.weight.t(), self.bias)


MIXED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: MixedLinear, Conv1D: MixedConv1D}


def _checked_mixture(weights: Tensor | None, x: Tensor, count: int, kind: str) -> Tensor:
    """The weights as [S, count], where S divides the rows of x."""
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
