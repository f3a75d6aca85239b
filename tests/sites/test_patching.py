"""patch and unpatch: what is swapped, what is refused, and that everything comes back."""

import copy
import io
import pickle

import pytest
import torch
import transformers
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, checkpointed, fill, patched, settings, tiny, token_ids
from torch import nn

import sapt_fast
from sapt_fast.sites.linear import MixedConv1D, MixedLinear


def run(model, ids=None):
    ids = token_ids() if ids is None else ids
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits


# --- what is patched ---

DEFAULT_LAYERS = {
    "t5": 12,  # 2 encoder, 2 decoder and 2 cross attentions, q and v of each
    "t5_narrow": 12,
    "bart": 12,
    "llama": 4,
    "qwen2": 4,
    "mistral": 4,
    "gemma": 4,
    "gpt2": 2,
    "bert": 4,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_default_targets(family):
    model = sapt_fast.patch(tiny(family))
    assert len(model.sapt.report.patched) == DEFAULT_LAYERS[family]
    assert not model.sapt.report.skipped
    kind = MixedConv1D if family == "gpt2" else MixedLinear
    assert {type(model.get_submodule(name)) for name in model.sapt.report.patched} == {kind}
    assert isinstance(model.get_submodule(model.sapt.report.patched[0]), kind.__mro__[2])


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj", "o_proj"], 4),
        (["layers.1.self_attn.v_proj"], 1),
        (("gate_proj",), 2),
        (r".*layers\.0\..*(q|k)_proj", 2),
    ],
    ids=str,
)
def test_named_targets(targets, count):
    model = sapt_fast.patch(tiny("llama"), settings(target_modules=targets))
    assert len(model.sapt.report.patched) == count


def test_report_says_what_was_skipped_and_why():
    model = tiny("llama")
    foreign = type("Foreign", (nn.Module,), {})
    model.model.layers[0].self_attn.q_proj.__class__ = foreign
    model.model.layers[1].self_attn.v_proj.forward = lambda x: x
    sapt_fast.patch(model, settings())
    report = model.sapt.report
    assert report.patched == ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.q_proj"]
    first, second = report.skipped.items()
    assert first[0] == "model.layers.0.self_attn.q_proj"
    assert "Foreign is not a linear layer" in first[1]
    assert second[0] == "model.layers.1.self_attn.v_proj"
    assert "replaced by another library" in second[1]
    assert "2 layers patched, 2 skipped" in str(report)
    assert "model.layers.1.self_attn.v_proj" in str(report)


@pytest.mark.parametrize("strict", [False, True])
def test_names_that_match_nothing(strict, caplog):
    model = tiny("llama")
    before, config = snapshot(model), settings(target_modules=["q_proj", "vv", "self_attn"])
    if strict:
        with pytest.raises(ValueError, match=r"(?s)strict.*'vv' matches nothing"):
            sapt_fast.patch(model, config, strict=True)
        assert snapshot(model) == before
        return
    sapt_fast.patch(model, config)
    assert model.sapt.report.unmatched == ["vv"]
    assert "'vv' matches nothing" in str(model.sapt.report)
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "target_modules: no module of the model is named ['vv']"
    ]


@pytest.mark.parametrize("kind", ["XLNet", "FSMT"])
def test_models_that_see_tokens_before_samples_are_refused(kind):
    config = getattr(transformers, f"{kind}Config")()
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}Model")(config)
    with pytest.raises(ValueError, match=r"model: the layers of .* expect \[tokens, batch\]"):
        sapt_fast.patch(model, settings(target_modules=["layer_1", "q_proj"]))


