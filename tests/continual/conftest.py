"""Tiny models and rows for the trainer and the loop."""

from collections.abc import Callable

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 97


def _t5(dropout: float) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=dropout,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def _llama(dropout: float) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        attention_dropout=dropout,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """A random model of a kind, "t5" or "llama"; the same weights every time."""

    def make(kind: str, dropout: float = 0.0) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return {"t5": _t5, "llama": _llama}[kind](dropout)

    return make
