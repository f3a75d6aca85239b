"""PEFT models whose adapters bring more than factors for linear layers, at random."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import token_ids

IDS = token_ids()  # [3, 9]


def randomised(model, seed=3):
    """Every adapter's own parameters, saved copies and tokens among them, at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name or "trainable_tokens" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model.eval()


def lora(targets=("q_proj", "v_proj"), **changed):
    return LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **changed)


def adapted(base, configs):
    model = get_peft_model(base, configs[0], adapter_name="a0")
    for k, config in enumerate(configs[1:], 1):
        model.add_adapter(f"a{k}", config)
    return randomised(model)


def logits(model, ids=IDS, **extra):
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits


def as_active(model, name, ids=IDS):
    """What plain PEFT computes with one adapter active."""
    model = copy.deepcopy(model)
    model.base_model.set_adapter(name)
    return logits(model, ids)
