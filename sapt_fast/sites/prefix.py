"""Attention layers that read prefixes: rows before the keys and values of every sample.

    y = attention(q, [P_K ; K], [P_V ; V])

(Li and Liang, "Prefix-Tuning", ACL 2021; Wang et al., "DualPrompt", ECCV 2022, as Pre-T.) Every
query sees the prefix. Masks are extended by columns that mask nothing; columns of additive
position biases (BEiT, T5) are 0. Hidden states keep their shapes; attention maps have P further
columns, the first ones.

transformers' attention layers ask their config for the name of an attention function. A patched
layer has a stand-in for its config, which names `prefixed_attention`. That function puts the prefix
before the keys and values and calls the layer's own attention function. So a cache never contains
the prefix, and positions of tokens do not move.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sapt_fast.devices import execution_device
from sapt_fast.pools.own import Own
from sapt_fast.routing.running import Running
from sapt_fast.sites.image_embeddings import vision_parts
from sapt_fast.sites.report import PatchReport

__all__ = [
    "AtAttention",
    "attach_prefix",
    "detach_prefix",
    "find_attention",
    "prefix_size",
    "prefixed_attention",
    "require_prefix",
    "running_prefix_weights",
]

_NAME = "sapt_fast_prefix"
_KEYS = ("k_proj", "key", "k")  # the last one: T5
_FLASH = "flash"
_OTHER_INPUTS = {"pixel_values", "input_features", "input_values"}


class AtAttention(Own, nn.Module):
    """The base class of modules that give an attention layer its prefix."""

    def prefix(self, like: Tensor) -> Tensor | None:
        """Returns the rows [B, 2, P, D] before the keys and before the values of each sample.

        Args:
            like: the layer's keys [B, heads, T, D / heads]; the rows have their dtype and device.

        Returns:
            [B, 2, P, D]; [1, 2, P, D] for all samples alike; None for no prefix.
        """
        raise NotImplementedError


def running_prefix_weights(routing: Running, like: Tensor) -> Tensor | None:
    """Returns the weights (or places) by which a layer's prefixes are mixed (or chosen).

    Args:
        routing: the weights of the running forward.
        like: the layer's keys [B, heads, T, D / heads].

    Returns:
        [B, K], or [1, K] for all samples alike; None if there is no task yet.

    Raises:
        RuntimeError: if no forward of the model runs, or it has another batch.
    """
    if not routing.active():
        return None
    weights = routing.running
    if weights is None:
        raise RuntimeError(
            "an attention layer with prefixes got no weights: call the patched model itself, not a "
            "part of it; to recompute activations, use the model's own "
            "gradient_checkpointing_enable()"
        )
    if weights.shape[0] not in (1, like.shape[0]):
        raise RuntimeError(
            f"an attention layer with prefixes got {like.shape[0]} rows for {weights.shape[0]} "
            "samples, expected one row per sample"
        )
    return weights


class PrefixedConfig:
    """Stands in for the config of an attention layer, which names the attention function.

    Args:
        own: the layer's config.
        slot: the name of the layer's child that gives the prefix.
        eager: the attention function of the layer's file, which "eager" stands for.
    """

    own: Any
    slot: str
    eager: Callable[..., Any]

    def __init__(self, own: Any, slot: str, eager: Callable[..., Any]) -> None:
        self.own, self.slot, self.eager = own, slot, eager

    @property
    def _attn_implementation(self) -> str:
        return _NAME

    def __getattr__(self, name: str) -> Any:
        if name == "own" or name.startswith("__"):  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.own, name)


class _WithOwnConfig:
    """Shows an attention layer with its own config, which flash attention reads."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.config = layer.config.own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


# --- the attention function ---


