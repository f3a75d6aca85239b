"""Arrow (Ostapenko et al., 2024) in PEFT's layers: its router's weights, our pass over the experts.

Arrow scores every token by |x . p_k|, p_k the first right singular vector of B_k A_k, and takes the
softmax over the top k. PEFT then keeps the output of every expert for every token; here these
weights go to the mixture of all experts, which never forms them. Prototypes and general knowledge
subtraction stay PEFT's.
"""

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.lora.variants import ArrowLinearVariant
from torch import Tensor


class Arrow(NamedTuple):
    """The active Arrow router of one layer.

    Attributes:
        router: PEFT's. experts: names of the adapters that it chooses from.
    """

    router: ArrowLoraLinearLayer
    experts: tuple[str, ...]


def arrow_of(layer: Any) -> Arrow | None:
    """The router, if it is the layer's only active adapter."""
    active = layer.active_adapters
    if len(active) != 1 or type(layer.lora_variant.get(active[0])) is not ArrowLinearVariant:
        return None
    router = layer.lora_arrow[active[0]]
    return Arrow(router, tuple(router.task_adapter_names))


def arrow_weights(layer: Any, arrow: Arrow, x: Tensor) -> Tensor:
    """The experts' weights, [M, K], of the M tokens of x [..., in_features]; differentiable in x.

    Does what PEFT does before a layer's first forward: subtracts the general adapters where that
    is configured, and builds the prototypes.
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
