"""patch(PeftModel): what PEFT computes, in one pass; its own features go on working."""

import copy
import io

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners import lora
from peft.utils.hotswap import hotswap_adapter
from tiny_models import checkpointed, tiny, token_ids
from tiny_peft import TARGETS, config, mixture, peft_model, pooled_layers, run
from torch import nn

import sapt_fast
from sapt_fast.methods.peft.pool import PeftHandle


@pytest.mark.parametrize("family", TARGETS)
def test_the_logits_are_pefts(family):
    model = peft_model(family)
    before = run(model, family)
    assert sapt_fast.patch(model) is model
    torch.testing.assert_close(run(model, family), before, rtol=1e-4, atol=1e-4)
    assert len(model.sapt.report.patched) == len(pooled_layers(model)) > 0
    assert model.sapt.tasks == ["a0", "a1", "a2"]
    assert model.sapt.attention is None


@pytest.mark.parametrize("active", [["a0"], ["a2"], ["a0", "a2"], ["a1", "a0"]], ids="+".join)
def test_only_active_adapters_count(active):
    model = peft_model()
    sapt_fast.patch(model)
    reference = peft_model()
    for m in (model, reference):
        m.base_model.set_adapter(active)
    torch.testing.assert_close(run(model), run(reference), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_gradient_is_pefts(family, checkpointing):
    models = [peft_model(family).double().train() for _ in range(2)]
    sapt_fast.patch(models[1])
    grads = []
    for model in models:
        if checkpointing:
            checkpointed(model, {"use_reentrant": False})
        loss = model(input_ids=token_ids(), labels=token_ids(seed=3)).loss
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() != set()
    for name, grad in grads[1].items():
        torch.testing.assert_close(grad, grads[0][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_base(adapters):
    models = [
        peft_model(dtype=torch.bfloat16, autocast_adapter_dtype=adapters == torch.float32)
        for _ in range(2)
    ]
    exact = run(peft_model())
    sapt_fast.patch(models[1])
    plain, got = (run(m).float() for m in models)
    assert next(iter(pooled_layers(models[1]))).lora_A["a0"].weight.dtype == adapters
    assert (got - exact).norm() <= 2 * (plain - exact).norm()


def test_training_moves_pefts_own_parameters():
    models = [peft_model().train() for _ in range(2)]
    sapt_fast.patch(models[1])
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for step in range(3):
            model(input_ids=token_ids(seed=step), labels=token_ids(seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    first, second = (dict(m.named_parameters()) for m in models)
    assert first.keys() == second.keys()
    for name, p in second.items():
        torch.testing.assert_close(p, first[name], rtol=1e-3, atol=1e-4)


# --- weights ---


def same_targets():
    return [config("llama"), config("llama", r=2), config("llama", r=7)]


def expected_rows(weights, configs=None):
    rows = []
    for b, row in enumerate(weights):
        model = peft_model(configs=configs)
        model.base_model.add_weighted_adapter(
            ["a0", "a1", "a2"], row.tolist(), "mix", combination_type="cat"
        )
        model.base_model.set_adapter("mix")
        with torch.no_grad():
            rows.append(model(input_ids=token_ids()[b : b + 1]).logits)
    return torch.cat(rows)


def test_weights_per_sample_three_ways():
    weights = mixture()
    expected = expected_rows(weights, same_targets())
    model = sapt_fast.patch(peft_model(configs=same_targets()))
    with model.sapt.fixed(weights):
        by_context = run(model)
    torch.testing.assert_close(by_context, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(model, mixture=weights), by_context)

    class Router(nn.Module):
        def forward(self, input_ids, inputs_embeds, attention_mask, labels):
            assert input_ids.shape == (3, 9)
            return weights

    model.sapt.router = Router()
    torch.testing.assert_close(run(model), by_context)
    torch.testing.assert_close(model.sapt.attention, weights)
    model.sapt.router = None
    torch.testing.assert_close(
        run(model), run(peft_model(configs=same_targets())), rtol=1e-5, atol=1e-5
    )


def test_weights_reach_generation():
    weights = mixture()
    model = sapt_fast.patch(peft_model(configs=same_targets()))
    options = {"max_new_tokens": 6, "do_sample": False}
    got = model.generate(input_ids=token_ids(), mixture=weights, **options)
    for b in range(3):
        alone = peft_model(configs=same_targets())
        alone.base_model.add_weighted_adapter(
            ["a0", "a1", "a2"], weights[b].tolist(), "mix", combination_type="cat"
        )
        alone.base_model.set_adapter("mix")
        expected = alone.generate(input_ids=token_ids()[b : b + 1], **options)
        assert torch.equal(got[b], expected[0])


def test_a_router_that_trains_gets_its_gradient():
    model = sapt_fast.patch(peft_model())

    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = nn.Parameter(torch.zeros(3))

        def forward(self, input_ids, **_):
            return self.scores.softmax(0).expand(len(input_ids), 3)

    model.sapt.router = Router()
    model(input_ids=token_ids(), labels=token_ids(seed=3)).loss.backward()
    gradient = model.sapt.router.scores.grad
    epsilon, loss = 1e-2, []
    for sign in (1, -1):
        with torch.no_grad():
            model.sapt.router.scores[1] = sign * epsilon
            loss.append(model(input_ids=token_ids(), labels=token_ids(seed=3)).loss.double())
    assert gradient[1].item() == pytest.approx(float(loss[0] - loss[1]) / (2 * epsilon), rel=0.02)


def test_weights_per_token():
    model = sapt_fast.patch(peft_model(configs=same_targets()))
    per_sample = mixture()
    expected = run(model, mixture=per_sample)
    got = run(model, mixture=per_sample[:, None].expand(3, 9, 3))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_on_meta_tensors():
    model = sapt_fast.patch(peft_model()).to("meta")
    ids = token_ids().to("meta")
    logits = model(input_ids=ids).logits
    assert logits.device == ids.device
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("names", [["a0", "a1", "a2"], ["a2", "__base__", "a2"]])
def test_adapter_names_of_a_mixed_batch(names):
    models = [peft_model() for _ in range(2)]
    sapt_fast.patch(models[1])
    expected, got = (run(m, adapter_names=names) for m in models)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    options = {"max_new_tokens": 4, "do_sample": False, "adapter_names": names}
    generated = [m.generate(input_ids=token_ids(), **options) for m in models]
    assert torch.equal(*generated)


def doubled(base, calls):
    base.register_forward_hook(lambda module, inputs, y: calls.append(1) or y * 2)


def widened(base, calls):
    base.register_forward_hook(lambda module, inputs, y: calls.append(1) or y.double())


def sparse(base, calls):
    base.weight = nn.Parameter(base.weight.detach().to_sparse_csr(), requires_grad=False)


@pytest.mark.parametrize(
    ("family", "change"),
    [("gpt2", None), ("bert", None), ("llama", doubled), ("llama", widened), ("llama", sparse)],
)
def test_adapter_names_over_every_base_layer(family, change):
    outputs, calls = [], ([], [])
    for seen, patches in zip(calls, (False, True), strict=True):
        model = peft_model(family)
        if patches:
            sapt_fast.patch(model)
        layer = next(m for m in model.modules() if isinstance(m, lora.Linear))
        if change is not None:
            change(layer.base_layer, seen)
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            outputs.append(layer(x, adapter_names=["a2", "__base__", "a0"]))
    torch.testing.assert_close(*reversed(outputs), rtol=1e-5, atol=1e-5)
    assert calls[1] == calls[0]


# --- what PEFT does with its adapters ---


def test_save_and_load(tmp_path):
    model = sapt_fast.patch(peft_model())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "a0", adapter_name="a0")
    for k in (1, 2):
        loaded.load_adapter(tmp_path / f"a{k}", f"a{k}")
    loaded.base_model.set_adapter(["a0", "a1", "a2"])
    torch.testing.assert_close(run(loaded), run(peft_model()))
    assert not any("sapt" in key for key in model.state_dict())
    assert model.state_dict().keys() == peft_model().state_dict().keys()


def test_load_add_and_delete_are_followed(tmp_path):
    source = peft_model(seed=0)
    source.save_pretrained(tmp_path)
    model = sapt_fast.patch(peft_model())
    reference = peft_model()
    for m in (model, reference):
        m.delete_adapter("a1")
        m.load_adapter(tmp_path / "a1", "new", is_trainable=False)
        m.add_adapter("wide", config("llama", r=3, target_modules=["o_proj", "q_proj"]))
        m.base_model.set_adapter(["a0", "new", "wide"])
        with torch.no_grad():
            for name, p in m.named_parameters():
                if ".wide." in name:
                    p.fill_(0.1)
    assert model.sapt.tasks == ["a0", "a2", "new", "wide"]
    torch.testing.assert_close(run(model), run(reference), rtol=1e-5, atol=1e-5)
    assert any(path.endswith("o_proj") for path in model.sapt.report.patched)


def test_disable_merge_and_unmerge():
    model, reference = sapt_fast.patch(peft_model()), peft_model()
    with model.disable_adapter(), reference.disable_adapter():
        torch.testing.assert_close(run(model), run(reference))
    both = run(model)
    model.merge_adapter()
    torch.testing.assert_close(run(model), both, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(run(model), both, rtol=1e-4, atol=1e-4)
    merged = sapt_fast.unpatch(model).merge_and_unload()
    torch.testing.assert_close(run(merged), both, rtol=1e-4, atol=1e-4)


def test_merge_and_unload_of_a_patched_model():
    model = sapt_fast.patch(peft_model())
    before = run(model)
    merged = model.merge_and_unload()
    assert not pooled_layers(merged)
    torch.testing.assert_close(run(merged), before, rtol=1e-4, atol=1e-4)
    assert not hasattr(model, "sapt")
    sapt_fast.patch(merged)  # nothing of ours was left on it


def test_hot_swap(tmp_path):
    other = peft_model(configs=[config("llama")], seed=1)
    other.save_pretrained(tmp_path)
    model = sapt_fast.patch(peft_model(configs=[config("llama")]))
    run(model)
    hotswap_adapter(model, tmp_path / "a0", "a0", torch_device="cpu")
    reference = peft_model(configs=[config("llama")])
    hotswap_adapter(reference, tmp_path / "a0", "a0", torch_device="cpu")
    torch.testing.assert_close(run(model), run(reference), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.to(torch.float64),
        lambda m: copy.deepcopy(m),
        lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}) and m,
        lambda m: torch.load(_saved(m), weights_only=False),
    ],
    ids=["to", "deepcopy", "load_state_dict", "pickle"],
)
def test_moved_parameters_are_followed(change):
    model, reference = sapt_fast.patch(peft_model()), peft_model()
    run(model)
    model, reference = change(model), change(reference)
    model = reference if model is True else model
    torch.testing.assert_close(run(model), run(reference), rtol=1e-5, atol=1e-5)


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


def test_parameters_assigned_by_hand_are_followed():
    model, reference = sapt_fast.patch(peft_model()), peft_model()
    run(model)
    for m in (model, reference):
        for layer in m.modules():
            if isinstance(layer, lora.Linear):
                layer.lora_B["a0"].weight.data = torch.full_like(layer.lora_B["a0"].weight, 0.2)
                layer.lora_A["a1"].weight.data.mul_(3)
                layer.set_scale("a0", 5.0)
    torch.testing.assert_close(run(model), run(reference), rtol=1e-5, atol=1e-5)


# --- what is left to PEFT ---


def test_dora_is_left_to_peft_and_reported():
    configs = [config("llama"), config("llama", use_dora=True, target_modules=["q_proj"])]
    model, reference = peft_model(configs=configs), peft_model(configs=configs)
    sapt_fast.patch(model)
    torch.testing.assert_close(run(model), run(reference))
    assert all(path.endswith("q_proj") for path in model.sapt.report.skipped)
    assert "variants" in next(iter(model.sapt.report.skipped.values()))
    with pytest.raises(RuntimeError, match="DoRA"):
        run(model, mixture=torch.ones(2))
    assert all(path.endswith("v_proj") for path in model.sapt.report.patched)
    with pytest.raises(ValueError, match="strict"):
        sapt_fast.patch(peft_model(configs=configs), strict=True)


def test_adapters_with_a_bias_are_left_to_peft():
    configs = [config("llama"), config("llama", lora_bias=True, target_modules=["v_proj"])]
    model, reference = peft_model(configs=configs), peft_model(configs=configs)
    sapt_fast.patch(model)
    torch.testing.assert_close(run(model), run(reference))
    assert "bias" in next(iter(model.sapt.report.skipped.values()))


def test_dropout():
    one = [config("llama", lora_dropout=0.5)]
    model = sapt_fast.patch(peft_model(configs=one)).train()
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(run(model))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    torch.testing.assert_close(run(model.eval()), run(peft_model(configs=one)))
    differ = [config("llama", lora_dropout=0.5), config("llama")]
    model = sapt_fast.patch(peft_model(configs=differ)).train()
    run(model)  # one mask for each adapter, by PEFT
    with pytest.raises(RuntimeError, match="lora_dropout"):
        run(model, mixture=torch.ones(2))


# --- errors, and back again ---


def test_unpatch_restores_bit_for_bit():
    model = peft_model()
    before, keys = run(model), list(model.state_dict())
    sapt_fast.unpatch(sapt_fast.patch(model))
    assert torch.equal(run(model), before)
    assert list(model.state_dict()) == keys
    assert not pooled_layers(model)
    assert not hasattr(model, "sapt")
    for name, p in model.named_parameters():
        assert p.is_contiguous(), name
        if "lora_" in name:
            assert p.untyped_storage().nbytes() == p.numel() * p.element_size()
    sapt_fast.patch(model)
    torch.testing.assert_close(run(model), before, rtol=1e-5, atol=1e-5)


def test_patching_twice_changes_nothing():
    model = sapt_fast.patch(peft_model())
    handle = model.sapt
    assert isinstance(handle, PeftHandle)
    assert sapt_fast.patch(model).sapt is handle


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(2), r"\[3\]"),
        (torch.ones(3, 4), r"\[B, 3\]"),
        (torch.tensor([1.0, float("nan"), 0.0]), "finite"),
        (torch.ones(3, dtype=torch.int64), "integer"),
    ],
)
def test_wrong_weights_are_refused(weights, message):
    model = sapt_fast.patch(peft_model())
    with pytest.raises(ValueError, match=message):
        model.sapt.fixed(weights)
    with pytest.raises(ValueError, match=message):
        run(model, mixture=weights)
    model.sapt.router = nn.Identity()
    model.sapt.router.forward = lambda **_: weights
    with pytest.raises(ValueError, match="router"):
        run(model)
    model.sapt.router.forward = lambda **_: "weights"
    with pytest.raises(TypeError, match="router"):
        run(model)


def test_what_cannot_be_patched_says_so():
    with pytest.raises(ValueError, match="config"):
        sapt_fast.patch(peft_model(), sapt_fast.SaptConfig())
    ia3 = get_peft_model(
        tiny("llama"),
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    )
    with pytest.raises(ValueError, match="LoRA"):
        sapt_fast.patch(ia3)
    with pytest.raises(ValueError, match="not patched"):
        sapt_fast.unpatch(peft_model())
    with pytest.raises(TypeError, match="router"):
        sapt_fast.patch(peft_model()).sapt.router = "uniform"


def test_fullgraph_compile_with_new_weights():
    model = sapt_fast.patch(peft_model(base=tiny("llama")))
    expected = [run(model, mixture=w, use_cache=False) for w in (mixture(), mixture().flip(0))]
    torch._dynamo.reset()
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")
    for weights, logits in zip((mixture(), mixture().flip(0)), expected, strict=True):
        with torch.no_grad():
            got = compiled(input_ids=token_ids(), use_cache=False, mixture=weights).logits
        torch.testing.assert_close(got, logits)