def prefixed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **options: Any,
) -> Any:
    """The attention function of patched layers, as transformers' `AttentionInterface` calls it.

    Args:
        module: the patched layer.
        query: [B, heads, Q, D / heads].
        key, value: [B, key heads, S, D / heads].
        attention_mask: [B or 1, heads or 1, Q or 1, S], boolean or additive; for flash attention
            [B, S]; None for none.
        options: those of the layer's own attention function.

    Raises:
        RuntimeError: if the mask cannot be extended, or the prefix is of another batch.
    """
    config: PrefixedConfig = module.config
    name = config.own._attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, config.eager)
    layer = _WithOwnConfig(module) if name is not None and _FLASH in name else module
    source = module._modules.get(config.slot)  # a bare copy of the layer has none
    prefix = None if source is None else source.prefix(key)
    if prefix is None:
        return attend(layer, query, key, value, attention_mask, **options)
    keys, values = _by_head(module, prefix, key)
    length, tokens = keys.shape[2], key.shape[2]
    given = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if given is None else given
    mask = _extended(name, attention_mask, query, length, tokens, causal)
    if _FLASH in (name or "") and options.get("sliding_window") is not None:
        raise _unsupported(name, f"a sliding window of {options['sliding_window']} tokens")
    bias = options.get("position_bias")
    if bias is not None:
        options["position_bias"] = F.pad(bias, (length, 0))
    return attend(
        layer, query, torch.cat([keys, key], 2), torch.cat([values, value], 2), mask, **options
    )


ALL_ATTENTION_FUNCTIONS.register(_NAME, prefixed_attention)


