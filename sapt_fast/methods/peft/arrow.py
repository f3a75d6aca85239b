"""Arrow (Ostapenko et al., 2024) in PEFT's layers: PEFT's router, and one pass over the experts.

Arrow scores every token by |x . p_k|, where p_k is the first right singular vector of B_k A_k, and
computes the softmax over the top k. PEFT then stores the output of every expert for every token.
Here the weights go to the mixture of all experts, which does not form these outputs. PEFT still
computes the prototypes and subtracts the general knowledge.
"""

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.lora.variants import ArrowLinearVariant
from torch import Tensor


class Arrow(NamedTuple):
    """The active Arrow router of one layer.

    Attributes:
        router: PEFT's router.
        experts: names of the adapters from which it selects.
    """

    router: ArrowLoraLinearLayer
    experts: tuple[str, ...]


def arrow_of(layer: Any) -> Arrow | None:
    """Returns the layer's router if it is the only active adapter, else None."""
    active = layer.active_adapters
    if len(active) != 1 or type(layer.lora_variant.get(active[0])) is not ArrowLinearVariant:
        return None
    router = layer.lora_arrow[active[0]]
    return Arrow(router, tuple(router.task_adapter_names))


def arrow_weights(layer: Any, arrow: Arrow, x: Tensor) -> Tensor:
    """Computes the experts' weights of each token, differentiable in x.

    Before a layer's first forward, subtracts the general adapters if so configured and builds the
    prototypes, as PEFT does.

    Args:
        layer: PEFT's LoRA layer.
        arrow: its active router.
        x: [..., in_features], M tokens.

    Returns:
        Weights [M, K].
    """
    router = arrow.router
    router.gen_know_sub(layer.lora_A, layer.lora_B)
    router.build_prototypes(layer.lora_A, layer.lora_B)
    prototypes: Any = router.prototypes
    tokens = x.reshape(-1, x.shape[-1]).to(layer.lora_A[arrow.experts[0]].weight.dtype)
    similarity = (tokens @ prototypes.t()).abs()
    best, index = similarity.topk(router.top_k, dim=1)
    scores = torch.full_like(similarity, float("-inf")).scatter(1, index, best)
    return torch.softmax(scores / router.temperature, dim=1)