def snapshot(model):
    """What `unpatch` must bring back: classes, attributes, hooks and parameters of every module."""
    return {
        name: (
            type(module),
            sorted(vars(module)),
            sorted(vars(module)["_modules"]),
            [len(v) for k, v in sorted(vars(module).items()) if k.endswith("hooks")],
            {k: (id(p), p.requires_grad, p._version) for k, p in module.named_parameters()},
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize(
    ("change", "config", "strict", "message"),
    [
        (None, settings(target_modules=["nothing"]), False, r"(?s)target_modules: .*q_proj"),
        (
            None,
            settings(target_modules="("),
            False,
            r"target_modules: .* expected a regular expression",
        ),
        ("foreign", settings(), True, r"(?s)strict.*Foreign"),
        ("unknown type", settings(), False, "target_modules: no default for model type 'mystery'"),
        ("block", settings(), False, "accelerate loads all weights below model.layers.0 at once"),
    ],
    ids=["no_match", "bad_regex", "strict", "unknown_type", "accelerate"],
)
def test_refusals_change_nothing(change, config, strict, message):
    model = tiny("llama")
    layer = model.model.layers[0].self_attn.q_proj
    if change == "foreign":
        layer.__class__ = type("Foreign", (nn.Module,), {})
    elif change == "unknown type":
        model.config.model_type = "mystery"
    elif change == "block":
        hook = AlignDevicesHook("cpu", offload=True, place_submodules=True)
        add_hook_to_module(model.model.layers[0], hook)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        sapt_fast.patch(model, config, strict=strict)
    assert snapshot(model) == before


def test_unknown_model_type_with_named_targets():
    model = tiny("llama")
    model.config.model_type = "mystery"
    assert len(sapt_fast.patch(model, settings(target_modules=["q_proj"])).sapt.report.patched) == 2


def test_only_pretrained_models():
    with pytest.raises(TypeError, match="PreTrainedModel"):
        sapt_fast.patch(nn.Linear(2, 2))


def test_patching_twice():
    model = patched("llama")
    before, handle = snapshot(model), model.sapt
    assert sapt_fast.patch(model) is model
    assert sapt_fast.patch(model, settings()) is model
    assert model.sapt is handle
    with pytest.raises(ValueError, match=r"config: .*unpatch"):
        sapt_fast.patch(model, settings(r=2))
    assert snapshot(model) == before


def test_without_a_task_nothing_changes():
    model = tiny("t5")
    before = run(model)
    sapt_fast.patch(model, settings())
    assert torch.equal(run(model), before)
    model.generate(token_ids(), max_new_tokens=3, num_beams=2)
    with pytest.raises(RuntimeError, match="add_task"):
        model.sapt.route(token_ids())
    assert model.sapt.attention is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_task_changes_nothing_yet(family):
    model = tiny(family)
    before = run(model)
    sapt_fast.patch(model, settings()).sapt.add_task("first")
    torch.testing.assert_close(run(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_base_keys_of_the_state_dict_stay(family):
    base = tiny(family).state_dict()
    state = patched(family).state_dict()
    assert list(base) == [key for key in state if "sapt" not in key]
    assert all(torch.equal(state[key], value) for key, value in base.items())


def test_what_trains():
    model = patched("llama")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = model.sapt.report.patched
    assert names == {f"{name}.sapt_pool.{m}.trainable" for name in layers for m in "ab"} | {
        f"sapt.router.{n}"
        for n in ("down.weight", "up.weight", "norm.weight", "norm.bias", "keys.trainable")
    }
    assert len(list(model.sapt.trainable_parameters())) == len(names)


# --- unpatch ---


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_restores_exactly(family):
    model = tiny(family)
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)
    before, keys, logits = snapshot(model), list(model.state_dict()), run(model)
    sapt_fast.patch(model, settings())
    model.sapt.add_task("first")
    model.sapt.add_task("second")
    fill(model)
    assert not torch.equal(run(model), logits)
    if model.can_generate():
        model.generate(token_ids(), max_new_tokens=2, num_beams=2)
    next(model.parameters()).requires_grad_(True)
    sapt_fast.unpatch(model)
    assert snapshot(model) == before
    assert list(model.state_dict()) == keys
    assert torch.equal(run(model), logits)
    with pytest.raises(ValueError, match="not patched"):
        sapt_fast.unpatch(model)
    sapt_fast.patch(model, settings(r=2))  # and again, with another config


@pytest.mark.parametrize("enabled", ["never", "before", "after"])
def test_unpatch_restores_gradient_checkpointing(enabled):
    model = tiny("t5")
    if enabled == "before":
        checkpointed(model)
        model.disable_input_require_grads()
    functions = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, FUNCTION)]
    sapt_fast.patch(model, settings())
    if enabled == "after":
        checkpointed(model)
    sapt_fast.unpatch(model)
    now = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, FUNCTION)]
    assert not any("sapt_fast" in type(function).__module__ for function in now)
    if enabled != "after":
        assert now == functions


FUNCTION = "_gradient_checkpointing_func"


def test_unpatch_keeps_an_instances_own_generate():
    model = tiny("llama")
    model.generate = own = lambda *args, **kwargs: "own"
    sapt_fast.patch(model, settings())
    assert model.generate(token_ids()) == "own"
    sapt_fast.unpatch(model)
    assert model.generate is own


def test_layers_that_another_library_wrapped():
    """PEFT puts its own in their place: nothing of the model changes until they are back."""
    model = patched("t5")
    expected = run(model)
    other = get_peft_model(model, LoraConfig(r=2, target_modules=["q", "v"]))
    before = snapshot(model)
    for call in (
        lambda: model.sapt.add_task("next"),
        lambda: model.sapt.pools,
        lambda: sapt_fast.unpatch(model),
    ):
        with pytest.raises(ValueError, match=r"SelfAttention\.q: got peft\..*\.Linear, expected"):
            call()
    assert snapshot(model) == before
    other.unload()
    model.sapt.add_task("next")
    sapt_fast.unpatch(model)
    assert not torch.equal(run(model), expected)


def test_layers_that_are_gone():
    model = patched("llama")
    del model.model.layers[1]
    with pytest.raises(ValueError, match=r"layers\.1.*no longer has this layer"):
        sapt_fast.unpatch(model)


# --- accelerate ---


