"""Tiny models with random weights under the names that PEFT's tests ask the Hugging Face hub for.

They are written as the hub's cache lays models down, so the tests find them offline. A test that
needs what they lack (a tokenizer, trained weights, a size) fails with and without us.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as T

_REVISION = "0" * 40
_SIZES = {"vocab_size": 1024, "initializer_range": 0.1}


def _opt(kind: type = T.OPTForCausalLM, layers: int = 5) -> T.PreTrainedModel:
    return kind(
        T.OPTConfig(
            **{**_SIZES, "vocab_size": 50272},
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=16,
            init_std=0.1,
        )
    )


def _gpt2() -> T.PreTrainedModel:
    config = T.GPT2Config(**_SIZES, n_embd=32, n_layer=4, n_head=4, n_positions=128)
    return T.GPT2LMHeadModel(config)


def _gptj() -> T.PreTrainedModel:
    config = T.GPTJConfig(**_SIZES, n_embd=32, n_layer=4, n_head=4, n_positions=128, rotary_dim=4)
    return T.GPTJForCausalLM(config)


_ROPE = {  # of Llama and its kin
    **_SIZES,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
_BERT = {  # of Bert and its kin
    **_SIZES,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def _of(
    sizes: dict[str, Any], config: type, kind: type, **more: object
) -> Callable[[], T.PreTrainedModel]:
    """A model of a family, which gives its fields the same names."""
    return lambda: kind(config(**sizes | more))


def _bart() -> T.PreTrainedModel:
    return T.BartForConditionalGeneration(
        T.BartConfig(
            **{**_SIZES},
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=128,
            init_std=0.1,
        )
    )


def _t5() -> T.PreTrainedModel:
    return T.T5ForConditionalGeneration(
        T.T5Config(
            vocab_size=1024,
            d_model=32,
            d_kv=8,
            d_ff=37,
            num_layers=3,
            num_decoder_layers=3,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )


def _bloom() -> T.PreTrainedModel:
    return T.BloomForCausalLM(T.BloomConfig(**_SIZES, hidden_size=32, n_layer=2, n_head=4))


_rope, _bert = partial(_of, _ROPE), partial(_of, _BERT)
_llama = _rope(T.LlamaConfig, T.LlamaForCausalLM)
_neox = _bert(
    T.GPTNeoXConfig, T.GPTNeoXForCausalLM, num_hidden_layers=2, max_position_embeddings=2048
)
_gemma = {"head_dim": 8, "sliding_window": 32}
MODELS: dict[str, Callable[[], T.PreTrainedModel]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": _opt,
    "peft-internal-testing/opt-125m": lambda: _opt(layers=12),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": _gpt2,
    "peft-internal-testing/tiny-random-gpt2": _gpt2,
    "hf-internal-testing/tiny-random-gpt2": _gpt2,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": _gptj,
    "trl-internal-testing/tiny-random-LlamaForCausalLM": _llama,
    "peft-internal-testing/tiny-random-LlamaForCausalLM": _llama,
    "hf-internal-testing/tiny-random-LlamaForCausalLM": _llama,
    "peft-internal-testing/tiny-dummy-qwen2": _rope(T.Qwen2Config, T.Qwen2ForCausalLM),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": _rope(
        T.Qwen3Config, T.Qwen3ForCausalLM, head_dim=4
    ),
    "hf-internal-testing/tiny-random-MistralForCausalLM": _rope(
        T.MistralConfig, T.MistralForCausalLM
    ),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": _rope(
        T.Gemma3TextConfig, T.Gemma3ForCausalLM, **_gemma
    ),
    "peft-internal-testing/tiny-random-BloomForCausalLM": _bloom,
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": _neox,
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": _bart,
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": _t5,
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": _t5,
    "peft-internal-testing/tiny-random-t5": _t5,
    "google/flan-t5-small": _t5,
    "peft-internal-testing/tiny-random-BertModel": _bert(T.BertConfig, T.BertModel),
    "peft-internal-testing/tiny-random-RobertaModel": _bert(T.RobertaConfig, T.RobertaModel),
    "peft-internal-testing/tiny-random-DebertaModel": _bert(T.DebertaConfig, T.DebertaModel),
    "peft-internal-testing/tiny-random-DebertaV2Model": _bert(T.DebertaV2Config, T.DebertaV2Model),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": _bert(
        T.BertConfig, T.BertForSequenceClassification
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": _bert(
        T.RobertaConfig, T.RobertaForSequenceClassification
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": _rope(
        T.LlamaConfig, T.LlamaForSequenceClassification
    ),
}


def write(cache: Path) -> None:
    """Writes the stand-ins that are not in the cache yet."""
    for name, build in MODELS.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        if (folder / "refs" / "main").exists():
            continue
        torch.manual_seed(0)
        build().save_pretrained(folder / "snapshots" / _REVISION)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(_REVISION)
