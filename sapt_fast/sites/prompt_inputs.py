"""Extends masks, positions and outputs of a forward by P rows of a prompt before its tokens."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sapt_fast.routing.packing import find_segments

DECODER_INPUTS = {
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
}
_KNOWN = {*DECODER_INPUTS, "encoder_hidden_states", "encoder_attention_mask"}


def extended_mask(mask: Any, length: int) -> Tensor:
    """Returns the mask [B, P + T] of a prompt and the tokens.

    Args:
        mask: [B, T], of the tokens.
        length: P.

    Raises:
        ValueError: if the mask has another shape.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: got {got}, expected [B, T], to which the prompt is added"
        )
    return torch.cat([mask.new_ones(mask.shape[0], length), mask], 1)


def moved_positions(given: Tensor | None, mask: Any, count: int, length: int) -> Tensor | None:
    """Positions behind a prompt: the given ones moved on, or those that the mask implies.

    Args:
        given: [B, T], as they are without a prompt.
        mask: extended, [B, P + T].
        count: of the last columns of the mask, whose positions are returned.
        length: P.

    Returns:
        [B, T] or [B, count]; None if neither tells of padding, so that the model finds them.

    Raises:
        ValueError: if the given ones have another shape.
    """
    if given is not None:
        if given.dim() != 2:
            raise ValueError(
                f"position_ids: got shape {tuple(given.shape)}, expected [B, T], to which the "
                "prompt is added"
            )
        return given + length
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return (mask.long().cumsum(1) - 1)[:, -count:]


def without_prompt(value: Any, length: int) -> Any:
    """Hidden states [B, P + T, D] or attention maps [B, H, P + T, S] without the first P."""
    if isinstance(value, tuple):
        return tuple(without_prompt(inner, length) for inner in value)
    if not isinstance(value, Tensor):
        return value
    return value[:, length:] if value.dim() == 3 else value[:, :, length:]


def refuse_packed(inputs: Mapping[str, Any], causal: Callable[[], bool]) -> None:
    """Raises RuntimeError if rows contain several texts; arguments as `find_segments`."""
    segments = find_segments(inputs, causal)
    if segments is not None:
        raise RuntimeError(
            f"position_ids: got {len(segments)} texts in {segments.shape[0]} rows, but a "
            "prompt can only be written before a whole row, not before each text in it: give "
            "each text a row of its own, with an attention_mask where it is padded"
        )


def require_room(inputs: Mapping[str, Any], tokens: int, length: int, config: Any) -> None:
    """Checks that a prompt can be inserted.

    Args:
        inputs: the arguments of the forward, by name.
        tokens: T.
        length: P.
        config: of the text model.

    Raises:
        ValueError: if another input describes the tokens, or the model has too few positions.
    """
    for name, value in inputs.items():
        long = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == tokens
        if name == "cache_position" or (long and name not in _KNOWN):
            if value is None:
                continue
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)}, expected None: it describes the tokens "
                "alone, and there is a prompt before them"
            )
    limit = getattr(config, "max_position_embeddings", None)
    rotary = getattr(config, "rope_parameters", None) is not None
    if limit is not None and not rotary and length + tokens > limit:
        raise ValueError(
            f"input_ids: got {tokens} tokens, expected at most {limit - length}: the model has "
            f"{limit} positions, of which the prompt takes {length}"
        )
