"""Where a mixture of prompts enters a model.

The mixture is written before the input embeddings of the encoder or, in a decoder-only model, of
the first forward of a text; later forwards find it in the cache. Callers do not see it: masks,
position ids and labels stay as long as their tokens and are extended here, logits and hidden states
of a decoder-only model are as long as its input. Only the encoder's output, the cache, and the
keys' side of attention maps contain the prompt's positions.
"""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sapt_fast.ops import transforms
from sapt_fast.pools.prompts import ConcatenatedPrompts
from sapt_fast.routing.forward import Forward
from sapt_fast.routing.hooks import Routing
from sapt_fast.routing.stand_in import positional_names
from sapt_fast.sites.prompt_generation import PromptGeneration
from sapt_fast.sites.prompt_inputs import (
    DECODER_INPUTS,
    extended_mask,
    moved_positions,
    refuse_packed,
    require_room,
    without_prompt,
)

_ENCODER_INPUTS = {"input_ids", "inputs_embeds", "attention_mask"}
_OTHER_INPUTS = {"pixel_values", "input_features", "global_attention_mask"}
_OUTPUTS = ("last_hidden_state", "hidden_states", "attentions", "cross_attentions")


class Prompts(Protocol):
    """What is written before the input embeddings: `PromptPool`, or `ConcatenatedPrompts`."""

    @property
    def length(self) -> int:
        """How many rows are written before an input."""

    def realign(self) -> None:
        """Puts rows back in place whose parameters were moved."""

    def __call__(
        self,
        mixture: Tensor,
        embedding: nn.Module,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None = None,
        /,
    ) -> Tensor:
        """[B, length + T, D]; mixture is what the router returned, with a row per sample."""


