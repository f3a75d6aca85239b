"""Tiny models of every family under test, patched copies of them, and the one-sample oracle."""

from collections.abc import Callable
from functools import partial

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

import sapt_fast

VOCABULARY, WIDTH, RANK = 97, 32, 4
_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_CAUSAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **_IDS,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    **_IDS,
}


def _build(prefix: str, head: str, values: dict, **changed) -> PreTrainedModel:
    config = getattr(transformers, f"{prefix}Config")(**{**values, **changed})
    return getattr(transformers, prefix + head)(config)


_LLAMA_LIKE = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral", "gemma": "Gemma"}
FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "t5": partial(_build, "T5", "ForConditionalGeneration", _T5),
    # num_heads * d_kv = 20, not d_model
    "t5_narrow": partial(
        _build, "T5", "ForConditionalGeneration", {**_T5, "num_heads": 5, "d_kv": 4}
    ),
    "bart": partial(
        _build,
        "Bart",
        "ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
            "dropout": 0.0,
            "decoder_start_token_id": 1,
            "forced_eos_token_id": None,
            **_IDS,
        },
    ),
    **{
        name: partial(_build, prefix, "ForCausalLM", {**_CAUSAL, "head_dim": 8})
        for name, prefix in _LLAMA_LIKE.items()
    },
    "gpt2": partial(
        _build,
        "GPT2",
        "LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            **_IDS,
        },
    ),
    "bert": partial(
        _build,
        "Bert",
        "ForSequenceClassification",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_labels": 5,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    ),
}
CAUSAL = ("llama", "qwen2", "mistral", "gemma", "gpt2")


def tiny(family: str, seed: int = 0, **config) -> PreTrainedModel:
    """An untrained model of `family`, in eval mode."""
    torch.manual_seed(seed)
    return FAMILIES[family](**config).eval()


def shallow(family: str, seed: int = 0) -> PreTrainedModel:
    """A `tiny` of one layer: compiling takes as long as there are layers."""
    layers = "num_layers" if family.startswith("t5") else "num_hidden_layers"
    return tiny(family, seed, **{layers: 1})


def settings(**changed) -> sapt_fast.SaptConfig:
    """A config whose weights differ much from sample to sample."""
    return sapt_fast.SaptConfig(**{"r": RANK, "lora_alpha": 8, "temperature": 1.5, **changed})


def patched(
    family: str | PreTrainedModel, tasks: int = 3, seed: int = 0, **changed
) -> PreTrainedModel:
    """A patched `tiny` (or the given model) whose adapters all do something.

    `changed` are fields of the config; the same seed gives the same router and adapters.
    """
    model = tiny(family, seed) if isinstance(family, str) else family
    torch.manual_seed(seed)
    sapt_fast.patch(model, settings(**changed))
    for k in range(tasks):
        model.sapt.add_task(f"task{k}")
    return fill(model)


@torch.no_grad()
def fill(model: PreTrainedModel, seed: int = 7, deviation: float = 0.4) -> PreTrainedModel:
    """Random values for every adapter row."""
    generator = torch.Generator().manual_seed(seed)
    for pool in model.sapt.pools.values():
        for stack in (pool.a, pool.b):
            rows = stack.rows()
            rows.copy_(torch.randn(rows.shape, generator=generator) * deviation)
    return model


def checkpointed(model: PreTrainedModel, options: dict | None = None) -> PreTrainedModel:
    """Turns activation checkpointing on, by the name that this transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


def token_ids(batch: int = 3, length: int = 9, seed: int = 11) -> Tensor:
    """[batch, length] ids without pad or end tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


class Padded:
    """Texts of unequal length, alone and as one padded batch."""

    def __init__(self, encodes: bool, left: bool = True, seed: int = 11) -> None:
        ids = token_ids(seed=seed)
        self.texts = [row[:length][None] for row, length in zip(ids, (9, 6, 7), strict=True)]
        self.ids, self.mask = torch.zeros_like(ids), torch.zeros_like(ids)
        self.where = []
        for row, text in enumerate(self.texts):
            count = text.shape[1]
            self.where.append(slice(9 - count, 9) if left and not encodes else slice(0, count))
            self.ids[row, self.where[-1]], self.mask[row, self.where[-1]] = text[0], 1


def decoder_inputs(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """What an encoder-decoder model needs besides its input: the same ids for the decoder."""
    return {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}


@torch.no_grad()
def run(model: PreTrainedModel, ids: Tensor, **inputs) -> Tensor:
    """The model's logits for ids [B, T]."""
    return model(input_ids=ids, **decoder_inputs(model, ids), **inputs).logits


def error(got: Tensor, expected: Tensor) -> float:
    """How far one is from the other, relative to the norm of what is expected."""
    return ((got - expected).norm() / expected.norm().clamp(min=1e-6)).item()


class Oracle:
    """One sample's mixture, merged by PEFT: what that sample alone must give.

    Args:
        model: patched.
        base: an unpatched model with the same base weights; PEFT wraps it.
    """

    def __init__(self, model: PreTrainedModel, base: PreTrainedModel) -> None:
        handle = model.sapt
        config = LoraConfig(
            r=handle.config.r,
            lora_alpha=handle.config.lora_alpha,
            target_modules=handle.report.patched,
            fan_in_fan_out=model.config.model_type == "gpt2",
        )
        self.tasks = list(handle.tasks)
        self.peft = get_peft_model(base, config, adapter_name=self.tasks[0])
        for name in self.tasks[1:]:
            self.peft.add_adapter(name, config)
        for path, pool in handle.pools.items():
            layer = self.peft.base_model.model.get_submodule(path)
            for k, name in enumerate(self.tasks):
                a, b = pool.adapter(k)
                layer.lora_A[name].weight.data.copy_(a)
                layer.lora_B[name].weight.data.copy_(b.t())

    def merged(self, weights: Tensor) -> PreTrainedModel:
        """The model whose only adapter is the mixture with these weights [K]."""
        tuner = self.peft.base_model
        if "mix" in self.peft.peft_config:
            tuner.set_adapter(self.tasks[0])
            tuner.delete_adapter("mix")
        tuner.add_weighted_adapter(self.tasks, weights.tolist(), "mix", combination_type="cat")
        tuner.set_adapter("mix")
        return tuner.model.eval()


def oracle(model: PreTrainedModel, family: str, seed: int = 0) -> Oracle:
    """The oracle of `patched(family, seed=seed)`."""
    return Oracle(model, tiny(family, seed))
