"""The demo's backbone: a T5 of 0.8 million parameters over characters, pretrained and packaged.

It has 3 encoder and 2 decoder layers of width 128 and is trained by
``scripts/pretrain_demo_backbone.py`` on `tasks.PRETRAINING_RULES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from sapt_fast.demo.tasks import CharTokenizer, Example

WEIGHTS_NAME = "model.safetensors"
LABEL_PADDING = -100
INSTRUCTION_SCALE = 3.0
FIRST_INSTRUCTION_LETTER, LAST_INSTRUCTION_LETTER = "A", "Z"

# The relative position each head of a self-attention looks at when training starts.
ENCODER_OFFSETS = (-1, 1, -2, 0)
DECODER_OFFSETS = (-1, 0, -2, -3)
POSITION_BIAS = 4.0
POSITION_BUCKETS = 32

# Two more names of `shared.weight`; a checkpoint holds it once.
_TIED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")


def backbone_config() -> T5Config:
    """The architecture, as recorded in the packaged ``config.json``."""
    tokenizer = CharTokenizer()
    return T5Config(  # type: ignore[call-arg]  # some fields are only known to its parents
        vocab_size=tokenizer.vocab_size,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        relative_attention_num_buckets=POSITION_BUCKETS,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )


def instruction_rows() -> slice:
    """The rows of the embedding table that belong to the instruction letters A to Z."""
    vocabulary = CharTokenizer().get_vocab()
    return slice(vocabulary[FIRST_INSTRUCTION_LETTER], vocabulary[LAST_INSTRUCTION_LETTER] + 1)


@torch.no_grad()
def new_backbone(seed: int) -> T5ForConditionalGeneration:
    """An untrained backbone with the two initial choices on which the demo rests.

    Every head of the self-attentions starts with a bias of 4 towards one relative position, which
    makes character rules learnable in minutes. The embedding rows of the instruction letters
    start three times as large, so that a router's pooled query tells instructions apart.
    Pretraining happens on these rows, thus the scale is part of the weights and nothing has to be
    multiplied later.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(backbone_config())
    model.shared.weight[instruction_rows()] *= INSTRUCTION_SCALE
    for stack, offsets in ((model.encoder, ENCODER_OFFSETS), (model.decoder, DECODER_OFFSETS)):
        bias = stack.get_parameter("block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        bias.zero_()
        for head, offset in enumerate(offsets):
            bias[_position_bucket(offset), head] = POSITION_BIAS
    return model


def _position_bucket(offset: int) -> int:
    """T5's bucket of a near relative position; the upper half of the buckets is for offsets > 0."""
    return -offset if offset <= 0 else POSITION_BUCKETS // 2 + offset


def save_backbone(model: T5ForConditionalGeneration, folder: str | Path) -> None:
    """Write ``config.json`` and bfloat16 ``model.safetensors`` to `folder`, made if missing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in _TIED
    }
    model.config.save_pretrained(folder)
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def load_backbone(
    dtype: torch.dtype = torch.float32, folder: str | Path | None = None
) -> T5ForConditionalGeneration:
    """The pretrained backbone in evaluation mode.

    Args:
        dtype: floating-point type of the parameters; the files hold bfloat16.
        folder: where `save_backbone` wrote; None takes the packaged files.

    Raises:
        TypeError: `dtype` is not a floating-point torch.dtype.
        FileNotFoundError: `folder` lacks ``config.json`` or ``model.safetensors``.
        ValueError: the weights do not fit the configuration.
    """
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    if folder is None:
        with resources.as_file(resources.files("sapt_fast.demo") / "backbone") as packaged:
            return _load(packaged, dtype)
    return _load(Path(folder), dtype)


def _load(folder: Path, dtype: torch.dtype) -> T5ForConditionalGeneration:
    for name in ("config.json", WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in {folder}")
    config = T5Config.from_json_file(folder / "config.json")
    # The weights drawn here are overwritten; the caller's random state stays as it was.
    with torch.random.fork_rng(devices=[]):
        model = T5ForConditionalGeneration(config)
    keys = model.load_state_dict(load_file(folder / WEIGHTS_NAME), strict=False)
    missing = sorted(set(keys.missing_keys) - set(_TIED))
    if missing or keys.unexpected_keys:
        raise ValueError(
            f"{folder / WEIGHTS_NAME} does not fit its config.json: "
            f"missing {missing}, unexpected {keys.unexpected_keys}"
        )
    model.to(dtype=dtype)  # type: ignore[call-arg]  # its wrapper hides torch's overloads
    return model.eval()


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A training batch of T5.

    Returns:
        ``input_ids`` and ``attention_mask`` `[B, T]` and ``labels`` `[B, T']`, all int64; padding
        is 0 in the inputs and -100 in the labels.
    """
    tokenizer = CharTokenizer()
    sources = tokenizer([e.source for e in examples], padding=True, return_tensors="pt")
    targets = tokenizer([e.target for e in examples], padding=True, return_tensors="pt")
    labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, LABEL_PADDING)
    return {**sources, "labels": labels}


@torch.no_grad()
def exact_match(
    model: T5ForConditionalGeneration, examples: Sequence[Example], batch_size: int = 256
) -> float:
    """Share of `examples` that greedy decoding answers exactly, in [0, 1].

    One teacher-forced forward a batch suffices: greedy decoding gives the target and its end
    token if and only if the arg-max equals the label at every position.
    """
    if not examples:
        raise ValueError("examples must hold at least one row, got none")
    correct = 0
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size])
        labels = batch["labels"]
        predicted = model(**batch).logits.argmax(-1)
        correct += int(((predicted == labels) | (labels == LABEL_PADDING)).all(1).sum())
    return correct / len(examples)
