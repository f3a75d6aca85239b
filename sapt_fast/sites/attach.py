"""Adds a pool of adapters to linear layers, and removes it again."""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from sapt_fast.devices import execution_device
from sapt_fast.pools.lora import AdapterPool
from sapt_fast.routing.hooks import Routing
from sapt_fast.sites.find import layer_features
from sapt_fast.sites.linear import (
    InputGroup,
    MixedLinear,
    base_kind,
    become,
    mixed_kind,
    packed_weight,
)

# Layers of one parent that these models call one after the other on the same input.
_ONE_INPUT = (
    ("q", "k", "v"),
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wi_0", "wi_1"),
    ("gate_proj", "up_proj"),
)
_ONE_INPUT_MODELS = (
    *("bart", "bert", "gemma", "gemma2", "llama", "mbart", "mistral"),
    *("mt5", "qwen2", "qwen3", "roberta", "t5", "umt5"),
)
_CROSS_ATTENTION = ("EncDecAttention", "encoder_attn", "crossattention")


class Mixing(Protocol):
    """The fields of a method's config that determine how its layers mix adapters."""

    r: int
    lora_dropout: float
    grad_through_frozen: bool
    reserve_tasks: int

    def adapter_dtype(self, base: torch.dtype) -> torch.dtype:
        """Returns the dtype of adapters for base weights of dtype `base`."""


def mix_adapters(
    module: Any, routing: Routing, config: Mixing, embedding_dtype: torch.dtype
) -> None:
    packed = packed_weight(module)
    dtype = module.weight.dtype if packed is None else embedding_dtype
    module.sapt_pool = AdapterPool(
        *layer_features(module),
        reserve=config.reserve_tasks * config.r,
        device=execution_device(module),
        dtype=config.adapter_dtype(dtype),
    )
    module.sapt_routing = routing
    module.sapt_dropout = config.lora_dropout
    module.sapt_grad_through_frozen = config.grad_through_frozen
    kind = mixed_kind(module)
    assert kind is not None  # as `find_layers` saw
    become(module, kind)


def group_by_input(model: PreTrainedModel, patched: Iterable[str]) -> None:
    """Groups the layers that share an input, so that they are computed together."""
    if model.config.model_type not in _ONE_INPUT_MODELS:
        return
    layers = set(patched)
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in layers):
        crosses = not set(parent.split(".")).isdisjoint(_CROSS_ATTENTION)
        for names in _ONE_INPUT:
            alike = names[1:] if crosses and len(names) == 3 else names  # queries: other input
            paths = [f"{parent}.{name}" for name in alike]
            members = [model.get_submodule(path) for path in paths if path in layers]
            linear = [member for member in members if isinstance(member, MixedLinear)]
            if len(linear) > 1:
                group = InputGroup(linear)
                for layer in linear:
                    layer.sapt_group = group


def restore(module: Any) -> None:
    become(module, base_kind(module))
    for name in ("sapt_pool", "sapt_routing", "sapt_dropout", "sapt_grad_through_frozen"):
        delattr(module, name)
    vars(module).pop("sapt_group", None)
