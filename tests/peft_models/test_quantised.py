"""Quantised base layers are called as they are; the adapters over them run in one pass."""

import copy
import pickle
import sys

import pytest
import tiny_peft
import torch
from tiny_models import patched, settings, tiny, token_ids
from tiny_peft import config, run
from torch import nn

import sapt_fast
from sapt_fast.peft_models.layers import Pooled

NAMES = ["a2", "a0", "__base__"]


def torchao(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def chosen(module, name):
        return isinstance(module, nn.Linear) and "lm_head" not in name

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=chosen)
    return model


def bitsandbytes(model, bits):
    bnb = pytest.importorskip("bitsandbytes")
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or "lm_head" in name:
            continue
        sizes = linear.in_features, linear.out_features
        if bits == 8:
            made = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
        else:
            made = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32)
        made.load_state_dict({"weight": linear.weight.data})
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made.to("cpu"))
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model


KINDS = {
    "torchao": torchao,
    "bitsandbytes 8": lambda model: bitsandbytes(model, 8),
    "bitsandbytes 4": lambda model: bitsandbytes(model, 4),
}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torchao's wheels are for Linux")


def base(kind):
    # bitsandbytes packs blocks of 64
    wide = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4, "head_dim": 16}
    return KINDS[kind](tiny("llama", **wide))


def peft_model(kind):
    configs = [config("llama", r=rank) for rank in (4, 2, 7)]
    return tiny_peft.peft_model(configs=configs, base=base(kind))


def assert_same_gradients(peft, ours):
    for model in (peft, ours):
        model(input_ids=token_ids(), labels=token_ids(seed=3)).loss.backward()
    grads = {name: p.grad for name, p in peft.named_parameters() if p.grad is not None}
    assert any("lora_B" in name for name in grads)
    for name, p in ours.named_parameters():
        if name in grads:
            torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_layers_over_quantised_ones(kind):
    peft, ours = (peft_model(kind) for _ in range(2))
    sapt_fast.patch(ours, strict=True)
    layers = [ours.get_submodule(path) for path in ours.sapt.report.patched]
    assert len(layers) == 4
    assert all(isinstance(layer, Pooled) for layer in layers)
    torch.testing.assert_close(run(ours), run(peft), rtol=1e-4, atol=1e-5)
    expected, got = (run(model, adapter_names=NAMES) for model in (peft, ours))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    if kind != "bitsandbytes 4":  # whose packed product has no backward on a CPU
        assert_same_gradients(peft, ours)
    before = run(ours)
    with pytest.raises(ValueError, match="quantised"):
        ours.sapt.merge(torch.ones(3))
    assert torch.equal(run(ours), before)
    sapt_fast.unpatch(ours)
    assert torch.equal(run(ours), run(peft))


def test_weights_per_sample_over_quantised_layers():
    """Each sample's mixture is what PEFT gives with that sample's one adapter of rank R."""
    peft, ours = (peft_model("torchao") for _ in range(2))
    sapt_fast.patch(ours)
    weights = torch.tensor([[0.5, -0.3, 1.1], [1.0, 0.0, 0.2], [0.1, 0.9, -0.7]])
    got = run(ours, mixture=weights)
    for row, sample in enumerate(weights):
        name = f"mix{row}"
        adapters = ["a0", "a1", "a2"]
        peft.base_model.add_weighted_adapter(
            adapters, sample.tolist(), name, combination_type="cat"
        )
        peft.base_model.set_adapter(name)
        torch.testing.assert_close(got[row], run(peft)[row], rtol=1e-4, atol=1e-4)


def test_copies_and_pickles():
    ours = sapt_fast.patch(peft_model("torchao"))
    expected = run(ours)
    assert torch.equal(run(copy.deepcopy(ours)), expected)
    kind = type(ours.get_submodule(ours.sapt.report.patched[0]))
    assert pickle.loads(pickle.dumps(kind)) is kind


def test_sapt_over_quantised_layers():
    model = base("torchao")
    plain = run(model)
    quantised = patched(model)
    assert not torch.allclose(run(quantised), plain)
    dequantised = tiny("llama", hidden_size=64, intermediate_size=64, num_key_value_heads=4,
                       head_dim=16)  # fmt: skip
    with torch.no_grad():
        for name, linear in dequantised.named_modules():
            if isinstance(linear, nn.Linear) and "lm_head" not in name:
                linear.weight.copy_(base("torchao").get_submodule(name).weight.dequantize())
    reference = patched(dequantised)
    torch.testing.assert_close(run(quantised), run(reference), rtol=1e-4, atol=1e-5)
    quantised(input_ids=token_ids(), labels=token_ids(seed=3)).loss.backward()
    assert all(p.grad is not None for p in quantised.sapt.trainable_parameters())
    with pytest.raises(ValueError, match="quantised"):
        quantised.sapt.merge(torch.ones(3))


def test_sapt_reports_layers_that_it_skips():
    model = bitsandbytes(tiny("llama"), 8)
    with pytest.raises(ValueError, match="Linear8bitLt is not a plain linear layer"):
        sapt_fast.patch(model, settings())
