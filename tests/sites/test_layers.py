"""Layers with one input are computed together, and give what each would give alone."""

import copy

import pytest
import torch
import transformers
from tiny_models import VOCABULARY, WIDTH, fill, patched, settings, tiny, token_ids
from torch import nn

import sapt_fast
from sapt_fast.ops._dropout import drawn, mask
from sapt_fast.sites import attach
from sapt_fast.sites import linear as layers
from sapt_fast.sites.linear import InputGroup, MixedLinear

ALL_LINEAR = ["q", "k", "v", "wi_0", "wi_1", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
ALL_LINEAR += ["query", "key", "value"]
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "d_model": WIDTH,
    "intermediate_size": 48,
    "d_ff": 48,
    "d_kv": 8,
    "head_dim": 8,
    "feed_forward_proj": "gated-gelu",
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "decoder_start_token_id": 0,
    "is_decoder": True,
    **dict.fromkeys(["num_layers", "num_hidden_layers", "encoder_layers", "decoder_layers"], 2),
    **dict.fromkeys(
        ["num_heads", "num_attention_heads", "encoder_attention_heads", "decoder_attention_heads"],
        4,
    ),
}
ENCODER_DECODER = ("bart", "mbart", "mt5", "t5", "umt5")


def model_of(kind):
    defaults = transformers.AutoConfig.for_model(kind).to_dict()
    config = transformers.AutoConfig.for_model(
        kind,
        **{
            name: value
            for name, value in CONFIG.items()
            if name in defaults and not (name == "is_decoder" and kind in ENCODER_DECODER)
        },
    )
    auto = transformers.AutoModelForSeq2SeqLM
    if kind not in ENCODER_DECODER:
        auto = transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    return auto.from_config(config).eval()


def groups(model):
    found = {
        id(m.sapt_group): m.sapt_group
        for m in model.modules()
        if isinstance(m, MixedLinear) and m.sapt_group is not None
    }
    return list(found.values())


@pytest.mark.parametrize("kind", attach._ONE_INPUT_MODELS)
def test_every_known_model_gives_a_group_one_input(kind, monkeypatch):
    """Each layer of a group that is called is called with the leader's very tensor."""
    model = model_of(kind)
    sapt_fast.patch(model, settings(target_modules=ALL_LINEAR))
    model.sapt.add_task("first")
    fill(model)
    paths = {module: name for name, module in model.named_modules()}
    made = groups(model)
    sizes = {len(group.layers) for group in made}
    assert 3 in sizes, [paths[layer] for group in made for layer in group.layers]
    taken = []
    take = InputGroup._take

    def noting(self, layer, x, waiting):
        y = take(self, layer, x, waiting)
        taken.append((paths[layer], y is not None))
        return y

    monkeypatch.setattr(InputGroup, "_take", noting)
    inputs = {"input_ids": token_ids()}
    if kind in ENCODER_DECODER:
        inputs["decoder_input_ids"] = token_ids(length=5)
    model(**inputs, use_cache=False)
    others = {paths[layer] for group in made for layer in group.layers[1:]}
    assert {path for path, _ in taken} == others
    assert all(found for _, found in taken), [path for path, found in taken if not found]


def without_groups(model):
    for module in model.modules():
        if isinstance(module, MixedLinear):
            module.sapt_group = None
    return model


def run(model, family, **options):
    inputs = {"input_ids": token_ids(), "labels": token_ids(length=6) if family == "t5" else None}
    if family != "t5":
        inputs["labels"] = inputs["input_ids"]
    loss = model(**inputs, **options).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["t5", "llama", "bart"])
@pytest.mark.parametrize("through", [True, False])
def test_together_as_alone(family, through):
    config = {"target_modules": ALL_LINEAR, "grad_through_frozen": through}
    together = patched(family, **config).double()
    alone = without_groups(copy.deepcopy(together))
    assert groups(together)
    (loss, grads), (want_loss, want) = (run(m, family) for m in (together, alone))
    torch.testing.assert_close(loss, want_loss, rtol=1e-12, atol=0)
    assert grads.keys() == want.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want[name], rtol=1e-9, atol=1e-12)


def attention(**config):
    """The first attention of a patched model, inside of a forward that is under way."""
    model = patched("llama", target_modules=["q_proj", "k_proj", "v_proj"], **config)
    return model, model.model.layers[0].self_attn


def called(model, layer_inputs):
    """Outputs of layers called by hand, as if within a forward, and the mix calls it took."""
    calls, outputs = [], []
    weights = torch.softmax(torch.randn(3, 3), -1)
    mix, layers.mix = layers.mix, lambda *a, **k: calls.append(a) or mix(*a, **k)
    try:
        with model.sapt.routing.resume(weights):
            outputs = [layer(x) for layer, x in layer_inputs]
            waiting = dict(model.sapt.routing.waiting)
        with model.sapt.routing.resume(weights):
            alone = [layer._mixed(x, layer.weight, layer.bias) for layer, x in layer_inputs]
    finally:
        layers.mix = mix
    for y, expected in zip(outputs, alone, strict=True):
        torch.testing.assert_close(y, expected)
    return len(calls), waiting


def test_one_call_serves_all_and_leaves_nothing_behind():
    model, attn = attention()
    x = torch.randn(3, 5, WIDTH)
    calls, waiting = called(model, [(attn.q_proj, x), (attn.k_proj, x), (attn.v_proj, x)])
    assert calls == 1
    assert waiting == {}


def test_another_input_is_computed_on_its_own():
    model, attn = attention()
    x, other = torch.randn(3, 5, WIDTH), torch.randn(3, 4, WIDTH)
    called(model, [(attn.q_proj, x), (attn.k_proj, other), (attn.v_proj, x.clone())])
    called(model, [(attn.k_proj, x), (attn.q_proj, x), (attn.q_proj, other), (attn.v_proj, x)])


def test_an_input_changed_in_place_is_not_taken_for_the_same():
    model, attn = attention()
    x = torch.randn(3, 5, WIDTH)
    with model.sapt.routing.resume(torch.softmax(torch.randn(3, 3), -1)), torch.no_grad():
        attn.q_proj(x)
        x.add_(1)
        got = attn.k_proj(x)
        want = attn.k_proj._mixed(x, attn.k_proj.weight, None)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "change",
    [
        lambda attn: attn.v_proj.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
        lambda attn: setattr(attn.k_proj, "bias", nn.Parameter(torch.ones(16))),
        lambda attn: setattr(attn.k_proj, "forward", attn.k_proj.forward),
        lambda attn: attn.q_proj.to("meta"),
    ],
    ids=["pre-hook", "one-bias", "own-forward", "offloaded"],
)
def test_layers_that_something_else_changes_are_computed_one_by_one(change):
    _, attn = attention()
    x = torch.randn(3, 5, WIDTH)
    assert attn.q_proj.sapt_group._can_share(x)
    change(attn)
    assert not attn.q_proj.sapt_group._can_share(x)


def test_layers_with_dropout_share_the_input_and_no_mask():
    model, attn = attention(lora_dropout=0.5)
    members, x = [attn.q_proj, attn.k_proj, attn.v_proj], torch.randn(3, 5, WIDTH)
    weights = torch.softmax(torch.randn(3, 3), -1)
    model.train()
    torch.manual_seed(0)
    with model.sapt.routing.resume(weights), torch.no_grad():
        outputs = [layer(x) for layer in members]
    torch.manual_seed(0)
    dropout = drawn(0.5, x, 3)
    for i, (layer, y) in enumerate(zip(members, outputs, strict=True)):
        keeps = mask(dropout.seeds[i], dropout.drops, 15, WIDTH).view(x.shape)
        with torch.no_grad():
            want = layer.sapt_pool(x * keeps * 2, None, None, weights)
            torch.testing.assert_close(y, want + nn.functional.linear(x, layer.weight))
    assert attn.q_proj.sapt_group._can_share(x)
    attn.k_proj.sapt_dropout = 0.1
    assert not attn.q_proj.sapt_group._can_share(x)


def test_only_models_known_for_it_have_groups(monkeypatch):
    assert groups(patched("llama"))
    monkeypatch.setattr(attach, "_ONE_INPUT_MODELS", ())
    assert not groups(patched("llama"))


def test_unpatch_forgets_the_groups():
    model = patched("llama")
    sapt_fast.unpatch(model)
    assert not any("sapt_group" in vars(m) for m in model.modules())


def test_a_hook_on_each_layer_still_runs():
    model, seen = patched("t5"), []
    for module in model.modules():
        if isinstance(module, MixedLinear):
            module.register_forward_hook(lambda m, args, y: seen.append(m))
    model(input_ids=token_ids(), decoder_input_ids=token_ids(length=4))
    assert set(seen) == {m for m in model.modules() if isinstance(m, MixedLinear)}


def test_fullgraph_compile_with_groups():
    targets = ["q_proj", "v_proj", "gate_proj", "up_proj"]
    model = patched(tiny("llama"), target_modules=targets)
    assert groups(model)
    assert model.config.model_type in attach._ONE_INPUT_MODELS
    ids = token_ids()
    expected = model(input_ids=ids, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected)
