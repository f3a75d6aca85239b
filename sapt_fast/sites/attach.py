"""Adds a pool of adapters to linear layers, and removes it again."""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from sapt_fast.devices import execution_device
from sapt_fast.pools.lora import AdapterPool
from sapt_fast.routing.hooks import Routing
from sapt_fast.routing.running import Running
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
    pool = AdapterPool(
        *layer_features(module),
        reserve=config.reserve_tasks * config.r,
        device=execution_device(module),
        dtype=config.adapter_dtype(weight_dtype(module, embedding_dtype)),
    )
    put_pool(module, pool, routing, config.lora_dropout, config.grad_through_frozen)


def weight_dtype(module: Any, otherwise: torch.dtype) -> torch.dtype:
    """Returns the dtype of a layer's weight; `otherwise` for a quantised layer."""
    dtype: torch.dtype = module.weight.dtype if packed_weight(module) is None else otherwise
    return dtype


def put_pool(
    module: Any,
    pool: AdapterPool,
    routing: Running,
    dropout: float,
    grad_through_frozen: bool = True,
) -> None:
    """Gives a layer a pool, and the class whose forward mixes it; `restore` undoes it.

    Args:
        module: the layer.
        pool: its adapters.
        routing: tells by which weights the layer mixes.
        dropout, grad_through_frozen: as in `sites.linear.Mixed`.
    """
    module.sapt_pool = pool
    module.sapt_routing = routing
    module.sapt_dropout = dropout
    module.sapt_grad_through_frozen = grad_through_frozen
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


def reads_encoder(model: Any, path: str) -> bool:
    """Returns whether a layer's input are the tokens of the model's encoder.

    They are for the encoder's own layers, and for keys and values of cross-attention.
    """
    if not getattr(model.config, "is_encoder_decoder", False):
        return False
    layer = model.get_submodule(path)
    if any(layer is module for module in model.get_encoder().modules()):
        return True
    parent, _, name = path.rpartition(".")
    crosses = not set(parent.split(".")).isdisjoint(_CROSS_ATTENTION)
    return crosses and any(name in names[1:] for names in _ONE_INPUT if len(names) == 3)


def restore(module: Any) -> None:
    become(module, base_kind(module))
    for name in ("sapt_pool", "sapt_routing", "sapt_dropout", "sapt_grad_through_frozen"):
        delattr(module, name)
    vars(module).pop("sapt_group", None)
