"""Loads the model that a run edits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sapt_fast.continual.data.models import (
    DEMO,
    check_folder,
    load_config,
    load_model,
    load_tokenizer,
    torch_dtype,
    with_attention,
)
from sapt_fast.methods.edits.keys import SentenceKeys

__all__ = ["load_editable", "sentence_keys"]


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


def sentence_keys(folder: Path, tokenizer: Any, pattern: str | None, device: str) -> SentenceKeys:
    """Loads a sentence encoder, by which prompts are looked up.

    Args:
        folder: of the encoder, with its tokenizer.
        tokenizer: that of the edited model, which decodes prompts.
        pattern: as in `SentenceKeys`.
        device: where the encoder runs.

    Raises:
        FileNotFoundError: if there is no encoder.
        ValueError: if the edited model has no tokenizer, or `pattern` is no regular expression.
    """
    if tokenizer is None:
        raise ValueError("encoder: the edited model has no tokenizer, which decodes its prompts")
    check_folder("encoder", folder, "a folder that contains a transformers model")
    import transformers

    encoder = transformers.AutoModel.from_pretrained(folder).to(device)
    own = transformers.AutoTokenizer.from_pretrained(folder)
    try:
        return SentenceKeys(encoder, own, tokenizer, pattern)
    except re.error as error:
        raise ValueError(f"encoder_pattern: got {pattern!r}: {error}") from None
