"""patch of an X-LoRA model: PEFT's numbers from one pass over the experts."""

import pytest
import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import WIDTH, tiny, token_ids

import sapt_fast
from sapt_fast.methods.peft.xlora import PooledExperts


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    for k, rank in enumerate((4, 2, 7)):
        targets = ["q_proj", "v_proj"] if k != 1 else ["q_proj"]
        model = get_peft_model(tiny("llama"), LoraConfig(r=rank, target_modules=targets))
        generator = torch.Generator().manual_seed(k)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        model.save_pretrained(folder / str(k))
    return folder


def xlora(experts, **changed):
    torch.manual_seed(3)
    base = tiny("llama", use_cache=False)
    paths = {str(k): str(experts / str(k)) for k in range(3)}
    config = XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=WIDTH, adapters=paths, xlora_depth=2, **changed
    )
    torch.manual_seed(4)
    return get_peft_model(base, config).eval()


def run(model):
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


VARIANTS = {
    "plain": {},
    "top_k": {"top_k_lora": 2},
    "softmax_top_k": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    "scaled": {"global_scaling_weight": 2.5},
    "layerwise": {"layerwise_scalings": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_classifier_gradients_are_pefts(experts, variant):
    models = [xlora(experts, **VARIANTS[variant]) for _ in range(2)]
    sapt_fast.patch(models[1])
    assert len(models[1].sapt.report.patched) == 4
    expected, got = map(run, models)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    grads = []
    for model in models:
        model(input_ids=token_ids(), labels=token_ids(seed=3)).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() != set()
    for name, grad in grads[1].items():
        torch.testing.assert_close(grad, grads[0][name], rtol=1e-3, atol=1e-6)


def test_generation_is_pefts(experts):
    models = [xlora(experts) for _ in range(2)]
    sapt_fast.patch(models[1])
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(*(m.generate(input_ids=token_ids(), **options) for m in models))


def test_experts_that_train(experts):
    models = [xlora(experts, use_trainable_adapters=True).double() for _ in range(2)]
    sapt_fast.patch(models[1])
    grads = []
    for model in models:
        model(input_ids=token_ids(), labels=token_ids(seed=3)).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any("lora_A" in name for name in grads[0])
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[1].items():
        torch.testing.assert_close(grad, grads[0][name], rtol=1e-8, atol=1e-11)


def test_disabled_adapters(experts):
    model, reference = sapt_fast.patch(xlora(experts)), xlora(experts)
    with model.disable_adapter(), reference.disable_adapter():
        torch.testing.assert_close(run(model), run(reference))
    torch.testing.assert_close(run(model), run(reference), rtol=1e-5, atol=1e-5)


def test_what_is_saved_is_pefts(experts, tmp_path):
    for name, model in (("peft", xlora(experts)), ("ours", sapt_fast.patch(xlora(experts)))):
        run(model)
        model.save_pretrained(tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "peft") for p in (tmp_path / "peft").rglob("*.safe*"))
    assert files
    for file in files:
        expected, saved = (load_file(tmp_path / name / file) for name in ("peft", "ours"))
        assert expected.keys() == saved.keys()
        for name, tensor in saved.items():
            assert torch.equal(tensor, expected[name]), name


def test_patch_twice_and_unpatch(experts):
    model = xlora(experts)
    before = run(model)
    handle = sapt_fast.patch(model).sapt
    assert sapt_fast.patch(model).sapt is handle
    layer = model.get_submodule(handle.report.patched[0])
    assert isinstance(layer.forward.__self__, PooledExperts)
    sapt_fast.unpatch(model)
    assert torch.equal(run(model), before)
    assert not hasattr(model, "sapt")
    assert all(p.is_contiguous() for p in model.parameters())
