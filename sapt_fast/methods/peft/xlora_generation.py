"""X-LoRA generation with key-value caches, for models in which it yields PEFT's tokens.

PEFT computes the whole text twice for every new token: once with constant scalings, whose last
hidden states the classifier reads, and once with the classifier's scalings. Three conditions make
a cache exact:

- The model is causal and in eval mode, so a token's hidden state depends only on tokens up to it.
- The classifier, its softmax and top-k read one token at a time.
- The experts of a token are scaled by the token's own scalings.

Neither pass then changes its results for earlier tokens, so each can cache its keys and values. If
a condition is not known to be met, PEFT's generation runs unchanged and the reason is logged once.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache
from transformers.utils import ModelOutput

from sapt_fast.routing.stand_in import generation_arguments

logger = logging.getLogger(__name__)

# Text models whose attention is causal and whose cache is complete; each is tested.
_CAUSAL_MODELS = (
    *("gemma", "gemma2", "granite", "llama", "mistral", "olmo2"),
    *("phi", "qwen2", "qwen3", "smollm3", "starcoder2"),
)
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
# Other kinds rotate a token's keys again when the text grows.
_FIXED_ROPE = {"default", "linear", "llama3", "yarn"}
# Arguments of generate that change what is computed, or what a step returns.
_PLAIN_SETTINGS = (
    *("assistant_early_exit", "assistant_model", "cache_implementation", "constraints"),
    *("custom_generate", "dola_layers", "force_words_ids", "guidance_scale", "inputs_embeds"),
    *("num_beam_groups", "output_attentions", "output_hidden_states", "past_key_values"),
    *("penalty_alpha", "position_ids", "prefill_chunk_size", "prompt_lookup_num_tokens", "use_mtp"),
)
_NEUTRAL = {"guidance_scale": 1, "num_beam_groups": 1, "penalty_alpha": 0}


class PairedCache(DynamicCache):
    """The caches of both passes: this one is for the mixed pass.

    Args:
        config: the model's config.

    Attributes:
        scaling: the cache of the scaling pass.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.scaling = DynamicCache(config=config)
        self._scalings: list[Tensor] = []
        self._order: Tensor | None = None  # of the rows, since the last forward

    def scalings(self) -> Tensor | None:
        """Returns the scalings [B, T, layers, K] of all tokens so far, rows as in the last forward.

        None before the first forward.
        """
        return torch.cat(self._scalings, 1) if self._scalings else None

    def append(self, scalings: Tensor) -> None:
        """Appends the scalings [B, tokens, layers, K] of one forward."""
        if self._order is not None:
            self._scalings = [torch.cat(self._scalings, 1).index_select(0, self._order)]
            self._order = None
        self._scalings.append(scalings)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Replaces row b by row beam_idx[b] in both caches and the scalings."""
        super().reorder_cache(beam_idx)
        self.scaling.reorder_cache(beam_idx)
        self._order = beam_idx if self._order is None else self._order.index_select(0, beam_idx)


class _Running(threading.local):
    """The state of this thread's generation.

    Attributes:
        cache: the cache of the running `generate`; None outside of one.
        scalings: [B, T, layers, K], of the experts in the running pass.
        base_only: whether the scalings are zeros, so that the experts add nothing.
    """

    cache: PairedCache | None = None
    scalings: Tensor | None = None
    base_only: bool = False


class CachedGeneration:
    """Replaces `generate` of one patched X-LoRA model.

    Args:
        model: PeftModel with X-LoRA.
        all_pooled: whether `patch` has replaced the forward of every adapted layer.

    Attributes:
        logged: the reasons for running without a cache that were logged already.
    """

    def __init__(self, model: PeftModel, *, all_pooled: bool) -> None:
        self.model: Any = model
        self._all_pooled = all_pooled
        self._running = _Running()
        self.logged: set[str] = set()
        self._replaced: list[tuple[Any, str, Any]] = []
        self._hook: Any = None

    @property
    def running(self) -> _Running:
        """The state of this thread's generation."""
        return self._running

    @property
    def obstacle(self) -> str | None:
        """Why this model generates as in PEFT; None if it depends only on a call's arguments."""
        if not self._all_pooled:
            return "layers other than linear ones have experts"
        return _obstacle(self.model.get_base_model())

    def install(self) -> None:
        """Replaces methods of the instance; `remove` restores them."""
        xlora = self.model.base_model
        for owner, name, method in (
            (self.model, "generate", self._generate),
            (xlora, "generate", self._generate_inside),
            (xlora, "_enable_peft_forward_hooks", self._forward_hooks),
        ):
            self._replaced.append((owner, name, vars(owner).get(name)))
            vars(owner)[name] = method
        inner = xlora.lora_model.model
        self._hook = inner.register_forward_pre_hook(self._scale, with_kwargs=True)

    def remove(self) -> None:
        """Undoes `install`."""
        for owner, name, before in self._replaced:
            if before is None:
                del vars(owner)[name]
            else:
                vars(owner)[name] = before
        self._hook.remove()

    def _own(self, owner: Any, name: str) -> Callable[..., Any]:
        before = next(b for o, n, b in self._replaced if o is owner and n == name)
        return getattr(type(owner), name).__get__(owner) if before is None else before

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        generate = self._own(self.model, "generate")
        reason = self.obstacle or self._call_obstacle(args, kwargs)
        if reason is not None:
            if reason not in self.logged:
                self.logged.add(reason)
                logger.warning("X-LoRA generates without a cache, as in PEFT: %s", reason)
            with self._within(None):
                return generate(*args, **kwargs)
        inner = self.model.get_base_model()
        cache = PairedCache(inner.config.get_text_config(decoder=True))
        try:
            with self._within(cache):
                output = generate(*args, **kwargs)
        finally:  # as in PEFT, also after an error: the scalings of all tokens so far
            if (scalings := cache.scalings()) is not None:
                self.model.base_model.internal_xlora_scalings = scalings
        if isinstance(output, ModelOutput):  # no other call could continue with the cache
            kept = {name: value for name, value in output.items() if value is not cache}
            return type(output)(**kept)
        return output

    @contextmanager
    def by_hand(self, cache: Any) -> Iterator[None]:
        """Lets forwards of the base model use a cache, outside of `generate`.

        Args:
            cache: a `PairedCache`, or another cache with `scaling` and `append`; None if no cache
                is used.

        Raises:
            ValueError: if the tokens would not be those of PEFT.
        """
        reason = self.obstacle or self._call_obstacle((), {})
        if reason is not None:
            raise ValueError(f"model: X-LoRA has no exact cache here: {reason}")
        with self._within(cache):
            yield

    @contextmanager
    def _within(self, cache: PairedCache | None) -> Iterator[None]:
        """Sets the state for one `generate`, and restores that of an outer `generate` after it."""
        running, before = vars(self._running), vars(self._running).copy()
        running.clear()
        running["cache"] = cache
        try:
            yield
        finally:
            running.clear()
            running.update(before)

    def _call_obstacle(self, args: tuple, kwargs: dict[str, Any]) -> str | None:
        xlora, config = self.model.base_model, self.model.base_model.xlora_config
        classifier = xlora.internal_xlora_classifier
        if xlora.disabled:
            return "the adapters are disabled"
        if any(module.training for module in xlora.modules() if module is not xlora):
            return "the model or a part of it is in training mode; call model.eval()"
        if classifier.scalings_logging:
            return "the scalings are being logged"
        if config.top_k_lora is not None and classifier.override_scaling_pass_value != 0:
            return "the top k of equal scalings in the scaling pass are ambiguous"
        named = generation_arguments(self.model.get_base_model().generate, args, kwargs)
        if named.get("use_cache", True) is False:
            return "use_cache=False was given"
        given = named.get("generation_config")
        settings = [named, vars(given) if given else {}, vars(self.model.generation_config)]
        for name in _PLAIN_SETTINGS:
            value = next((s[name] for s in settings if s.get(name) is not None), None)
            if value is not None and value is not False and _NEUTRAL.get(name) != value:
                return f"{name} was given"
        return None

    def _generate_inside(self, *args: Any, **kwargs: Any) -> Any:
        xlora, cache = self.model.base_model, self._running.cache
        if cache is None:
            return self._own(xlora, "generate")(*args, **kwargs)
        return xlora.lora_model.generate(
            *args, **{**kwargs, "use_cache": True, "past_key_values": cache}
        )

    def _forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        if self._running.cache is not None:
            return nullcontext()
        own = self._own(self.model.base_model, "_enable_peft_forward_hooks")
        return own(*args, **kwargs)

    def _scale(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the base model: the scaling pass, then the classifier."""
        running = self._running
        cache = running.cache
        if cache is None:
            return
        own = kwargs.get("past_key_values") is cache
        if not own:
            raise RuntimeError(
                "X-LoRA: calling the model inside its own generate (from a logits processor, for "
                "example) is not possible with a cache; call generate with use_cache=False"
            )
        xlora = self.model.base_model
        classifier = xlora.internal_xlora_classifier
        with self._scaled(classifier.make_dummy_scalings(*args, **kwargs)):
            running.base_only = classifier.override_scaling_pass_value == 0
            inputs = {**kwargs, "past_key_values": cache.scaling}
            inputs.update(output_hidden_states=True, return_dict=True)
            result = module.forward(*args, **inputs)
        scalings = classifier(*args, result=result, **kwargs)
        running.scalings = xlora.internal_xlora_scalings = scalings
        cache.append(scalings)

    @contextmanager
    def _scaled(self, scalings: Tensor) -> Iterator[None]:
        self._running.scalings = scalings
        try:
            yield
        finally:
            self._running.scalings, self._running.base_only = None, False

    # A copy of the model starts without a running generation.
    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_running"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _running=_Running())


def _obstacle(model: Any) -> str | None:
    """Returns why a model's hidden states or caches may not be causal and complete, or None."""
    config = model.config
    known = config.model_type in _CAUSAL_MODELS
    if not known or not type(model).__module__.startswith("transformers.models."):
        return f"{type(model).__name__} ({config.model_type}) is not among the models tested for it"
    if not getattr(config, "is_causal", True) or getattr(
        config, "use_bidirectional_attention", False
    ):
        return "its attention is not causal"
    if config._attn_implementation not in _ATTENTION:
        return f"attention implementation {config._attn_implementation!r} is unknown"
    moving = _rope_types(config) - _FIXED_ROPE
    if moving:
        return f"rotary embedding {sorted(moving)} depends on the length of the text"
    return None


def _rope_types(config: Any) -> set[str]:
    given = getattr(config, "rope_parameters", None) or {}
    by_layer = [value for value in given.values() if isinstance(value, dict)]
    return {value.get("rope_type", "default") for value in by_layer or [given]}