class PromptRouting(Routing):
    """`Routing` of a model whose tasks have prompts, which it mixes and inserts.

    Args:
        model: the transformers model (inside any wrapper).
        route: computes weights, as in `Routing`.
        active: whether there is anything to mix, as in `Routing`.
        count: K, as in `Routing`.
        pool: the prompts.
    """

    generation: PromptGeneration

    def __init__(
        self,
        model: Any,
        route: Callable[..., Tensor],
        active: Callable[[], bool],
        count: Callable[[], int],
        pool: Prompts,
    ) -> None:
        super().__init__(model, route, active, count)
        self.generation = PromptGeneration(model, self, self.router, self._length)
        self.pool = pool
        self.pools.append(pool)

    def checked(self, weights: Tensor) -> Tensor:
        """As `Running.checked`, without weights per token."""
        weights = super().checked(weights)
        if weights.dim() == 3:
            raise ValueError(
                f"weights: got shape {tuple(weights.shape)}, expected [K] or [B, K]: a prompt is "
                "mixed for a whole sample, not per token"
            )
        return weights

    def install(self) -> None:
        """Adds the hooks and stand-ins; `remove` takes them away again."""
        super().install()
        place: Any = prompt_place(self.model)
        self._argument_names[type(place)] = positional_names(place.forward)
        self._hooks.append(place.register_forward_pre_hook(self._insert, with_kwargs=True))
        if self.router.is_encoder_decoder:
            decoder = self.model.get_decoder()
            self._argument_names[type(decoder)] = positional_names(decoder.forward)
            hook = decoder.register_forward_pre_hook(self._extend_cross_mask, with_kwargs=True)
            self._hooks.append(hook)
        else:  # before Routing's own hook, which ends the forward
            self._hooks.append(place.register_forward_hook(self._strip, prepend=True))

    def _length(self) -> int:
        return self.pool.length

    def _chosen(
        self, forward: Forward, inputs: dict[str, Any], given: Tensor | None
    ) -> Tensor | None:
        """As `Routing._chosen`, except that a prompt which has been inserted overrides all else."""
        held, cache = inputs.get("encoder_outputs"), inputs.get("past_key_values")
        encodes = self.router.is_encoder_decoder
        if encodes and held is not None:
            weights = self.generation.from_encoder_outputs(held)
        elif not encodes and self.generation.holds_prompt(cache):
            held, weights = cache, self.generation.from_cache(cache)
        else:
            return super()._chosen(forward, inputs, given)
        if given is not None and weights is not None:
            raise ValueError(
                f"mixture: got weights and a {type(held).__name__} that contains a prompt, "
                "expected one of them: give the weights to the forward that inserts the prompt"
            )
        return weights

    # --- before and after the module that takes the embeddings ---

    def _insert(
        self, module: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        forward = self.forward
        if forward is None or not self.active():
            return None
        inputs = self._named(module, args, kwargs)
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        source = ids if embeds is None else embeds
        if source is None or (ids is not None and embeds is not None):
            return None  # the model raises an error of its own
        causal, cache = not self.router.is_encoder_decoder, inputs.get("past_key_values")
        if causal and self.generation.holds_prompt(cache):
            return (), self._behind_prompt(inputs, source.shape[1])
        if not self.is_generating:  # which has looked at what it was given
            refuse_packed(inputs, self.router.is_causal)
        config = self.model.config.get_text_config()
        require_room(inputs, source.shape[1], self.pool.length, config)
        weights: Any = forward.per_row
        mixed = self.pool(weights, module.get_input_embeddings(), ids, embeds)
        mask = inputs.get("attention_mask")
        mask = None if mask is None else extended_mask(mask, self.pool.length)
        if causal:
            forward.inserted = True
            inputs = {**inputs, "position_ids": self._all_positions(inputs, mask, mixed.shape[1])}
        return (), {**inputs, "input_ids": None, "inputs_embeds": mixed, "attention_mask": mask}

    def _behind_prompt(self, inputs: dict[str, Any], tokens: int) -> dict[str, Any]:
        """Returns the inputs of a forward whose cache contains the prompt."""
        mask, length = inputs.get("attention_mask"), self.pool.length
        # One that is not [B, T] comes from `create_masks_for_generate`.
        if isinstance(mask, Tensor) and mask.dim() == 2:
            mask = extended_mask(mask, length)
        positions = moved_positions(inputs.get("position_ids"), mask, tokens, length)
        return {**inputs, "attention_mask": mask, "position_ids": positions}

    def _all_positions(
        self, inputs: dict[str, Any], mask: Tensor | None, count: int
    ) -> Tensor | None:
        """Positions [B, P + T] of the prompt and the tokens; None to leave them to the model."""
        given, length = inputs.get("position_ids"), self.pool.length
        positions = moved_positions(given, mask, count, length)
        if given is None or positions is None:
            return positions
        first = torch.arange(length, device=given.device)
        return torch.cat([first.expand(len(given), -1), positions], 1)

    def _strip(self, module: nn.Module, args: tuple, output: Any) -> Any:
        forward = self.forward
        if forward is None or not forward.inserted:
            return None
        forward.inserted = False
        if isinstance(output, tuple):
            return without_prompt(output, self.pool.length)
        for name in _OUTPUTS:
            if output.get(name) is not None:
                output[name] = without_prompt(output[name], self.pool.length)
        return output

    def _extend_cross_mask(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        inputs = self._named(module, args, kwargs)
        mask, hidden = inputs.get("encoder_attention_mask"), inputs.get("encoder_hidden_states")
        if mask is None or hidden is None or not self.active():
            return None
        if mask.shape[-1] == hidden.shape[1]:
            return None
        mask = extended_mask(mask, self.pool.length)
        if mask.shape[1] != hidden.shape[1]:
            raise ValueError(
                f"attention_mask: got {mask.shape[1] - self.pool.length} tokens, expected "
                f"{hidden.shape[1] - self.pool.length}, those of encoder_outputs without the prompt"
            )
        return (), {**inputs, "encoder_attention_mask": mask}


class PlacesRouting(PromptRouting):
    """`PromptRouting` by the places of prompts in place of weights.

    Args:
        model, route, active: as in `PromptRouting`.
        count: N, the prompts that each input gets.
        pool: of the prompts.
    """

    pool: ConcatenatedPrompts

    def checked(self, weights: Tensor) -> Tensor:
        """Places that a caller gives, as [1, N] or [B, N].

        Raises:
            ValueError: if they have another shape or dtype or, on a CPU, there is no such prompt.
        """
        return checked_places(weights, self.count(), self.pool.total)


def checked_places(places: Tensor, count: int, total: int) -> Tensor:
    """Returns places of prompts that a caller gives, as [1, N] or [B, N].

    Args:
        places: int64 [N] or [B, N].
        count: N.
        total: the number of prompts.

    Raises:
        ValueError: if they have another shape or dtype or, on a CPU, there is no such prompt.
    """
    index = torch.as_tensor(places)
    if index.dtype != torch.int64 or index.dim() not in (1, 2) or index.shape[-1] != count:
        raise ValueError(
            f"mixture: got {index.dtype} of shape {tuple(index.shape)}, expected the places of "
            f"prompts, int64 [{count}] or [B, {count}]"
        )
    known = transforms.values(index) if index.device.type == "cpu" else None
    if known is not None and not bool(((known >= 0) & (known < total)).all()):
        raise ValueError(f"mixture: got places {known.tolist()}, expected 0 to {total - 1}")
    return index[None] if index.dim() == 1 else index


def prompt_place(model: Any) -> Any:
    """Returns the module of a model whose input embeddings get the prompt.

    Raises:
        ValueError: if no module takes embeddings, a mask and, in a decoder-only model, positions.
    """
    encodes = bool(getattr(model.config, "is_encoder_decoder", False))
    place = model.get_encoder() if encodes else model.base_model
    parameters = set(inspect.signature(place.forward).parameters)
    missing = sorted((_ENCODER_INPUTS if encodes else DECODER_INPUTS) - parameters)
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
