"""Models that accelerate dispatches, before or after patch: the same numbers, hooks that stay."""

import copy
from functools import partial

import pytest
import torch
from accelerate import (
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
)
from accelerate.big_modeling import attach_layerwise_casting_hooks
from accelerate.hooks import (
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    attach_align_device_hook,
    remove_hook_from_module,
)
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import checkpointed, fill, settings, tiny, token_ids
from torch import nn
from transformers import LlamaForCausalLM

import sapt_fast
from sapt_fast.devices import execution_device

CPU = torch.device("cpu")


def on_cpu(model, folder):
    dispatch_model(model, dict.fromkeys(_parts(model), "cpu"), force_hooks=True)


def on_disk(model, folder):
    """Every second layer."""
    places = dict.fromkeys(_parts(model), "cpu")
    places |= dict.fromkeys([name for name in places if name.endswith(".0")], "disk")
    dispatch_model(model, places, main_device="cpu", offload_dir=folder)


def all_on_disk(model, folder):
    disk_offload(model, folder, CPU)


def offloaded(model, folder):
    cpu_offload(model, CPU)


def offloaded_as_a_whole(model, folder):
    cpu_offload_with_hook(model, CPU)


def in_sequence(model, folder):
    """Two hooks on each module, of which the second offloads."""
    for module in list(model.modules()):
        if next(module.parameters(recurse=False), None) is not None:
            add_hook_to_module(module, SequentialHook(ModelHook(), ModelHook()))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attach_align_device_hook(model, CPU, offload=True, weights_map=state)


def _parts(model):
    """The names of the modules to place: the layers, and what is beside them."""
    layers = [
        f"{name}.{index}"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not any(part.isdigit() for part in name.split("."))
        for index in range(len(module))
    ]
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers()),
    }
    beside = [n.rpartition(".")[0] for n in tensors if not n.startswith(tuple(layers))]
    return list(dict.fromkeys([*layers, *beside]))


DISPATCH = [on_cpu, on_disk, all_on_disk, offloaded, offloaded_as_a_whole, in_sequence]
CONFIGS = {
    "lora": {},
    "standardized": {"standardize_query": True},
    "prompt": {"adapter": "prompt", "prompt_length": 3},
}


def with_tasks(model, **changed):
    torch.manual_seed(1)
    sapt_fast.patch(model, settings(**changed))
    model.sapt.add_task("a")
    model.sapt.add_task("b")
    return fill(model)


def made(family, dispatch, folder, when="before", **changed):
    """A model with two tasks, dispatched before patch, after it, or after the tasks."""
    model = tiny(family)
    if when == "before":
        dispatch(model, folder)
    torch.manual_seed(1)
    sapt_fast.patch(model, settings(**changed))
    if when == "patched":
        dispatch(model, folder)
    model.sapt.add_task("a")
    model.sapt.add_task("b")
    fill(model)
    if when == "learned":
        dispatch(model, folder)
    return model


def run(model, **given):
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = token_ids()
    with torch.no_grad():
        return model(input_ids=token_ids(), **given).logits


def gradients(model):
    model.zero_grad()
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("family", "config", "dispatch", "when"),
    [("llama", "lora", d, w) for d in DISPATCH for w in ("before", "patched", "learned")]
    + [
        (*of, d, w)
        for of in (("t5", "lora"), ("llama", "standardized"), ("llama", "prompt"), ("t5", "prompt"))
        for d, w in ((on_disk, "learned"), (offloaded, "before"))
    ],
)
def test_the_same_numbers(family, config, dispatch, when, tmp_path):
    expected = with_tasks(tiny(family), **CONFIGS[config])
    model = made(family, dispatch, tmp_path, when, **CONFIGS[config])
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(run(model), run(expected))
    close(model.sapt.attention, expected.sapt.attention)
    wanted, got = gradients(expected), gradients(model)
    assert got.keys() == wanted.keys()
    close(got, wanted)
    if config == "lora" and when != "patched":
        options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
        tokens = model.generate(token_ids(), **options)
        assert torch.equal(tokens, expected.generate(token_ids(), **options))


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_other_families(family, tmp_path):
    expected = run(with_tasks(tiny(family)))
    for dispatch in (on_disk, offloaded):
        torch.testing.assert_close(run(made(family, dispatch, tmp_path / "x")), expected)


