"""The inputs of a forward: how many rows its layers will see, and what a router can read."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_TOKENS = {"input_ids": 0, "inputs_embeds": 1}  # dimensions after that of the tokens
_OTHERS = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
_PER_TOKEN = ("attention_mask", "position_ids", "labels")


def row_counts(module: nn.Module, inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Counts the samples and the rows of a forward.

    They differ if every sample has several choices, [B, C, T], which the model flattens to rows.

    Args:
        module: the module whose forward it is.
        inputs: its arguments by name.

    Returns:
        (samples, rows), or None if the inputs do not tell.
    """
    for name, after in _TOKENS.items():
        value = inputs.get(name)
        if value is not None:
            if not isinstance(value, Tensor) or value.dim() < 2 + after:
                return None  # the model raises an error of its own
            rows = value.shape[0]
            return rows, rows * (value.shape[1] if _has_choices(module, value, after) else 1)
    main: str = getattr(module, "main_input_name", "")  # pixel_values, input_features, ...
    for name in (*_OTHERS, main):
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.dim():
            # A row for each codebook of a sample, whose sum the layers see.
            return None if _codebooks(module) else (value.shape[0], value.shape[0])
    return None


def for_router(module: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the inputs with one row per choice; unchanged if samples have no choices.

    Args:
        module: the module whose forward it is.
        inputs: its arguments by name.

    Raises:
        ValueError: if input_ids are not [B, T] or [B, C, T], or inputs_embeds not [B, T, D] or
            [B, C, T, D].
    """
    for name, after in _TOKENS.items():
        value = inputs.get(name)
        tensor = isinstance(value, Tensor)
        if value is None or (tensor and value.dim() == 2 + after):
            continue
        if not tensor or not _has_choices(module, value, after):
            got = f"shape {tuple(value.shape)}" if tensor else type(value).__name__
            width = ", D" if after else ""
            raise ValueError(
                f"{name}: got {got}, expected [B, T{width}] (or [B, C, T{width}], C choices per "
                "sample), from which the router learns the weights; or run inside "
                "model.sapt.fixed(weights)"
            )
        leading = value.shape[:3]
        flat = {name: value.flatten(0, 1)}
        for other in _PER_TOKEN:
            beside = inputs.get(other)
            if isinstance(beside, Tensor) and beside.shape == leading:
                flat[other] = beside.flatten(0, 1)
        inputs = {**inputs, **flat}
    return inputs


def unreadable(module: nn.Module, inputs: Mapping[str, Any]) -> str:
    """The error message for a forward without input_ids and inputs_embeds, which routers read."""
    given = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    return (
        f"input_ids: got None and no inputs_embeds, which the router reads ({type(module).__name__}"
        f" was given {', '.join(given) or 'no tensor'}): run inside model.sapt.fixed(weights), or "
        "give mixture=weights to the model or its generate"
    )


def _has_choices(module: nn.Module, value: Tensor, after: int) -> bool:
    """Whether tokens are [B, C, T]; a third dimension of audio models is that of their codes."""
    return value.dim() == 3 + after and not _codebooks(module)


def _codebooks(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return any(hasattr(c, "num_codebooks") for c in (config, getattr(config, "decoder", None)))
