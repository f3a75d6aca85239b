"""Kinds of models: encoder-decoder, decoder-only, and encoder."""

from __future__ import annotations

from typing import Any, Literal

__all__ = ["Kind", "model_kind"]

Kind = Literal["seq2seq", "causal", "encoder"]


def model_kind(model: Any) -> Kind:
    """The kind of a transformers model, by which it learns to generate text or to match labels."""
    if getattr(model.config, "is_encoder_decoder", False):
        return "seq2seq"
    return "causal" if model.can_generate() else "encoder"