def test_patch_after_accelerates_hooks_were_removed():
    model = tiny("llama")
    for module in list(model.modules()):
        add_hook_to_module(module, ModelHook())
    remove_hook_from_module(model, recurse=True)
    sapt_fast.patch(model, settings(), strict=True)
    model.sapt.add_task("first")
    assert torch.equal(run(fill(model)), run(fill(_patched_one())))


def _patched_one():
    torch.manual_seed(0)
    model = sapt_fast.patch(tiny("llama"), settings())
    model.sapt.add_task("first")
    return model


def test_accelerates_hooks_after_patch():
    model, base = patched("llama"), run(tiny("llama"))
    expected = run(model)
    for module in list(model.modules()):
        add_hook_to_module(module, ModelHook())
    assert torch.equal(run(model), expected)
    sapt_fast.unpatch(model)
    assert torch.equal(run(model), base)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(run(model), base)


# --- copies ---


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


MAKERS = {"deepcopy": copy.deepcopy, "pickle": _pickled, "save": _saved}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("family", ["t5", "llama", "gpt2"])
def test_a_copy_stands_alone(family, make):
    model = patched(family)
    expected = run(model)
    model.sapt.route(token_ids())  # leaves weights with a graph behind
    other = make(model)
    assert torch.equal(run(other), expected)
    assert {t.data_ptr() for t in other.state_dict().values() if t.numel()}.isdisjoint(
        t.data_ptr() for t in model.state_dict().values()
    )
    other.sapt.add_task("another")
    fill(other, seed=1)
    assert not torch.equal(run(other), expected)
    assert torch.equal(run(model), expected)
    assert model.sapt.tasks == ["task0", "task1", "task2"]
    if other.can_generate():
        other.generate(token_ids(), max_new_tokens=2, num_beams=2)
    sapt_fast.unpatch(other)
    assert torch.equal(run(other), run(tiny(family)))
    if other.can_generate():
        other.generate(token_ids(), max_new_tokens=2)
    checkpointed(other)
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(assign):
    model, other = patched("t5"), patched("t5", seed=1)
    fill(other, seed=3)
    expected = run(other)
    keys = model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    assert torch.equal(run(model), expected)
    with torch.no_grad():  # the parameters are the memory that the layers read
        for pool in model.sapt.pools.values():
            pool.b.trainable.zero_()
            pool.b.frozen.zero_()
    torch.testing.assert_close(run(model), run(sapt_fast.unpatch(other)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("family", ["t5", "llama", "gpt2"])
def test_to_another_dtype(family, dtype):
    model = patched(family)
    expected = run(model)
    model.to(dtype)
    tolerance = 1e-4 if dtype == torch.float64 else 0.1
    error = (run(model).float() - expected).norm() / expected.norm()
    assert error < tolerance
    for pool in model.sapt.pools.values():
        assert pool.a.rows().dtype == dtype
        pointers = pool.a.rows().data_ptr(), pool.a.frozen.data_ptr()
        assert pointers[0] == pointers[1]
    model.sapt.add_task("later")
    assert model.sapt.attention is None
    error = (run(model).float() - expected).norm() / expected.norm()
    assert error > 10 * tolerance or dtype != torch.float64  # the new key takes its share


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_on_meta_tensors(family, gradient):
    """Shapes without numbers, as those ask for who estimate memory."""
    model = patched(family).to("meta")
    ids = token_ids().to("meta")
    inputs = {"decoder_input_ids": ids} if family == "t5" else {}
    with torch.set_grad_enabled(gradient):
        logits = model(input_ids=ids, **inputs).logits
        assert logits.device == ids.device
        assert logits.shape[:2] == ids.shape
        if gradient:
            logits.sum().backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_half():
    model = patched("llama").half()
    assert run(model).dtype == torch.float16


def test_a_pool_moved_just_before_compiling():
    """A compiled forward does not realign, so `.to()` must have done it."""
    model = patched(tiny("llama")).to(torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(compiled), run(model))
    other = patched(tiny("llama", seed=2), seed=2).double()
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    assert torch.equal(run(model), run(other))
    torch.testing.assert_close(run(compiled), run(model))


def test_training_after_a_move_in_inference_mode():
    model = patched("llama").to(torch.float64)
    for pool in model.sapt.pools.values():
        pool.a.frozen.data = pool.a.frozen.data.clone()
    with torch.inference_mode():
        model(token_ids())
    model(token_ids(), labels=token_ids()).loss.backward()
    for pool in model.sapt.pools.values():
        assert pool.a.trainable.grad is not None


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_float32_adapters_on_a_bfloat16_base(family):
    model = patched(family)
    expected = run(model)
    model.to(torch.bfloat16)
    for pool in model.sapt.pools.values():
        pool.float()
    assert (run(model).float() - expected).norm() / expected.norm() < 0.1
    extra = {"decoder_input_ids": token_ids()} if family == "t5" else {}
    model(token_ids(), **extra).logits.float().square().sum().backward()
    for pool in model.sapt.pools.values():
        assert pool.b.trainable.grad.dtype == torch.float32


def test_save_pretrained_of_transformers_keeps_the_base(tmp_path):
    model = patched("llama")
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(run(again), run(tiny("llama")))