@pytest.mark.parametrize("dispatch", [on_disk, offloaded])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_gradient_checkpointing(family, dispatch, tmp_path):
    expected = gradients(with_tasks(tiny(family)))
    model = checkpointed(made(family, dispatch, tmp_path))
    torch.testing.assert_close(gradients(model), expected)


@pytest.mark.parametrize("dispatch", [on_cpu, on_disk, offloaded])
@pytest.mark.parametrize("config", ["lora", "prompt"])
def test_an_optimizer_from_before_trains_on(config, dispatch, tmp_path):
    """The dispatch leaves the adapters' and the router's parameters the objects that they were."""
    trained = []
    for place in (None, dispatch):
        model = with_tasks(tiny("llama"), **CONFIGS[config])
        optimizer = torch.optim.SGD(model.sapt.trainable_parameters(), lr=0.5)
        if place is not None:
            place(model, tmp_path)
        before = run(model)
        gradients(model)
        optimizer.step()
        model.sapt.add_task("c", optimizer)
        gradients(model)
        optimizer.step()
        assert not torch.allclose(run(model, mixture=torch.ones(3)), before)
        trained.append({n: p.detach().clone() for n, p in model.named_parameters() if "sapt" in n})
        rows = [p for n, p in model.named_parameters() if "sapt" in n]
        assert not any(p.is_meta for p in rows)
    assert trained[0].keys() == trained[1].keys()
    old = {name for name in trained[0] if not name.endswith("trainable")}
    for name in old:  # the newest rows are random
        torch.testing.assert_close(trained[1][name], trained[0][name])


@pytest.mark.parametrize("dispatch", [on_disk, offloaded])
def test_save_and_load(dispatch, tmp_path):
    plain, model = with_tasks(tiny("llama")), made("llama", dispatch, tmp_path / "offload")
    for name, source in (("plain", plain), ("dispatched", model)):
        source.sapt.save_pretrained(tmp_path / name)
    texts = [(tmp_path / n / "sapt_config.json").read_text() for n in ("plain", "dispatched")]
    assert texts[0] == texts[1]
    target = tiny("llama")
    dispatch(target, tmp_path / "other")
    for folder in ("plain", "dispatched"):
        for onto in (tiny("llama"), copy.deepcopy(target) if dispatch is offloaded else None):
            if onto is not None:
                torch.testing.assert_close(
                    run(sapt_fast.load_pretrained(onto, tmp_path / folder)), run(plain)
                )
    other = tiny("llama", seed=1)
    dispatch(other, tmp_path / "third")
    with pytest.raises(ValueError, match="has the same shape but other values"):
        sapt_fast.load_pretrained(other, tmp_path / "plain")


def test_merge_needs_the_weights(tmp_path):
    expected = with_tasks(tiny("llama"))
    weights = torch.tensor([0.4, 0.9])
    model = made("llama", on_cpu, tmp_path)
    model.sapt.merge(weights)
    torch.testing.assert_close(run(model), run(expected, mixture=weights))
    model.sapt.unmerge()
    torch.testing.assert_close(run(model), run(expected))
    with pytest.raises(ValueError, match="not completely in memory"):
        made("llama", offloaded, tmp_path).sapt.merge(weights)


# --- hooks ---


class Recording(ModelHook):
    """Notes who was called, and with what."""

    def __init__(self):
        self.calls = []

    def pre_forward(self, module, *args, **kwargs):
        self.calls.append(tuple(args[0].shape))
        return (args[0] * 2, *args[1:]), kwargs

    def post_forward(self, module, output):
        return output + 1


