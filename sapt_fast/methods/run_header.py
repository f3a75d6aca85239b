"""The header of a run: what runs where, and how much of it trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sapt_fast import dispatch
from sapt_fast.pools.own import is_inside, own_paths

__all__ = ["model_header", "trained_count"]

# The op that does most of a method's work, by the kind of place that the method changes.
_OPS = {"linear": "mixed_lora", "embeddings": "mix_prompts", "attention": "mix_prompts"}


def model_header(model: nn.Module, device: torch.device, site: str | None = None) -> str:
    """Describes the base model, and the backend that runs a method's adapters.

    Args:
        model: the model, patched or not.
        device: where it runs.
        site: `Handle.site` of the method; None to name no backend.

    Returns:
        One line, such as "T5ForConditionalGeneration, 247,577,856 parameters, float32, on cpu;
        mixed_lora by the backend cpu".
    """
    own = own_paths(model)
    base = [p for name, p in model.named_parameters() if not is_inside(name, own)]
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in base})
    count = sum(p.numel() for p in base)
    line = f"{type(model).__name__}, {count:,} parameters, {', '.join(kinds)}, on {device}"
    op = _OPS.get(site or "")
    if op is None:
        return line
    return f"{line}; {op} by the backend {dispatch.resolve(op, device)}"


def trained_count(parameters: Any) -> str:
    """Returns how many numbers these parameters have, for people."""
    return f"{sum(p.numel() for p in parameters):,} trainable parameters"
