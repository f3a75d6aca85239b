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
        pool, weights = self.sapt_pool, self.sapt_routing.weights
        if not len(pool):
            return F.linear(x, weight, bias)
        mixture = _checked_mixture(weights, x, len(pool))
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


def _checked_mixture(weights: Tensor | None, x: Tensor, count: int) -> Tensor:
    if weights is None:
        raise RuntimeError(
            "no mixture weights: call the patched model itself, or run its parts inside "
            "model.sapt.fixed(weights)"
        )
    if weights.shape[-1] != count:
        raise RuntimeError(
            f"mixture weights for {weights.shape[-1]} adapters, but this layer has {count}: they "
            "were computed before the last add_task; run a full forward again"
        )
    if weights.device != x.device:
        weights = weights.to(x.device)
    # A group of consecutive rows (beams, tokens) shares its sample's weights.
    if weights.dim() == 3 and x.shape[:2] != weights.shape[:2]:
        raise RuntimeError(
            f"per-token weights of shape {tuple(weights.shape)} for an input of shape "
            f"{tuple(x.shape)}"
        )
    if weights.dim() == 2 and x.shape[0] % weights.shape[0]:
        raise RuntimeError(
            f"mixture weights for {weights.shape[0]} samples, but the layer's input has "
            f"{x.shape[0]} rows, which is no multiple"
        )
    return weights.reshape(-1, count)