@pytest.mark.parametrize("first", [True, False])
def test_hooks_of_layers_run_around_the_mixture(first):
    model, hook = tiny("llama"), Recording()
    layer = model.model.layers[0].self_attn.v_proj
    if first:
        add_hook_to_module(layer, hook)
    with_tasks(model)
    if not first:
        add_hook_to_module(layer, hook)
    plain = with_tasks(tiny("llama")).model.layers[0].self_attn.v_proj
    x = torch.randn(2, 3, 32)
    for handle, weights in ((model.sapt, torch.tensor([0.3, 0.7])),):
        with handle.fixed(weights), torch.no_grad():
            pools = [layer.sapt_pool.adapter(k) for k in range(2)]
            delta = sum(
                w * s * (2 * x @ a.t()) @ b
                for w, s, (a, b) in zip(weights, layer.sapt_pool.scaling, pools, strict=True)
            )
            torch.testing.assert_close(layer(x), nn.Linear.forward(plain, 2 * x) + delta + 1)
    assert hook.calls == [(2, 3, 32)]
    run(model)  # layers with one input are not computed together past a hook
    assert len(hook.calls) == 2
    sapt_fast.unpatch(model)
    torch.testing.assert_close(layer(x), nn.Linear.forward(plain, 2 * x) + 1)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(layer(x), nn.Linear.forward(plain, x))
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("when", ["before", "patched", "learned"])
@pytest.mark.parametrize("dispatch", [on_disk, offloaded, in_sequence])
def test_unpatch_and_removed_hooks(dispatch, when, tmp_path):
    base = tiny("llama")
    model = made("llama", dispatch, tmp_path, when)
    hooks = {name: m._hf_hook for name, m in model.named_modules() if hasattr(m, "_hf_hook")}
    sapt_fast.unpatch(model)
    left = {name: m._hf_hook for name, m in model.named_modules() if hasattr(m, "_hf_hook")}
    assert left == {name: hook for name, hook in hooks.items() if "sapt" not in name}
    assert torch.equal(run(model), run(base))
    with_tasks(model)  # and again
    torch.testing.assert_close(run(model), run(with_tasks(tiny("llama"))))
    remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(run(model), run(with_tasks(tiny("llama"))))
    sapt_fast.unpatch(model)
    assert torch.equal(run(model), run(base))
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]


def test_where_the_adapters_are():
    """On the device where their layer computes, whatever its weight is on just then."""
    model = tiny("llama")
    for index, block in enumerate(model.model.layers):
        place = ("meta", "cpu")[index]  # a device of its own for the first
        attach_align_device_hook(block, torch.device(place), offload=index == 1)
    with_tasks_on = sapt_fast.patch(model, settings())
    places = [layer.sapt_pool.a._memory.device.type for layer in with_tasks_on.sapt.layers.values()]
    assert places == ["meta", "meta", "cpu", "cpu"]
    assert model.sapt.router.norm.weight.device == CPU
    assert execution_device(model.model.layers[1].self_attn.q_proj) == CPU


def test_whole_blocks_are_refused(tmp_path):
    kinds = ["LlamaDecoderLayer"]
    offload = partial(cpu_offload, execution_device=CPU, preload_module_classes=kinds)
    model = offload(tiny("llama"))
    with pytest.raises(ValueError, match=r"below model\.layers\.0 at once \(preload_module"):
        sapt_fast.patch(model, settings())
    model = offload(with_tasks(tiny("llama")))
    with pytest.raises(RuntimeError, match="accelerate offloaded them with their block"):
        run(model)


def test_layerwise_casting_is_refused():
    model = tiny("llama")
    attach_layerwise_casting_hooks(model, torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match=r"accelerate casts .* to torch\.bfloat16"):
        sapt_fast.patch(model, settings())
    assert not hasattr(model, "sapt")


# --- PEFT ---


def peft_model(dispatch=None, folder=None, when="before"):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    base = tiny("llama")
    if when == "base":
        dispatch(base, folder)
    torch.manual_seed(2)
    model = get_peft_model(base, config, adapter_name="a").eval()
    model.add_adapter("b", config)
    if when == "peft":
        dispatch(model, folder)
    sapt_fast.patch(model)
    if when == "patched":
        dispatch(model, folder)
    return model


