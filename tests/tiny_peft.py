"""Tiny PEFT models with several LoRA adapters, and what the tests ask of them."""

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny, token_ids

from sapt_fast.methods.peft.layers import PooledLinear

TARGETS = {"llama": ["q_proj", "v_proj"], "t5": ["q", "v"], "gpt2": ["c_attn"], "bert": ["query"]}
TYPES = {
    "llama": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "t5": "SEQ_2_SEQ_LM",
    "bert": "FEATURE_EXTRACTION",
}


def config(family, r=4, **changed):
    values = {"r": r, "lora_alpha": 8, "target_modules": TARGETS[family], **changed}
    return LoraConfig(
        task_type=TYPES.get(family, "CAUSAL_LM"), fan_in_fan_out=family == "gpt2", **values
    )


def peft_model(family="llama", configs=None, dtype=torch.float32, seed=0, base=None, **options):
    """Three adapters of different ranks (or those of `configs`), all doing something, all active.

    They are named a0, a1, ...; `base` is a model of the family to take in place of `tiny`.
    """
    base = tiny(family, seed).to(dtype) if base is None else base
    configs = configs or [
        config(family),
        config(family, r=2, use_rslora=True),
        config(family, r=7, target_modules=TARGETS[family][:1]),
    ]
    model = get_peft_model(base, configs[0], adapter_name="a0", **options)
    for k, extra in enumerate(configs[1:], 1):
        model.add_adapter(f"a{k}", extra, **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    model.base_model.set_adapter([f"a{k}" for k in range(len(configs))])
    return model.eval()


def run(model, family="llama", **extra):
    if family == "t5":
        extra["decoder_input_ids"] = token_ids(length=5)
    with torch.no_grad():
        return model(input_ids=token_ids(), **extra).logits


def pooled_layers(model):
    return [m for m in model.modules() if type(m) is PooledLinear]


def mixture(batch=3):
    generator = torch.Generator().manual_seed(5)
    return torch.rand(batch, 3, generator=generator)
