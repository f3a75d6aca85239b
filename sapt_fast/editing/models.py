"""Loads the model that a run edits."""

from __future__ import annotations

from typing import Any

from sapt_fast.continual.data.models import (
    DEMO,
    load_config,
    load_model,
    load_tokenizer,
    torch_dtype,
    with_attention,
)

__all__ = ["load_editable"]


def load_editable(model: str, dtype: str, attention: str | None) -> tuple[Any, Any]:
    """Loads a model that generates or classifies, and its tokenizer.

    Args:
        model: folder or name of a transformers model, or "demo".
        dtype: "float32", "bfloat16" or "float16".
        attention: attention implementation; None for the model's own.

    Returns:
        The model, and its tokenizer; None if the folder has none.

    Raises:
        OSError: if there is no such model.
        ValueError: if the model has neither a language modelling nor a classification head.
    """
    named = [] if model == DEMO else getattr(load_config(model), "architectures", None) or []
    if any(name.endswith("ForSequenceClassification") for name in named):
        import transformers

        auto = transformers.AutoModelForSequenceClassification
        loaded = with_attention(auto.from_pretrained(model, dtype=torch_dtype(dtype)), attention)
    else:
        loaded = load_model(model, "auto", dtype, attention)
        if not loaded.can_generate():
            raise ValueError(
                f"model: got {model!r}, a {type(loaded).__name__}, expected a model that generates "
                "text or classifies sequences"
            )
    try:
        tokenizer = load_tokenizer(model)
    except (OSError, ValueError):  # edits may be token ids
        tokenizer = None
    return loaded, tokenizer