@pytest.mark.parametrize(
    ("dispatch", "when"),
    [(on_cpu, "base")]
    + [(d, w) for d in (on_cpu, on_disk, offloaded, in_sequence) for w in ("peft", "patched")],
)
def test_peft_models(dispatch, when, tmp_path):
    expected, ids = peft_model(), token_ids()
    model = peft_model(dispatch, tmp_path, when)
    mixture = torch.rand(len(ids), 2)
    names = ["a", "b", "__base__"] * len(ids)
    for given in ({}, {"mixture": mixture}, {"adapter_names": names[: len(ids)]}):
        torch.testing.assert_close(run(model, **given), run(expected, **given))
    options = {"max_new_tokens": 4, "do_sample": False, "mixture": mixture}
    tokens = model.generate(input_ids=ids, **options)
    assert torch.equal(tokens, expected.generate(input_ids=ids, **options))
    wanted = run(expected)
    sapt_fast.unpatch(model)
    torch.testing.assert_close(run(model), wanted)
    sapt_fast.patch(model)
    remove_hook_from_module(model.get_base_model(), recurse=True)
    torch.testing.assert_close(run(model, mixture=mixture), run(expected, mixture=mixture))


def test_adapters_on_a_base_that_is_executed_elsewhere_train(tmp_path):
    expected, model = peft_model(), peft_model(on_cpu, tmp_path, "base")
    mixture = torch.tensor([0.4, 0.6])
    grads = []
    for one in (expected, model):
        one.train()
        one(input_ids=token_ids(), labels=token_ids(), mixture=mixture).loss.backward()
        grads.append([p.grad for p in one.parameters() if p.grad is not None])
    assert len(grads[0]) > 0
    torch.testing.assert_close(grads[1], grads[0])


def test_offloaded_adapters_do_not_train(tmp_path):
    model = peft_model(offloaded, tmp_path, "peft").train()
    with pytest.raises(RuntimeError, match="accelerate offloads the adapters"):
        model(input_ids=token_ids(), mixture=torch.ones(2))


def test_adapters_without_values_are_refused(tmp_path):
    """PEFT makes them on the meta device, where an offloaded base model's weights are."""
    with pytest.raises(ValueError, match="adapter 'a' has no values"):
        peft_model(offloaded, tmp_path, "base")


# --- transformers' device_map ---


def loaded(folder, offload):
    places = dict.fromkeys(_parts(tiny("llama")), "cpu") | {"model.layers.1": "disk"}
    place = {"device_map": places, "offload_folder": str(offload), "dtype": torch.float32}
    return LlamaForCausalLM.from_pretrained(folder, **place).eval()


def test_a_model_loaded_with_a_device_map(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base")
    base = loaded(tmp_path / "base", tmp_path / "offload")
    assert base.model.layers[1].self_attn.q_proj.weight.is_meta
    expected = with_tasks(tiny("llama"))
    model = with_tasks(base)
    torch.testing.assert_close(run(model), run(expected))
    torch.testing.assert_close(gradients(model), gradients(expected))
    model.sapt.save_pretrained(tmp_path / "tasks")
    again = loaded(tmp_path / "base", tmp_path / "other")
    sapt_fast.load_pretrained(again, tmp_path / "tasks")
    torch.testing.assert_close(run(again), run(expected))


def test_peft_adapters_loaded_onto_such_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PEFT writes weights below the working directory
    tiny("llama").save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    expected = get_peft_model(tiny("llama"), config).eval()
    expected.save_pretrained(tmp_path / "adapter")
    base = loaded(tmp_path / "base", tmp_path / "offload")
    where = {f"base_model.model.{name}": place for name, place in base.hf_device_map.items()}
    model = PeftModel.from_pretrained(
        base, tmp_path / "adapter", device_map=where, offload_dir=str(tmp_path / "offload")
    )
    sapt_fast.patch(model.eval(), strict=True)
    sapt_fast.patch(expected)
    for weight in (1.0, -0.5):
        mixture = torch.tensor([weight])
        torch.testing.assert_close(run(model, mixture=mixture), run(expected, mixture=mixture))
