"""What L2P, EPI, SD-LoRA and GainLoRA remember beside their adapters: saved, restored, checked."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import fill, run, tiny, token_ids
from tiny_prompts import bare
from transformers import Trainer, TrainingArguments

import sapt_fast
from sapt_fast.loading import load_of_strategy
from sapt_fast.methods.epi import EpiConfig
from sapt_fast.methods.gainlora import GainLoraConfig
from sapt_fast.methods.l2p import L2pConfig
from sapt_fast.methods.lora_sum import LoraSumConfig
from sapt_fast.methods.sd_lora import SdLoraConfig
from sapt_fast.storage.task_saving import renew_digests


def inputs(seed):
    ids = token_ids(seed=seed)
    return ids, torch.ones_like(ids)


def epi(family="llama", tasks=2, fitted=2):
    model = tiny(family)
    torch.manual_seed(1)
    sapt_fast.patch(model, EpiConfig(r=2))
    for k in range(tasks):
        model.sapt.add_task(f"task{k}")
        if k < fitted:
            model.sapt.fit([inputs(10 + k)])
    return fill(model)


def l2p(family="llama", **options):
    model = bare(family)
    torch.manual_seed(1)
    sapt_fast.patch(model, L2pConfig(**{"prompts": 4, "top": 2, "length": 3, **options}))
    model.l2p.grow("first")
    model.l2p.count_picks([inputs(10)])
    return model


def summed(config):
    """A model with two tasks of a method that computes its weights from trained parameters."""

    def make(family="llama"):
        model = tiny(family)
        torch.manual_seed(1)
        sapt_fast.patch(model, config)
        for k in range(2):
            model.sapt.add_task(f"task{k}")
            fill(model)
        return model

    return make


MADE = {
    "epi": (epi, tiny),
    "l2p": (l2p, bare),
    "sd_lora": (summed(SdLoraConfig(r=2)), tiny),
    "gainlora": (summed(GainLoraConfig(r=2, query_hidden_dim=5)), tiny),
}


def handle_of(model):
    return model.l2p if hasattr(model, "l2p") else model.sapt


def assert_same(model, other):
    for name, tensor in handle_of(model).state().items():
        torch.testing.assert_close(handle_of(other).state()[name], tensor, rtol=0, atol=0)
    assert torch.equal(run(model, token_ids(seed=10)), run(other, token_ids(seed=10)))


@pytest.mark.parametrize("method", MADE)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_folder_gives_the_state_back(method, family, tmp_path):
    make, base = MADE[method]
    model = make(family)
    handle_of(model).save_pretrained(tmp_path)
    assert_same(model, sapt_fast.load_pretrained(base(family), tmp_path))


@pytest.mark.parametrize("method", MADE)
def test_a_trainer_that_resumes_gets_the_state(method, tmp_path):
    """`restore_values` is what it calls."""
    model = MADE[method][0]()
    expected = copy.deepcopy(model)
    handle = handle_of(model)
    handle.save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.zero_()
    for tensor in handle.state().values():
        tensor.data.zero_()
    handle.restore_values(tmp_path)
    assert_same(model, expected)


@pytest.mark.parametrize("method", MADE)
def test_a_trainer_goes_on_from_its_checkpoint(method, tmp_path):
    """transformers' own, in another process."""
    make = MADE[method][0]
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none", max_steps=1)
    model, other = make(), make()
    with torch.no_grad():
        for parameter in handle_of(other).parameters():
            parameter.zero_()
    if method == "l2p":
        other.l2p.picked.zero_()
    elif method == "epi":
        other.sapt.restore_state({})
    Trainer(model, arguments).save_model(str(tmp_path / "checkpoint-1"))
    Trainer(other, arguments)._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert_same(model, other)


def test_values_of_another_method_are_not_taken(tmp_path):
    """They have the same fields and shapes."""
    model, other = tiny("llama"), tiny("llama")
    sapt_fast.patch(model, LoraSumConfig(r=2)).sapt.add_task("a")
    sapt_fast.patch(other, sapt_fast.SaptConfig(r=2)).sapt.add_task("a")
    model.sapt.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="method is 'lora_sum', expected 'sapt'"):
        other.sapt.restore_values(tmp_path)
    with pytest.raises(ValueError, match="method is 'lora_sum', expected 'sapt'"):
        load_of_strategy(tiny("llama"), tmp_path, "sapt", sapt_fast.SaptConfig(r=2))


def test_losses_of_sapt_s_router_are_refused_where_it_does_not_weigh():
    model = MADE["gainlora"][0]()
    with pytest.raises(RuntimeError, match="reflection_loss: not available for 'gainlora'"):
        model.sapt.reflection_loss(inputs(10)[0], torch.ones(2) / 2)
    with pytest.raises(RuntimeError, match="init_key: not available for 'gainlora'"):
        model.sapt.init_key(*inputs(10))


def test_a_weight_of_the_own_key_has_no_meaning_for_l2p():
    with pytest.raises(ValueError, match=r"own_key_loss: got 0.5, expected 0"):
        L2pConfig(own_key_loss=0.5)


def test_epi_is_saved_before_its_first_task_ends(tmp_path):
    model = epi(tasks=1, fitted=0)
    model.sapt.save_pretrained(tmp_path)
    loaded = sapt_fast.load_pretrained(tiny("llama"), tmp_path)
    assert_same(model, loaded)
    loaded.sapt.fit([inputs(10)])
    assert loaded.sapt.means.shape[0] == 1


