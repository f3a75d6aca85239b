"""Where a mixture of prompts enters a model, and how the rest of the model is told.

The mixture is written before the input embeddings of the encoder or, in a decoder-only model, of
the first forward of a text; later forwards find it in the cache. Callers do not see it: masks,
position ids and labels stay as long as their tokens and are extended here, logits and hidden states
of a decoder-only model come out as long as its input. What does hold the prompt's positions is the
encoder's output, the cache, and the keys' side of attention maps.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from sapt_fast.routing.hooks import Routing, is_filled
from sapt_fast.routing.packing import find_segments
from sapt_fast.routing.stand_in import generation_arguments, positional_names

_ENCODER = {"input_ids", "inputs_embeds", "attention_mask"}
_DECODER = {*_ENCODER, "position_ids", "past_key_values"}
_KNOWN = {*_DECODER, "encoder_hidden_states", "encoder_attention_mask"}
_OTHER_INPUTS = {"pixel_values", "input_features", "global_attention_mask"}
_OUTPUTS = ("last_hidden_state", "hidden_states", "attentions", "cross_attentions")


class PromptRouting(Routing):
    """`Routing` of a model whose tasks have prompts, which it mixes and inserts.

    Args:
        model, route, active, count: as in `Routing`.
        pool: the prompts: `PromptPool`, or `ConcatenatedPrompts` by places in place of weights.
    """

    def __init__(self, model: Any, route: Any, active: Any, count: Any, pool: Any) -> None:
        super().__init__(model, route, active, count)
        self.pool = pool
        self.pools.append(pool)

    def checked(self, weights: Tensor) -> Tensor:
        """As `Routing.checked`, without weights per token."""
        weights = super().checked(weights)
        if weights.dim() == 3:
            raise ValueError(
                f"weights: got shape {tuple(weights.shape)}, expected [K] or [B, K]: a prompt is "
                "mixed for a whole sample, not per token"
            )
        return weights

    def install(self) -> None:
        """Adds the hooks; `remove` takes them away again."""
        super().install()
        place: Any = prompt_place(self.model)
        self._argument_names[type(place)] = positional_names(place.forward)
        self._hooks.append(place.register_forward_pre_hook(self._insert, with_kwargs=True))
        if self._is_encoder_decoder:
            decoder = self.model.get_decoder()
            self._argument_names[type(decoder)] = positional_names(decoder.forward)
            hook = decoder.register_forward_pre_hook(self._extend_cross_mask, with_kwargs=True)
            self._hooks.append(hook)
            return
        # Before Routing's own hook, which ends the forward.
        self._hooks.append(place.register_forward_hook(self._strip, prepend=True))
        if hasattr(self.model, "generate"):
            self._replace("_prefill", self._prefill)
            self._replace("_prepare_static_cache", self._prepare_static_cache)
            # A function of transformers unless the model has its own.
            name = "create_masks_for_generate"
            own = getattr(self.model, name, masking_utils.create_masks_for_generate)
            self._own_masks: Callable[..., Any] = own
            self._replace(name, self._create_masks)

    # --- which weights ---

    def _chosen(self, inputs: dict[str, Any], given: Tensor | None) -> Tensor | None:
        """As in `Routing`, except that a prompt which is in already stays the one that counts."""
        held, cache = inputs.get("encoder_outputs"), inputs.get("past_key_values")
        if self._is_encoder_decoder and held is not None:
            weights = self._from_encoder_outputs(held)
        elif not self._is_encoder_decoder and self._holds_prompt(cache):
            held, weights = cache, self._from_cache(cache)
        else:
            return super()._chosen(inputs, given)
        if given is not None and weights is not None:
            raise ValueError(
                f"mixture: got weights with a {type(held).__name__} that holds a prompt already; "
                "give them to the forward that makes it"
            )
        return weights

    def _holds_prompt(self, cache: Any) -> bool:
        """Whether a decoder-only model's cache has the prompt of its text."""
        if cache is None or not self.active():
            return False
        ours = getattr(cache, "routing_weights", None) is not None
        # To look into a static cache waits for the GPU, and breaks a graph.
        if torch.compiler.is_compiling() or (ours and self.is_generating):
            return ours
        return is_filled(cache)

    # --- before and after the module that takes the embeddings ---

    def _insert(
        self, module: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        forward = self._forward
        if forward is None or not self.active():
            return None
        inputs = self._named(module, args, kwargs)
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        source = ids if embeds is None else embeds
        if source is None or (ids is not None and embeds is not None):
            return None  # the model has a word for that
        mask, tokens = inputs.get("attention_mask"), source.shape[1]
        causal = not self._is_encoder_decoder
        if causal and self._holds_prompt(inputs.get("past_key_values")):
            # One that is no [B, T] comes from _create_masks.
            if isinstance(mask, Tensor) and mask.dim() == 2:
                mask = self._extended(mask)
            positions = self._positions(inputs.get("position_ids"), mask, tokens)
            return (), {**inputs, "attention_mask": mask, "position_ids": positions}
        if not self.is_generating:  # which has looked at what it was given
            self._refuse_packed(inputs)
        self._require_room(inputs, tokens)
        weights: Any = forward.per_row
        mixed = self.pool(weights, module.get_input_embeddings(), ids, embeds)
        mask = None if mask is None else self._extended(mask)
        inputs = {**inputs, "input_ids": None, "inputs_embeds": mixed, "attention_mask": mask}
        if causal:
            forward.inserted = True
            given = inputs.get("position_ids")
            positions = self._positions(given, mask, self.pool.length + tokens)
            if given is not None and positions is not None:
                first = torch.arange(self.pool.length, device=given.device)
                positions = torch.cat([first.expand(len(given), -1), positions], 1)
            inputs["position_ids"] = positions
        return (), inputs

    def _strip(self, module: nn.Module, args: tuple, output: Any) -> Any:
        forward = self._forward
        if forward is None or not forward.inserted:
            return None
        forward.inserted = False
        if isinstance(output, tuple):
            return tuple(self._without_prompt(value) for value in output)
        for name in _OUTPUTS:
            if output.get(name) is not None:
                output[name] = self._without_prompt(output[name])
        return output

    def _without_prompt(self, value: Any) -> Any:
        """Hidden states [B, P + T, D] or attention maps [B, H, P + T, S] without the first P."""
        if isinstance(value, tuple):
            return tuple(self._without_prompt(inner) for inner in value)
        if not isinstance(value, Tensor):
            return value
        return value[:, self.pool.length :] if value.dim() == 3 else value[:, :, self.pool.length :]

    def _extend_cross_mask(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        inputs = self._named(module, args, kwargs)
        mask, hidden = inputs.get("encoder_attention_mask"), inputs.get("encoder_hidden_states")
        if mask is None or hidden is None or not self.active():
            return None
        if mask.shape[-1] == hidden.shape[1]:
            return None
        mask = self._extended(mask)
        if mask.shape[1] != hidden.shape[1]:
            raise ValueError(
                f"attention_mask: got {mask.shape[1] - self.pool.length} tokens, expected "
                f"{hidden.shape[1] - self.pool.length}, those of encoder_outputs without the prompt"
            )
        return (), {**inputs, "encoder_attention_mask": mask}

    def _extended(self, mask: Any) -> Tensor:
        """[B, P + T]"""
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask: got {got}, expected [B, T], to which the prompt is added"
            )
        return torch.cat([mask.new_ones(mask.shape[0], self.pool.length), mask], 1)

    def _positions(self, given: Tensor | None, mask: Any, count: int) -> Tensor | None:
        """Positions of the last `count` columns of an extended mask, or the given ones moved on.

        None where neither says that there is padding, which leaves them to the model.
        """
        if given is not None:
            if given.dim() != 2:
                raise ValueError(
                    f"position_ids: got shape {tuple(given.shape)}, expected [B, T], to which the "
                    "prompt is added"
                )
            return given + self.pool.length
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return None
        return (mask.long().cumsum(1) - 1)[:, -count:]

    def _refuse_packed(self, inputs: Mapping[str, Any]) -> None:
        segments = find_segments(inputs, self._is_causal)
        if segments is not None:
            raise RuntimeError(
                f"position_ids: got {len(segments)} texts in {segments.shape[0]} rows, but a "
                "prompt can only be written before a whole row, not before each text in it: give "
                "each text a row of its own, with an attention_mask where it is padded"
            )

    def _require_room(self, inputs: dict[str, Any], tokens: int) -> None:
        for name, value in inputs.items():
            long = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == tokens
            if name == "cache_position" or (long and name not in _KNOWN):
                if value is None:
                    continue
                raise ValueError(
                    f"{name}: got shape {tuple(value.shape)}, expected None: it would have to tell "
                    "about the prompt, too"
                )
        config = self.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        rotary = getattr(config, "rope_parameters", None) is not None
        if limit is not None and not rotary and self.pool.length + tokens > limit:
            raise ValueError(
                f"input_ids: got {tokens} tokens, expected at most {limit - self.pool.length}: a "
                f"prompt of {self.pool.length} stands before them, and the model has {limit} "
                "positions"
            )

    # --- methods that stand in for the model's own ---

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_encoder_decoder and self.active():
            named = generation_arguments(self._own("generate"), args, kwargs)
            if getattr(named.get("generation_config"), "is_assistant", None):
                raise RuntimeError(
                    f"this {type(self.model).__name__} mixes prompts and cannot draft for another "
                    "or, by early exit, for itself: the drafting counts a cache's tokens and finds "
                    "the prompt's among them; use a model without prompts as assistant_model, or "
                    "prompt_lookup_num_tokens"
                )
            cache = named.get("past_key_values")
            if not is_filled(cache):
                self._refuse_packed(self._prompt_of(named))
                if cache is not None:
                    cache.routing_weights = None  # of a text before its reset()
        return super()._generate(*args, **kwargs)

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        cache: Any = model_kwargs.get("past_key_values")
        if self._holds_prompt(cache):
            # The model's own takes the cache's length for that of the tokens it has seen.
            if (
                generation_config.prefill_chunk_size
                or model_kwargs.get("inputs_embeds") is not None
            ):
                raise ValueError(
                    "past_key_values: got a cache that holds a prompt, expected none with "
                    "inputs_embeds or prefill_chunk_size"
                )
            mask = model_kwargs.get("attention_mask")
            told = getattr(generation_config, "_mask_length", -1)
            if input_ids.shape[1] == (told if mask is None else mask.shape[1]):
                input_ids = input_ids[:, int(cache.get_seq_length()) - self.pool.length :]
        own = self._own("_prefill")
        return own(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _prepare_static_cache(
        self, cache_implementation: str, batch_size: int, max_cache_len: int, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        length = max_cache_len + (self.pool.length if self.active() else 0)
        own = self._own("_prepare_static_cache")
        return own(cache_implementation, batch_size, length, *args, **kwargs)

    def _create_masks(
        self,
        *args: Any,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if self.active():
            if not self._holds_prompt(past_key_values):
                return attention_mask  # the forward that inserts the prompt makes its own
            attention_mask = None if attention_mask is None else self._extended(attention_mask)
        return self._own_masks(
            *args, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )


def prompt_place(model: Any) -> Any:
    """The module of a model whose input embeddings get the prompt.

    Raises:
        ValueError: it has none that takes embeddings, a mask and, in a decoder-only model,
            positions.
    """
    encodes = bool(getattr(model.config, "is_encoder_decoder", False))
    place = model.get_encoder() if encodes else model.base_model
    parameters = set(inspect.signature(place.forward).parameters)
    missing = sorted((_ENCODER if encodes else _DECODER) - parameters)
    causal = model.can_generate() or any(
        getattr(module, "is_causal", False) for module in place.modules()
    )
    reason = None
    if missing:
        reason = f"{type(place).__name__} takes no {', '.join(missing)}"
    elif not encodes and not causal:
        reason = "it is an encoder, whose pooling reads the first position"
    elif not _OTHER_INPUTS.isdisjoint(parameters):
        reason = f"{type(place).__name__} takes more than text"
    if reason is not None:
        raise ValueError(
            f"adapter: got 'prompt' for {type(model).__name__}, but {reason}; expected an "
            "encoder-decoder or decoder-only language model, or adapter='lora'"
        )
    return place
