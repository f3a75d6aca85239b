"""Runs the forwards of a model, whatever wraps or patches it."""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from sapt_fast.generation.row_cache import PairedRowCache, RowCache, full_attention_layers
from sapt_fast.methods.base import handles
from sapt_fast.methods.edits.handle import LoggedHandle
from sapt_fast.methods.peft.xlora import XLoraHandle
from sapt_fast.methods.peft.xlora_generation import PairedCache
from sapt_fast.routing.generation import is_filled

# Rotary embeddings of these kinds do not depend on the length of the batch's longest text.
_FIXED_ROPE = {"default", "linear", "llama3", "yarn"}
_MASKED_ATTENTION = ("eager", "sdpa")


class Forwards:
    """The forwards of one model on token ids with a cache.

    Args:
        model: a transformers model with a language modelling head, or a PeftModel of one.

    Attributes:
        base: the transformers model inside of PEFT's wrapper.
        config: its config.
        encodes: whether it is an encoder-decoder model.
        handle: the handle of the pool of adapters, if it is patched and has one.

    Raises:
        ValueError: if the model cannot generate with a cache, or is in training mode.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        can = getattr(self.base, "can_generate", None)
        if can is None or not can():
            raise ValueError(
                f"model: got {type(model).__name__}, expected a transformers model that generates "
                "text"
            )
        if model.training:
            raise ValueError("model: got a model in training mode, expected model.eval() before")
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            raise ValueError("model: got a PeftModel with prompt tuning, which is not supported")
        self.config: Any = self.base.config
        self.encodes = bool(getattr(self.config, "is_encoder_decoder", False))
        found = self._found = handles(model) or handles(self.base)
        xlora = next((one for one in found if isinstance(one, XLoraHandle)), None)
        self._xlora = None if xlora is None else xlora.generation
        if self._xlora is None and _is_xlora(model):
            raise ValueError(
                "model: got an X-LoRA model, which has no cache: call sapt_fast.patch(model) first"
            )
        self.handle: Any = next((one for one in found if one.routing is not None), None)
        self._sites = {one.site for one in found}
        self._names = set(inspect.signature(self.base.forward).parameters)
        self.encoder_outputs: Any = None

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        device: torch.device = self.base.get_input_embeddings().weight.device
        return device

    @property
    def routes(self) -> bool:
        """Whether texts that share a prefix may have weights of their own from the router."""
        handle = self.handle
        lora = handle is not None and handle.site == "linear" and hasattr(handle, "route")
        return lora and bool(handle.routing.routes)

    @property
    def shares(self) -> bool:
        """Whether texts may share the keys and values of a prefix.

        Layers that decide at the last token of a prompt what holds for it have to read it whole.
        """
        return not any(isinstance(one, LoggedHandle) for one in self._found)

    def row_layers(self) -> int | None:
        """How many layers a `RowCache` needs; None if the model cannot use one.

        Each row has positions of its own: the model must take them, and nothing in it may depend
        on the place of a token in the cache.
        """
        if self.encodes or "position_ids" not in self._names or self._sites - {"linear"}:
            return None
        if self.config._attn_implementation not in _MASKED_ATTENTION or not _has_fixed_rope(
            self.config
        ):
            return None
        return full_attention_layers(self.config)

    def row_cache(self, layers: int, rows: int, columns: int) -> RowCache:
        """Returns an empty cache with places for rows."""
        kind = RowCache if self._xlora is None else PairedRowCache
        return kind(layers, rows, columns)

    def cache(self) -> Any:
        """Returns an empty cache of the model's own kind."""
        config = self.config.get_text_config(decoder=True)
        if self.encodes:
            return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        return DynamicCache(config=config) if self._xlora is None else PairedCache(config)

    @torch.no_grad()
    def encode(self, ids: list[int], mixture: Tensor | None) -> None:
        """Runs the encoder on the tokens of one text; later forwards read its output."""
        with self._weights(mixture):
            inputs = torch.tensor([ids], device=self.device)
            self.encoder_outputs = self.base.get_encoder()(
                input_ids=inputs, attention_mask=torch.ones_like(inputs), return_dict=True
            )

    @torch.no_grad()
    def __call__(
        self,
        ids: Tensor,
        cache: Any,
        *,
        mixture: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Returns the logits [n, V] of the last tokens.

        Args:
            ids: [n, T].
            cache: of n rows.
            mixture: weights [1, K] or [n, K] of a patched model; None: those of the cache, or the
                router's.
            mask: [n, tokens in the cache and T]; None if nothing is masked.
            positions: [n, T]; None: those after the cache.
        """
        inputs: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        inputs["decoder_input_ids" if self.encodes else "input_ids"] = ids
        if self.encodes:
            inputs["encoder_outputs"] = self._encoded(ids.shape[0])
        elif mixture is not None and is_filled(cache):
            cache.routing_weights = mixture  # a text with prompts keeps those of its cache
        if mask is not None:
            inputs |= {"attention_mask": mask, "position_ids": positions}
        if "logits_to_keep" in self._names:
            inputs["logits_to_keep"] = 1
        if self._xlora is not None:
            with self._xlora.by_hand(cache):
                logits = self.base(**inputs).logits
        else:
            with self._weights(mixture):
                logits = self.model(**inputs, return_dict=True).logits
        last: Tensor = logits[:, -1]
        return last

    def _encoded(self, rows: int) -> Any:
        """The encoder's output, with a row for each text."""
        outputs = copy.copy(self.encoder_outputs)
        hidden = outputs["last_hidden_state"]
        outputs["last_hidden_state"] = hidden.expand(rows, *hidden.shape[1:])
        return outputs

    @contextmanager
    def _weights(self, mixture: Tensor | None) -> Iterator[None]:
        if mixture is None:
            yield
        else:
            with self.handle.routing.pin(mixture):
                yield

    @torch.no_grad()
    def route(self, texts: list[list[int]]) -> Tensor:
        """Returns the router's weights [B, K] for each text, alone."""
        route: Callable[..., Tensor] = self.handle.route
        return torch.cat([route(torch.tensor([ids], device=self.device)) for ids in texts])


def _is_xlora(model: Any) -> bool:
    configs = getattr(model, "peft_config", None)
    return isinstance(configs, dict) and any(
        getattr(config, "peft_type", None) == "XLORA" for config in configs.values()
    )


def _has_fixed_rope(config: Any) -> bool:
    given = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    by_layer = [value for value in given.values() if isinstance(value, dict)]
    kinds = {value.get("rope_type", "default") for value in by_layer or [given]}
    return kinds <= _FIXED_ROPE