def test_epi_ends_each_task_once():
    model = epi(tasks=2, fitted=2)
    with pytest.raises(RuntimeError, match=r"fit: got 2 Gaussians and the tasks"):
        model.sapt.fit([inputs(12)])
    with pytest.raises(RuntimeError, match=r"fit: got 0 Gaussians and the tasks"):
        epi(tasks=2, fitted=0).sapt.fit([inputs(12)])


def test_epi_takes_features_without_dropout():
    model = epi(tasks=1, fitted=0).train()
    with pytest.raises(RuntimeError, match=r"fit: .*training mode: call model\.eval"):
        model.sapt.fit([inputs(12)])


def test_epi_takes_features_that_no_copy_changes():
    """Copies of a module are mixed by weights, which are all zero while features are taken."""
    model = tiny("llama")
    config = {"r": 2, "modules_per_task": True}
    with pytest.raises(ValueError, match=r"modules_to_save: model\.norm is in the backbone"):
        sapt_fast.patch(model, EpiConfig(**config, modules_to_save=["norm"]))
    sapt_fast.patch(model, EpiConfig(**config, modules_to_save=["lm_head"])).sapt.add_task("a")
    expected = tiny("llama").base_model(*inputs(10)).last_hidden_state.mean(1)
    torch.testing.assert_close(model.sapt.features(*inputs(10)), expected)


def test_l2p_keeps_keys_in_float32_if_asked():
    model = bare("llama").to(torch.bfloat16)
    config = L2pConfig(prompts=4, top=2, length=3, autocast_adapter_dtype=True)
    sapt_fast.patch(model, config).l2p.grow("first")
    assert {p.dtype for p in model.l2p.parameters()} == {torch.float32}
    ids = token_ids()
    loss = model(ids, labels=ids).loss + model.l2p.key_loss(ids)
    loss.backward()
    assert model.l2p.prompt_keys.grad.abs().max() > 0


def test_epi_leaves_the_attention_of_the_last_forward():
    model = epi()
    run(model, token_ids(seed=11))
    before = model.sapt.attention
    model.sapt.features(*inputs(10))
    assert torch.equal(model.sapt.attention, before)
    assert before.sum() > 0


def test_epi_keeps_its_gaussians_exact_in_a_model_of_another_dtype():
    model = epi()
    means = model.sapt.means.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.sapt.means, means)
    assert model.sapt.route(*inputs(11)).tolist() == [[0.0, 1.0]] * 3


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=[pytest.mark.thorough] * (m == "sd_lora")) for m in MADE],
)
def test_one_graph(method):
    model = MADE[method][0]()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids, mask = inputs(10)
    mask = mask.clone()
    mask[0, :3] = 0
    with torch.no_grad():
        got = compiled(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(got, model(input_ids=ids, attention_mask=mask).logits)


@pytest.mark.parametrize(
    ("method", "changed", "message"),
    [
        ("epi", {"means": None}, r"expected means \[K, D\]"),
        ("epi", {"means": torch.zeros(3, 32, dtype=torch.float64)}, "at most 2 tasks"),
        ("epi", {"means": torch.zeros(2, 32, dtype=torch.int64)}, "torch.int64 of shape"),
        ("epi", {"scatter": torch.zeros(3, 3, dtype=torch.float64)}, r"scatter \[D, D\]"),
        ("epi", {"count": torch.tensor(0)}, "positive count"),
        ("l2p", {"keys": None}, "got shapes"),
        ("l2p", {"keys": torch.zeros(3, 32)}, "got shapes"),
        ("l2p", {"keys": torch.zeros(4, 32, dtype=torch.int64)}, "keys of torch.int64"),
        ("l2p", {"picked": torch.zeros(4)}, "picked of torch.float32"),
        ("l2p", {"picked": -torch.ones(4, dtype=torch.int64)}, "at least 0"),
        ("l2p", {"keys": torch.full((4, 32), torch.nan)}, "NaN"),
        ("sd_lora", {"magnitudes": None}, "got magnitudes: none"),
        ("sd_lora", {"magnitudes": torch.ones(3)}, r"floats of shape \(2,\)"),
        ("sd_lora", {"magnitudes": torch.full((2,), 2.0**31)}, "at most"),
        ("gainlora", {"gates.up": torch.ones(1, 32, 5)}, r"floats of shape \(2, 32, 5\)"),
        ("gainlora", {"gates.down": torch.ones(2, 5, 32).long()}, "got gates.down: torch.int64"),
    ],
)
def test_damaged_states_are_named(method, changed, message, tmp_path):
    make, base = MADE[method]
    handle_of(make()).save_pretrained(tmp_path)
    path = tmp_path / "strategy.safetensors"
    tensors = {**load_file(path), **changed}
    save_file({n: t for n, t in tensors.items() if t is not None}, path)
    renew_digests(tmp_path)
    model = base("llama")
    before = {*model._modules}, {*vars(model)}
    with pytest.raises(ValueError, match=message):
        sapt_fast.load_pretrained(model, tmp_path)
    assert ({*model._modules}, {*vars(model)}) == before


@pytest.mark.parametrize("method", MADE)
def test_a_state_that_is_missing_is_named(method, tmp_path):
    make, base = MADE[method]
    handle_of(make()).save_pretrained(tmp_path)
    (tmp_path / "strategy.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"strategy\.safetensors"):
        sapt_fast.load_pretrained(base("llama"), tmp_path)
    path = tmp_path / "sapt_config.json"
    description = json.loads(path.read_text())
    del description["files"]["strategy.safetensors"]
    path.write_text(json.dumps(description))
    renew_digests(tmp_path)
    with pytest.raises(ValueError, match=r"strategy\.safetensors: got"):
        sapt_fast.load_pretrained(base("llama"), tmp_path)
