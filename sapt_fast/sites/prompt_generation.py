"""`generate` of a decoder-only model whose cache begins with a prompt."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from sapt_fast.routing.generation import Generation, is_filled, prompt_of
from sapt_fast.routing.router_call import RouterCall
from sapt_fast.routing.running import Running
from sapt_fast.routing.stand_in import generation_arguments
from sapt_fast.sites.prompt_inputs import extended_mask, refuse_packed


class PromptGeneration(Generation):
    """`Generation`, where caches are P longer than the text that they hold.

    Args:
        model: the transformers model (inside any wrapper).
        running: its running weights.
        router: computes those of a prompt.
        length: P, now.
    """

    def __init__(
        self, model: Any, running: Running, router: RouterCall, length: Callable[[], int]
    ) -> None:
        super().__init__(model, running, router)
        self.length = length

    def stand_ins(self) -> dict[str, Callable[..., Any]]:
        methods = super().stand_ins()
        if "generate" not in methods or self.router.is_encoder_decoder:
            return methods
        return {
            **methods,
            "_prefill": self._prefill,
            "_prepare_static_cache": self._prepare_static_cache,
            "create_masks_for_generate": self._create_masks,
        }

    def holds_prompt(self, cache: Any) -> bool:
        """Returns whether a decoder-only model's cache contains the prompt of its text."""
        if cache is None or not self.running.active():
            return False
        ours = getattr(cache, "routing_weights", None) is not None
        # To look into a static cache waits for the GPU, and breaks a graph.
        if torch.compiler.is_compiling() or (ours and self.running.is_generating):
            return ours
        return is_filled(cache)

    def generate(
        self, own: Callable[..., Any], *args: Any, mixture: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As `Generation.generate`.

        Raises:
            RuntimeError: if the model drafts for another, or the prompt has packed rows.
        """
        if not self.router.is_encoder_decoder and self.running.active():
            named = generation_arguments(own, args, kwargs)
            if getattr(named.get("generation_config"), "is_assistant", None):
                raise RuntimeError(
                    f"this {type(self.model).__name__} mixes prompts and cannot draft for another "
                    "or, by early exit, for itself: the drafting counts a cache's tokens and finds "
                    "the prompt's among them; use a model without prompts as assistant_model, or "
                    "prompt_lookup_num_tokens"
                )
            cache = named.get("past_key_values")
            if not is_filled(cache):
                refuse_packed(prompt_of(self.model, named), self.router.is_causal)
                if cache is not None:
                    cache.routing_weights = None  # of a text before its reset()
        return super().generate(own, *args, mixture=mixture, **kwargs)

    def _prefill(
        self, own: Callable[..., Any], input_ids: Tensor, generation_config: Any,
        model_kwargs: dict[str, Any], *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        cache: Any = model_kwargs.get("past_key_values")
        if self.holds_prompt(cache):
            # The model's own takes the cache's length for that of the tokens it has seen.
            if (
                generation_config.prefill_chunk_size
                or model_kwargs.get("inputs_embeds") is not None
            ):
                raise ValueError(
                    "past_key_values: got a cache that contains a prompt, expected none with "
                    "inputs_embeds or prefill_chunk_size"
                )
            mask = model_kwargs.get("attention_mask")
            told = getattr(generation_config, "_mask_length", -1)
            if input_ids.shape[1] == (told if mask is None else mask.shape[1]):
                input_ids = input_ids[:, int(cache.get_seq_length()) - self.length() :]
        return own(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _prepare_static_cache(
        self, own: Callable[..., Any], cache_implementation: str, batch_size: int,
        max_cache_len: int, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        length = max_cache_len + (self.length() if self.running.active() else 0)
        return own(cache_implementation, batch_size, length, *args, **kwargs)

    def _create_masks(
        self,
        own: Callable[..., Any] | None,
        *args: Any,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if self.running.active():
            if not self.holds_prompt(past_key_values):
                return attention_mask  # the forward that inserts the prompt makes its own
            if attention_mask is not None:
                attention_mask = extended_mask(attention_mask, self.length())
        # Most models have none and use the function of transformers.
        make: Callable[..., Any] = own or masking_utils.create_masks_for_generate
        return make(*args, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs)
