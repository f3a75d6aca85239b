"""Loads a model and its tokenizer by the name or folder that a command line gives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sapt_fast.continual.data.kinds import Kind, model_kind

if TYPE_CHECKING:
    import torch

__all__ = [
    "DEMO",
    "DTYPES",
    "attentions",
    "check_folder",
    "check_model",
    "load_config",
    "load_model",
    "load_tokenizer",
    "torch_dtype",
    "with_attention",
]

DEMO = "demo"
DTYPES = ("float32", "bfloat16", "float16")


def load_model(model: str, kind: str, dtype: str, attention: str | None) -> Any:
    """Loads a model.

    Args:
        model: folder or name of a transformers model, or "demo".
        kind: "seq2seq", "causal", "encoder", or "auto" to decide by the model's architecture.
        dtype: one of `DTYPES`.
        attention: attention implementation; None for the model's own.

    Raises:
        ValueError: if the model is not of the given `kind`, or does not have this `attention`.
        OSError: if there is no such model.
    """
    if model == DEMO:
        from sapt_fast.demo.backbone import load_backbone

        return with_attention(load_backbone(torch_dtype(dtype)), attention)
    import transformers

    config = load_config(model)
    kind = _architecture(config) if kind == "auto" else kind
    loader = {
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "causal": transformers.AutoModelForCausalLM,
        "encoder": transformers.AutoModel,
    }[kind]
    loaded = with_attention(loader.from_pretrained(model, dtype=torch_dtype(dtype)), attention)
    if model_kind(loaded) != kind:
        raise ValueError(
            f"kind: got {kind!r}, but {model} is {model_kind(loaded)} ({type(loaded).__name__})"
        )
    return loaded


def load_config(model: str) -> Any:
    """Loads the config of a model; raises OSError if there is no such model."""
    import transformers

    check_model(model)
    try:
        return transformers.AutoConfig.from_pretrained(model)
    except OSError as error:
        raise OSError(
            f"model: got {model!r}, which is not a folder here and cannot be loaded from "
            f"the Hugging Face hub: {str(error).splitlines()[0]}"
        ) from error


def load_tokenizer(model: str) -> Any:
    """Loads a model's tokenizer; raises ValueError if it has neither a pad nor an end token."""
    if model == DEMO:
        from sapt_fast.demo.tasks import CharTokenizer

        return CharTokenizer()
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"model: the tokenizer of {model} has neither a pad nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def with_attention(model: Any, attention: str | None) -> Any:
    """Sets the attention implementation; raises ValueError if the model does not have it."""
    if attention is None:
        return model
    try:
        model.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"attention: got {attention!r}, which this {type(model).__name__} does not "
            f"support here: {str(error).splitlines()[0]}"
        ) from error
    used = model.config._attn_implementation
    if used != attention:
        raise ValueError(
            f"attention: got {attention!r}, but this {type(model).__name__} only has {used!r}"
        )
    return model


def attentions() -> list[str]:
    """Names of transformers' attention implementations."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ["eager", *sorted(ALL_ATTENTION_FUNCTIONS.keys())]


def check_model(model: str) -> None:
    """Raises FileNotFoundError or NotADirectoryError if `model` looks like a path of a folder but
    there is no model in it."""
    if not model or "\0" in model:
        raise ValueError(f"model: got {model!r}, expected a folder, a name or '{DEMO}'")
    path = Path(model).expanduser()
    is_path = path.is_absolute() or model[0] in ".~" or model.endswith("/") or model.count("/") > 1
    if is_path or path.exists():
        check_folder("model", path, "a folder that contains a transformers model")
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"model: got {model!r}, which contains no config.json")


def check_folder(name: str, path: str | Path, expected: str) -> None:
    """Raises FileNotFoundError or NotADirectoryError unless there is a folder."""
    if not Path(path).exists():
        raise FileNotFoundError(
            f"{name}: got {str(path)!r}, which does not exist; expected {expected}"
        )
    if not Path(path).is_dir():
        raise NotADirectoryError(f"{name}: got {str(path)!r}, which is a file; expected {expected}")


def _architecture(config: Any) -> Kind:
    """The kind of a saved model; models that were pretrained on masked words are encoders."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    named = getattr(config, "architectures", None) or []
    generates = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named)
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "encoder" if masked and not generates else "causal"


def torch_dtype(name: str) -> torch.dtype:
    """Returns the dtype of that name.

    Raises:
        ValueError: if it is none of "float32", "bfloat16", "float16".
    """
    if name not in DTYPES:
        raise ValueError(f"dtype: got {name!r}, expected one of {', '.join(DTYPES)}")
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype
