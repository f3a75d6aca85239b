"""Parts of a PEFT layer that must be called, dropped or left out as PEFT does it."""

import copy
import pickle

import peft
import pytest
import torch
from peft import BdLoraConfig, LoraConfig, PeftModel, get_layer_status, get_model_status
from tiny_models import tiny, token_ids
from tiny_peft import config, mixture, peft_model, pooled_layers, run
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import sapt_fast
from sapt_fast.ops._dropout import drawn, drop_count, kept

NAMES = ["a0", "a1", "a0"]


def pair(changed=None, **options):
    """A plain PEFT model and a patched one, changed alike after the patch."""
    models = [peft_model(**options) for _ in range(2)]
    sapt_fast.patch(models[1])
    for model in models:
        for layer in lora_layers(model):
            if changed is not None:
                changed(layer)
    return models


def lora_layers(model):
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]


# --- dropout ---


def train_dropout(layer):
    for dropout in layer.lora_dropout.values():
        dropout.train()


def rest_dropout(layer):
    for module in layer.modules():
        module.train()
    for dropout in layer.lora_dropout.values():
        dropout.eval()


def some_dropout(layer):
    layer.lora_dropout["a1"].train()


def rates(layer):
    train_dropout(layer)
    layer.lora_dropout["a0"].p = 0.9


@pytest.mark.parametrize("change", [train_dropout, rest_dropout, some_dropout, rates])
@pytest.mark.parametrize("active", [["a0"], ["a0", "a1"]], ids="+".join)
def test_dropout_follows_its_own_module(change, active):
    models = pair(change, configs=[config("llama", lora_dropout=0.5)] * 2)
    results = []
    for model in models:
        model.base_model.set_adapter(active)
        for extra in ({}, {"adapter_names": NAMES}):
            torch.manual_seed(0)
            results.append(run(model, **extra))
    # One adapter is computed in one pass, with masks of its own; PEFT computes the others.
    drops_alone = active == ["a0"] and change in (train_dropout, rates)
    for ours, pefts in zip(results[2:], results[:2], strict=True):
        if not drops_alone or ours is results[3]:
            torch.testing.assert_close(ours, pefts, rtol=1e-4, atol=1e-4)
    if change is not some_dropout and active == ["a0"]:
        dropped = not torch.equal(run(models[1]), run(models[1]))
        assert dropped == (change is not rest_dropout)
        named = run(models[1], adapter_names=NAMES), run(models[1], adapter_names=NAMES)
        assert dropped != torch.equal(*named)


def test_dropout_of_a_mixture_follows_its_own_modules():
    _, model = pair(train_dropout, configs=[config("llama", lora_dropout=0.5)] * 2)
    layer, x = pooled_layers(model)[0], torch.randn(4, 32)
    weights = torch.tensor([0.3, 0.9])
    with torch.no_grad(), model.sapt.fixed(weights):
        torch.manual_seed(0)
        got = layer(x)
        torch.manual_seed(0)
        [seed] = drawn(0.5, x, 1).seeds
        dropped = 2 * kept(x, seed, drop_count(0.5))
        rest_dropout(layer)
        expected = layer.base_layer(x) + layer(dropped) - layer.base_layer(dropped)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(layer(x), layer(x))
        layer.lora_dropout["a1"].train()
        with pytest.raises(RuntimeError, match="one rate"):
            layer(x)
        with model.sapt.fixed(torch.tensor([0.3, 0.0])):
            assert torch.equal(layer(x), layer(x))


# --- hooks, parametrisations and replaced parts ---


def doubled_output(part):
    part.register_forward_hook(lambda module, args, y: y * 2)


def doubled_input(part):
    part.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def doubled_gradient(part):
    part.register_full_backward_hook(
        lambda module, inputs, grads: tuple(g if g is None else g * 2 for g in inputs)
    )


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


