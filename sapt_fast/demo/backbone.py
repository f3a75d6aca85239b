"""The demo's backbone: a T5 of 0.8 million parameters over characters, pretrained and packaged.

It has 3 encoder and 2 decoder layers of width 128. `scripts/pretrain_demo_backbone.py` trained it
on `tasks.PRETRAINING_RULES`.
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

# The relative position to which each head of a self-attention attends when training starts.
ENCODER_OFFSETS = (-1, 1, -2, 0)
DECODER_OFFSETS = (-1, 0, -2, -3)
POSITION_BIAS = 4.0
POSITION_BUCKETS = 32

# Further names of `shared.weight`, which a checkpoint contains once.
_TIED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")


def backbone_config() -> T5Config:
    """Returns the architecture, as in the packaged `config.json`."""
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
    """Returns the rows of the embedding table for the instruction letters A to Z."""
    vocabulary = CharTokenizer().get_vocab()
    return slice(vocabulary[FIRST_INSTRUCTION_LETTER], vocabulary[LAST_INSTRUCTION_LETTER] + 1)


@torch.no_grad()
def new_backbone(seed: int) -> T5ForConditionalGeneration:
    """Creates an untrained backbone with two special initialisations.

    - Every head of the self-attentions starts with a bias of 4 towards one relative position, so
      that rules on characters can be learned in minutes.
    - The embedding rows of the instruction letters start three times as large, so that a router's
      pooled query distinguishes instructions. Pretraining uses these rows, so the scale is part of
      the weights.

    Args:
        seed: the seed of the random weights.
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
    """Returns T5's bucket of a near relative position; offsets > 0 use the upper half."""
    return -offset if offset <= 0 else POSITION_BUCKETS // 2 + offset


def save_backbone(model: T5ForConditionalGeneration, folder: str | Path) -> None:
    """Writes `config.json` and a bfloat16 `model.safetensors` to a folder, created if missing."""
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
    """Loads the pretrained backbone in evaluation mode.

    Args:
        dtype: floating-point dtype of the parameters; the files contain bfloat16.
        folder: a folder that `save_backbone` wrote; None for the packaged files.

    Raises:
        TypeError: if `dtype` is not a floating-point torch.dtype.
        FileNotFoundError: if `config.json` or `model.safetensors` is missing in `folder`.
        ValueError: if the weights do not fit the configuration.
    """
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: got {dtype!r}, expected a floating-point torch.dtype")
    if folder is None:
        with resources.as_file(resources.files("sapt_fast.demo") / "backbone") as packaged:
            return _load(packaged, dtype)
    return _load(Path(folder), dtype)


def _load(folder: Path, dtype: torch.dtype) -> T5ForConditionalGeneration:
    for name in ("config.json", WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing")
    config = T5Config.from_json_file(folder / "config.json")
    # The random weights are overwritten; the caller's random state does not change.
    with torch.random.fork_rng(devices=[]):
        model = T5ForConditionalGeneration(config)
    keys = model.load_state_dict(load_file(folder / WEIGHTS_NAME), strict=False)
    missing = sorted(set(keys.missing_keys) - set(_TIED))
    if missing or keys.unexpected_keys:
        raise ValueError(
            f"{folder / WEIGHTS_NAME}: does not fit its config.json: "
            f"missing {missing}, unexpected {keys.unexpected_keys}"
        )
    model.to(dtype=dtype)  # type: ignore[call-arg]  # its wrapper hides torch's overloads
    return model.eval()


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Converts examples to a training batch of T5.

    Returns:
        `input_ids` and `attention_mask` [B, T] and `labels` [B, T'], all int64; padding is 0 in
        the inputs and -100 in the labels.
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
    """Returns the fraction of examples that greedy decoding answers exactly, in [0, 1].

    Runs one teacher-forced forward per batch: greedy decoding yields the target and its end token
    if and only if the arg-max equals the label at every position.

    Raises:
        ValueError: if examples is empty.
    """
    if not examples:
        raise ValueError("examples: got none, expected at least one")
    correct = 0
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size])
        labels = batch["labels"]
        predicted = model(**batch).logits.argmax(-1)
        correct += int(((predicted == labels) | (labels == LABEL_PADDING)).all(1).sum())
    return correct / len(examples)
