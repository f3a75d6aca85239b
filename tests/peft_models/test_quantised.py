"""Quantised base layers are called as they are; the adapters over them run in one pass."""

import copy
import pickle
import sys

import pytest
import tiny_peft
import torch
import torch.nn.functional as F
from tiny_models import Oracle, patched, settings, tiny, token_ids
from tiny_peft import config, run
from torch import nn

import sapt_fast
from sapt_fast.methods.peft.layers import Pooled

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


class Packed(nn.Module):
    """Stands in for layers like GPTQ's: rows of 8-bit integers and their scales, no `weight`."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x):
        return F.linear(x, self.qweight.to(x.dtype) * self.scales.to(x.dtype))


def packed(model):
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "lm_head" not in name:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Packed(linear))
    return model


KINDS = {
    "torchao": torchao,
    "bitsandbytes 8": lambda model: bitsandbytes(model, 8),
    "bitsandbytes 4": lambda model: bitsandbytes(model, 4),
}
KINDS_AND_PACKED = {**KINDS, "packed": packed}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torchao's wheels are for Linux")


# bitsandbytes packs blocks of 64
WIDE = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4, "head_dim": 16}


def base(kind, dtype=torch.float32):
    return KINDS_AND_PACKED[kind](tiny("llama", **WIDE).to(dtype)).eval()


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


@pytest.mark.parametrize("kind", ["torchao", "packed"])
def test_sapt_over_quantised_layers(kind):
    """The mixture and its gradients are those over the same weights in floating point."""
    dequantised = tiny("llama", **WIDE)
    with torch.no_grad():
        for name, linear in dequantised.named_modules():
            if isinstance(linear, nn.Linear) and "lm_head" not in name:
                linear.weight.copy_(base(kind).get_submodule(name)(torch.eye(64)).t())
    models = [patched(model, grad_through_frozen=False) for model in (base(kind), dequantised)]
    torch.testing.assert_close(*map(run, models), rtol=1e-4, atol=1e-5)
    for model in models:
        model(input_ids=token_ids(), labels=token_ids(seed=3)).loss.backward()
    grads, expected = ([p.grad for p in m.sapt.trainable_parameters()] for m in models)
    assert all(grad.any() for grad in expected)
    torch.testing.assert_close(grads, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_sapt_against_one_peft_adapter_for_each_sample(kind):
    model = patched(base(kind))
    got = run(model)
    reference = Oracle(model, base(kind))
    for row, weights in enumerate(model.sapt.attention):
        expected = run(reference.merged(weights))[row]
        torch.testing.assert_close(got[row], expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_the_base_before_it_was_quantised(tmp_path):
    model = patched(tiny("llama", **WIDE))
    model.sapt.save_pretrained(tmp_path)
    loaded = sapt_fast.load_pretrained(base("packed"), tmp_path)
    assert torch.equal(run(loaded), run(patched(base("packed"))))


@pytest.mark.parametrize("kind", KINDS_AND_PACKED)
def test_sapt_saves_copies_merges_and_leaves_quantised_layers(kind, tmp_path):
    plain = base(kind)
    before = run(plain)
    layers = {path: type(layer) for path, layer in plain.named_modules()}
    model = patched(plain)
    expected = run(model)
    assert not torch.allclose(expected, before)
    assert torch.equal(run(copy.deepcopy(model)), expected)
    model.sapt.save_pretrained(tmp_path)
    assert torch.equal(run(sapt_fast.load_pretrained(base(kind), tmp_path)), expected)
    with pytest.raises(ValueError, match="another base model"):
        sapt_fast.load_pretrained(tiny("llama", **WIDE), tmp_path)
    with pytest.raises(ValueError, match="another base model"):
        sapt_fast.load_pretrained(KINDS_AND_PACKED[kind](tiny("llama", 1, **WIDE)), tmp_path)
    with pytest.raises(ValueError, match="quantised"):
        model.sapt.merge(torch.ones(3))
    assert torch.equal(run(model), expected)
    sapt_fast.unpatch(model)
    assert {path: type(layer) for path, layer in model.named_modules()} == layers
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("kind", ["torchao", "packed"])
def test_dtype_of_a_pool_over_quantised_layers(kind):
    for changed, dtype in [({}, torch.bfloat16), ({"autocast_adapter_dtype": True}, torch.float32)]:
        model = patched(base(kind, torch.bfloat16), **changed)
        assert {p.dtype for p in model.sapt.trainable_parameters()} == {dtype}
        assert run(model).dtype == torch.bfloat16


def test_a_layer_over_a_packed_weight_is_pickled():
    model = patched(packed(tiny("llama")))
    layer = model.get_submodule(model.sapt.report.patched[0])
    with model.sapt.fixed(torch.ones(3)):
        expected = run(model)
    again = pickle.loads(pickle.dumps(model))
    assert type(again.get_submodule(model.sapt.report.patched[0])) is type(layer)
    with again.sapt.fixed(torch.ones(3)):
        assert torch.equal(run(again), expected)


def test_integers_beside_a_floating_point_weight_are_no_quantisation():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(32, 32, bias=False)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    model = tiny("llama")
    model.model.layers[0].self_attn.q_proj = Counting()
    sapt_fast.patch(model, settings(), strict=True)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, Counting)
    assert layer.sapt_pool.a.trainable.dtype == layer.weight.dtype