def _by_head(module: Any, prefix: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Splits a prefix [B or 1, 2, P, D] into keys and values [B, key heads, P, D / heads]."""
    batch, heads, _, size = key.shape
    if prefix.shape[0] not in (1, batch) or prefix.shape[3] != heads * size:
        raise RuntimeError(
            f"{type(module).__name__}: got a prefix of shape {tuple(prefix.shape)} for keys of "
            f"shape {tuple(key.shape)}, expected [{batch}, 2, P, {heads * size}]"
        )
    prefix = prefix.to(key).expand(batch, -1, -1, -1)
    keys, values = prefix.unflatten(3, (heads, size)).transpose(2, 3).unbind(1)
    return keys, values


def _extended(
    name: str | None, mask: Any, query: Tensor, length: int, tokens: int, causal: bool
) -> Any:
    """Returns the mask of prefix and tokens; all queries see the prefix.

    Args:
        name: of the layer's own attention function.
        mask: of the tokens; None for none.
        query: [B, heads, Q, D / heads].
        length, tokens: P and S.
        causal: whether a missing mask means a causal one.
    """
    count = query.shape[2]
    if isinstance(mask, Tensor):
        if mask.shape[-1] != tokens or mask.dim() not in (2, 4):
            raise _unsupported(name, f"a mask of shape {tuple(mask.shape)} for {tokens} keys")
        visible = mask.dtype == torch.bool or mask.dim() == 2
        return F.pad(mask, (length, 0), value=True if visible else 0.0)
    if mask is not None:
        raise _unsupported(name, f"a mask of type {type(mask).__name__}")
    if not causal or name == "eager" or count == 1:
        return None
    if name != "sdpa":
        raise _unsupported(name, "a causal layer without a mask")
    # As sdpa: the first query sees the first token.
    causal_mask = torch.ones(count, tokens, dtype=torch.bool, device=query.device).tril()
    return F.pad(causal_mask, (length, 0), value=True)[None, None]


def _unsupported(name: str | None, what: str) -> RuntimeError:
    return RuntimeError(
        f"attention: {name!r} with {what} does not support prefixes; load the model with "
        "attn_implementation='eager' or 'sdpa'"
    )


# --- which layers ---


def find_attention(model: Any, layers: Sequence[int], name: str = "layers") -> PatchReport:
    """Returns the self-attention of these layers of a model of images alone, or of texts alone.

    Args:
        model: the model, which is not changed.
        layers: indices of layers, from 0; those of the encoder, if the model has a decoder too.
        name: of the argument or field with the indices, for messages.

    Raises:
        ValueError: if the model takes other inputs.
        ValueError: if it has no supported vision tower, no list of layers, or no such layer.
        ValueError: if a layer's attention does not use transformers' `AttentionInterface`.
    """
    start, blocks = _blocks(model)
    count = len(blocks)
    if not all(0 <= layer < count for layer in layers):
        raise ValueError(
            f"{name}: got {list(layers)}, expected 0 to {count - 1}: the model has {count} "
            "such layers"
        )
    report = PatchReport()
    for layer in layers:
        found = [p for p, m in blocks[layer].named_modules() if _is_attention(m)]
        if len(found) != 1 or _eager(blocks[layer].get_submodule(found[0])) is None:
            raise ValueError(
                f"{name}: layer {layer} of {type(model).__name__} has no attention that prefixes "
                "can be added to, expected one that calls transformers' attention functions"
            )
        report.patched.append(f"{start}.{layer}.{found[0]}")
    return report


def _blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """Returns path and list of the layers of a vision tower, an encoder, or else a decoder."""
    main = getattr(model, "main_input_name", None)
    if main == "pixel_values":
        parts = vision_parts(model)
        return parts.layers_path(), parts.layers
    place = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    others = _OTHER_INPUTS & {*inspect.signature(place.forward).parameters}
    if main != "input_ids" or others:
        takes = ", ".join([str(main), *sorted(others)])
        raise ValueError(
            f"model: got {type(model).__name__}, which takes {takes}; prefixes support models of "
            "images alone (pixel_values), or of texts alone (input_ids)"
        )
    inside = {*place.modules()}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and module in inside:
            return path, module
    raise ValueError(f"model: got {type(model).__name__} without a list of layers")


def prefix_size(layer: Any) -> tuple[int, torch.device]:
    """Returns D, the width of an attention layer's keys of all heads, and the layer's device."""
    keys = _key_layer(layer)
    return keys.out_features, execution_device(keys)


def attach_prefix(model: Any, path: str, slot: str, source: AtAttention) -> None:
    """Lets an attention layer read the prefix that `source` gives, as its child `slot`.

    Args:
        model: the model.
        path: the layer's path.
        slot: the name of the child.
        source: gives the prefix in every forward of the layer.

    Raises:
        ValueError: if the layer has a prefix already, or an attribute of that name.
    """
    layer = model.get_submodule(path)
    eager = _eager(layer)
    if hasattr(layer, slot) or isinstance(layer.config, PrefixedConfig) or eager is None:
        raise ValueError(f"{path}: got a layer with a prefix or {slot}, expected one without")
    layer.add_module(slot, source)
    layer.config = PrefixedConfig(layer.config, slot, eager)


def require_prefix(model: Any, path: str, slot: str) -> None:
    """Raises ValueError if the layer no longer has what `attach_prefix` put there."""
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{path}: the model has no such layer any more") from None
    config: Any = getattr(layer, "config", None)
    if slot not in layer._modules or not isinstance(config, PrefixedConfig):
        raise ValueError(
            f"{path}: got {type(layer).__module__}.{type(layer).__name__} without {slot}, expected "
            "the layer that patch changed; undo first what another library did to the model since"
        )


def detach_prefix(model: Any, path: str, slot: str) -> None:
    """Undoes `attach_prefix`."""
    layer = model.get_submodule(path)
    layer.config = layer.config.own
    delattr(layer, slot)


def _key_layer(layer: Any) -> Any:
    return next(
        (layer._modules[name] for name in _KEYS if layer._modules.get(name) is not None), None
    )


def _is_attention(module: Any) -> bool:
    return _key_layer(module) is not None and hasattr(module, "config")


def _eager(layer: Any) -> Callable[..., Any] | None:
    """Returns what "eager" stands for in a layer's file; None if the layer looks up nothing."""
    forward: Any = inspect.unwrap(type(layer).forward)
    known = getattr(forward, "__globals__", {})
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    looks_up = "_attn_implementation" in names and "ALL_ATTENTION_FUNCTIONS" in names
    shared = known.get("ALL_ATTENTION_FUNCTIONS") is ALL_ATTENTION_FUNCTIONS
    eager: Callable[..., Any] | None = known.get("eager_attention_forward")
    return eager if looks_up and shared else None