class Wrapped(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def parametrised(part):
    parametrize.register_parametrization(part, "weight", Doubled())


def replaced(part):
    own = part.forward
    part.forward = lambda x: own(x) * 2


def subclassed(part):
    part.__class__ = Wrapped


def pruned(part):
    prune.l1_unstructured(part, "weight", amount=0.5)


CHANGES = {
    "hook": doubled_output,
    "pre-hook": doubled_input,
    "backward hook": doubled_gradient,
    "parametrised": parametrised,
    "weight norm": lambda part: parametrizations.weight_norm(part, dim=0),
    "old weight norm": nn.utils.weight_norm,
    "pruned": pruned,
    "replaced": replaced,
    "subclass": subclassed,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("case", CHANGES)
def test_parts_that_somebody_changed_are_called(case):
    key = ("lora_A", "lora_B")[list(CHANGES).index(case) % 2]
    models = pair(lambda layer: CHANGES[case](getattr(layer, key)["a0"]))
    outputs = [run(model) for model in models]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    if case not in ("backward hook", "weight norm", "old weight norm"):
        assert not torch.allclose(outputs[1], run(peft_model()), atol=1e-3)
    named = [run(model, adapter_names=NAMES) for model in models]
    torch.testing.assert_close(named[1], named[0], rtol=1e-5, atol=1e-5)
    grads = []
    for model in models:
        model(input_ids=token_ids()).logits.sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-3)
    model = models[1]
    assert all(f"{key}['a0']" in why for why in model.sapt.report.skipped.values())
    assert len(model.sapt.report.skipped) == 4
    with pytest.raises(RuntimeError, match=rf"\['a0'\] that cannot be mixed.*{key}\['a0'\]"):
        run(model, mixture=mixture())
    run(model, mixture=torch.tensor([0.0, 0.4, 0.7]))
    with pytest.raises(ValueError, match="nothing is merged"):
        model.sapt.merge(torch.ones(3))


def test_dropout_that_somebody_changed_is_called():
    for change in (doubled_input, lambda part: part.register_forward_hook(lambda m, a, y: y * 3)):
        models = pair(lambda layer, change=change: change(layer.lora_dropout["a1"]))
        outputs = [run(model) for model in models]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(outputs[1], run(peft_model()), atol=1e-3)
    one = [config("llama")]
    models = pair(lambda layer: layer.lora_dropout.update({"a0": nn.Hardtanh()}), configs=one)
    torch.testing.assert_close(run(models[1]), run(models[0]), rtol=1e-5, atol=1e-5)
    assert "Hardtanh" in str(models[1].sapt.report)


def test_hooks_that_go_again_and_hooks_on_every_module():
    model, handles = sapt_fast.patch(peft_model()), []
    before = run(model, mixture=mixture())
    for layer in lora_layers(model):
        handles.append(layer.lora_B["a0"].register_forward_hook(print))
    assert not model.sapt.report.patched
    for handle in handles:
        handle.remove()
    assert torch.equal(run(model, mixture=mixture()), before)
    seen, plain = [], []
    for calls, m in ((plain, peft_model()), (seen, model)):
        everywhere = nn.modules.module.register_module_forward_hook(
            lambda module, args, y, calls=calls: calls.append(type(module) is nn.Linear)
        )
        try:
            run(m)
            if m is model:
                with pytest.raises(RuntimeError, match="every module"):
                    run(m, mixture=mixture())
        finally:
            everywhere.remove()
    assert sum(seen) == sum(plain)


# --- adapters that are not there ---


def broken(layer):
    with torch.no_grad():
        if "a1" in layer.lora_B:
            layer.lora_A["a1"].weight.fill_(float("nan"))
            layer.lora_B["a1"].weight.fill_(float("inf"))


def check_absent(model, logits):
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    y = logits(model)
    assert y.isfinite().all()
    y.sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name
    trained = {n.split(".")[-2] for n, p in model.named_parameters() if p.grad is not None}
    return trained, y.detach()


@pytest.mark.parametrize("names", [["a0"] * 3, ["a0", "__base__", "a2"]])
def test_unnamed_adapters_are_absent(names):
    (plain_trained, plain), (trained, got) = (
        check_absent(m, lambda m: m(input_ids=token_ids(), adapter_names=names).logits)
        for m in pair(broken)
    )
    assert trained == plain_trained == set(names) - {"__base__"}
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", ["mixture", "fixed", "router", "per token"])
def test_adapters_without_any_weight_are_absent(given):
    model = sapt_fast.patch(peft_model())
    for layer in lora_layers(model):
        broken(layer)
    weights = torch.tensor([[0.4, 0.0, 0.7], [0.1, 0.0, 0.0], [0.9, -0.0, 2.0]])
    weights = weights[:, None].expand(3, 9, 3) if given == "per token" else weights

    def logits(model):
        if given == "fixed":
            with model.sapt.fixed(weights):
                return model(input_ids=token_ids()).logits
        if given == "router":
            model.sapt.router = nn.Identity()
            model.sapt.router.forward = lambda **_: weights
            return model(input_ids=token_ids()).logits
        return model(input_ids=token_ids(), mixture=weights).logits

    trained, y = check_absent(model, logits)
    assert trained == {"a0", "a2"}
    model.sapt.router = None
    model.delete_adapter("a1")
    torch.testing.assert_close(y, run(model, mixture=weights[..., [0, 2]]), rtol=1e-4, atol=1e-4)


def test_a_weight_of_zero_that_trains_keeps_its_gradient():
    model = sapt_fast.patch(peft_model())
    weights = torch.tensor([0.5, 0.0, 0.2], requires_grad=True)
    model(input_ids=token_ids(), mixture=weights).logits.sum().backward()
    assert weights.grad[1].abs() > 1e-3
    assert all(
        layer.lora_A["a1"].weight.grad is None or not layer.lora_A["a1"].weight.grad.any()
        for layer in lora_layers(model)
    )


def test_weights_changed_in_place_are_looked_at_again():
    model, weights = sapt_fast.patch(peft_model()), torch.tensor([0.0, 0.5, 0.0])
    with model.sapt.fixed(weights):
        first = run(model)
        weights.copy_(torch.tensor([0.7, 0.0, 0.3]))
        second = run(model)
    assert torch.equal(first, run(model, mixture=torch.tensor([0.0, 0.5, 0.0])))
    assert torch.equal(second, run(model, mixture=torch.tensor([0.7, 0.0, 0.3])))


# --- variants beside plain adapters ---


def block_diagonal(*targets):
    return LoraConfig(
        r=4,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
        use_bdlora=BdLoraConfig(target_modules_bd_b=list(targets), nblocks=2),
    )


VARIANTS = {
    "bdlora": lambda: block_diagonal("q_proj", "v_proj"),
    "bdlora on q": lambda: block_diagonal("q_proj"),
    "dora": lambda: config("llama", use_dora=True),
    "bias": lambda: config("llama", lora_bias=True),
    "alora": lambda: config("llama", alora_invocation_tokens=[5]),
}


@pytest.mark.filterwarnings("ignore:.*lora_bias")
@pytest.mark.parametrize("case", VARIANTS)
def test_a_variant_beside_plain_adapters_is_left_to_peft(case):
    configs = [config("llama"), VARIANTS[case](), config("llama")]
    models = [peft_model(configs=configs) for _ in range(2)]
    sapt_fast.patch(models[1])
    skipped = models[1].sapt.report.skipped
    assert len(skipped) == (2 if case == "bdlora on q" else 4)
    assert all("a1" in why for why in skipped.values())
    for active in (["a1"], ["a0", "a2"], ["a0"]):
        for model in models:
            model.base_model.set_adapter(active)
        torch.testing.assert_close(run(models[1]), run(models[0]), rtol=1e-4, atol=1e-4)
    got = run(models[1], mixture=torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(got, run(models[0]), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match=r"\['a1'\] that cannot be mixed"):
        run(models[1], mixture=torch.tensor([1.0, 0.5, 0.0]))
    with pytest.raises(ValueError, match=r"(?s)strict: .*a1"):
        sapt_fast.patch(peft_model(configs=configs), strict=True)


def test_variants_alone_cannot_be_patched():
    model = peft_model(configs=[block_diagonal("q_proj"), config("llama", use_dora=True)])
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="no LoRA layer can be computed in one pass"):
        sapt_fast.patch(model)
    assert [type(m) for m in model.modules()] == kinds


# --- names, and adapters of transformers' own ---


def test_layers_are_shown_by_pefts_names():
    targets = ["q_proj", "embed_tokens"]
    saves = config("llama", target_modules=targets, modules_to_save=["lm_head"])
    configs = [saves, config("llama", target_modules=targets)]
    plain = peft_model(configs=configs)
    model = sapt_fast.patch(copy.deepcopy(plain))
    assert get_layer_status(model) == get_layer_status(plain)
    assert get_model_status(model) == get_model_status(plain)
    shown = {status.module_type for status in get_layer_status(model)}
    assert shown == {"lora.Linear", "lora.Embedding", "ModulesToSaveWrapper"}
    assert repr(model.base_model) == repr(plain.base_model)
    assert "Pooled" not in f"{model.sapt.report}{model}"
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(run(again), run(plain))
    for layers in (pooled_layers(again), pooled_layers(copy.deepcopy(model))):
        assert len(layers) == len(pooled_layers(model)) > 0


def test_unload_leaves_nothing_of_ours():
    for name in ("unload", "merge_and_unload"):
        model = sapt_fast.patch(peft_model())
        before = run(model)
        base = getattr(model, name)()
        assert not hasattr(model, "sapt")
        assert "generate" not in vars(base)
        assert not base._forward_pre_hooks
        expected = before if name == "merge_and_unload" else run(tiny("llama"))
        torch.testing.assert_close(run(base), expected, rtol=1e-4, atol=1e-4)
        again = sapt_fast.patch(peft_model(base=base))
        run(again, mixture=mixture())


@pytest.mark.parametrize("added", ["add_adapter", "load_adapter"])
def test_adapters_of_transformers_are_refused_with_a_way_that_works(added, tmp_path):
    base = tiny("llama").eval()
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        base.add_adapter(config("llama", init_lora_weights=False), name)
    expected = []
    for name in ("a", "b"):
        base.set_adapter(name)
        base.save_pretrained(tmp_path / name)
        expected.append(run(base))
    if added == "load_adapter":
        base = tiny("llama").eval()
        base.load_adapter(tmp_path / "a", "a")
    before = run(base)
    for settings in (None, sapt_fast.SaptConfig(adapter="prompt")):
        with pytest.raises(ValueError, match=r"\['a'.*save_pretrained.*PeftModel.from_pretrained"):
            sapt_fast.patch(base, settings)
    assert torch.equal(run(base), before)
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", "b")
    sapt_fast.patch(model)
    for k in range(2):
        got = run(model, mixture=torch.eye(2)[k])
        torch.testing.assert_close(got, expected[k], rtol=1e-5, atol=1e-5)


def test_adapters_inside_a_patched_model_are_refused():
    patched = sapt_fast.patch(tiny("llama"))
    peft_patched = sapt_fast.patch(peft_model())
    for model in (patched, peft_patched.get_base_model()):
        before = run(model)
        with pytest.raises(RuntimeError, match="is patched: an adapter"):
            model.add_adapter(config("llama"), "new")
        assert torch.equal(run(model), before)
    sapt_fast.unpatch(patched).add_adapter(config("llama"), "new")
    with pytest.raises(ValueError, match="pass the PeftModel that contains it"):
        sapt_fast.patch(peft_model().get_base_model())
