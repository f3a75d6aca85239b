"""Layers of classes derived from nn.Linear and Conv1D: patched like plain ones, or refused."""

import copy
import pickle
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import fill, settings, tiny, token_ids
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import sapt_fast


class Plain(nn.Linear):
    """Only a name."""


class Scaled(nn.Linear):
    """Another formula, with an argument of its own."""

    def forward(self, hidden, gain=1.0):
        return F.linear(hidden, self.weight * 0.5, self.bias) * gain


class Counting(nn.Linear):
    """Keeps state, called by keyword in its own forward."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, input):
        self.calls += 1
        return super().forward(input=input)


class Turned(Conv1D):
    """GPT-2's layer under another name."""


def falcon():
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False
    )
    return FalconForCausalLM(config).eval()


def with_layers(kind):
    """A llama whose value projections, or a GPT-2 whose attention's, are of a class."""
    if issubclass(kind, Conv1D):
        model = tiny("gpt2")
        for block in model.transformer.h:
            block.attn.c_attn.__class__ = kind
        return model
    model = tiny("llama")
    for layer in model.model.layers:
        plain = layer.self_attn.v_proj
        layer.self_attn.v_proj = kind(plain.in_features, plain.out_features)
        layer.self_attn.v_proj.load_state_dict(plain.state_dict(), strict=False)
        if layer.self_attn.v_proj.bias is not None:
            nn.init.normal_(layer.self_attn.v_proj.bias)
    return model.eval()


MODELS = {"falcon": falcon} | {
    kind.__name__: partial(with_layers, kind) for kind in (Plain, Scaled, Counting, Turned)
}


def run(model, **given):
    with torch.no_grad():
        return model(input_ids=token_ids(), **given).logits


def with_tasks(model):
    sapt_fast.patch(model, settings(), strict=True)
    model.sapt.add_task("a")
    model.sapt.add_task("b")
    return fill(model)


@pytest.mark.parametrize("kind", MODELS)
def test_each_adapter_against_peft(kind, tmp_path):
    """An exported mixture, loaded by PEFT over the same base, gives the same logits."""
    base = MODELS[kind]()
    model = with_tasks(copy.deepcopy(base))
    for weights in ([1.0, 0.0], [0.3, 1.7]):
        model.sapt.export_adapter(torch.tensor(weights), tmp_path / str(weights))
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / str(weights)).eval()
        with model.sapt.fixed(torch.tensor(weights)):
            torch.testing.assert_close(run(model), run(theirs))
        assert (run(theirs) - run(base)).abs().max() > 0.01


@pytest.mark.parametrize("kind", MODELS)
def test_copies_gradients_and_unpatch(kind):
    base = MODELS[kind]()
    classes, before = [type(m) for m in base.modules()], run(base)
    model = with_tasks(base)
    routed = run(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(run(copied), routed)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.sapt.trainable_parameters())
    sapt_fast.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(run(model), before)


def test_weights_per_sample_in_falcon():
    model, ids = with_tasks(falcon()), token_ids()
    weights = torch.rand(len(ids), 2)
    with torch.no_grad():
        got = model(input_ids=ids, mixture=weights).logits
        for row in range(len(ids)):
            alone = model(input_ids=ids[row : row + 1], mixture=weights[row : row + 1]).logits
            torch.testing.assert_close(got[row : row + 1], alone)


@pytest.mark.parametrize("kind", ["falcon", "Plain", "Turned", "Counting"])
def test_merge_adds_the_mixture_to_the_weight(kind):
    model = with_tasks(MODELS[kind]())
    weights = torch.tensor([0.6, -0.4])
    with model.sapt.fixed(weights):
        expected = run(model)
    model.sapt.merge(weights)
    torch.testing.assert_close(run(model), expected)
    model.sapt.unmerge()


def test_merge_refuses_another_formula():
    model = with_tasks(MODELS["Scaled"]())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"v_proj: .* the forward of Scaled is not its input times"
    ):
        model.sapt.merge(torch.ones(2))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    base = get_peft_model(MODELS["Scaled"](), LoraConfig(target_modules=["v_proj"]))
    with pytest.raises(ValueError, match=r"v_proj: .*the forward of Scaled"):
        sapt_fast.patch(base).sapt.merge(torch.ones(1))


def test_arguments_of_the_own_forward_pass_through():
    model = with_tasks(MODELS["Scaled"]())
    layer, x = model.model.layers[0].self_attn.v_proj, torch.randn(2, 3, 32)
    a, b = layer.sapt_pool.adapter(1)
    delta = (x @ a.t()) @ b * layer.sapt_pool.scaling[1]
    with model.sapt.fixed(torch.tensor([0.0, 1.0])), torch.no_grad():
        for y in (layer(x, 3.0), layer(x, gain=3.0), layer(hidden=x, gain=3.0)):
            expected = F.linear(x, layer.weight * 0.5, layer.bias) * 3 + delta
            torch.testing.assert_close(y, expected)
        plain = model.model.layers[0].self_attn.q_proj
        assert torch.equal(plain(input=x), plain(x))


class Keeping(nn.Linear):
    """Keeps its output."""

    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


@pytest.mark.parametrize("grad", [True, False])
def test_an_output_that_the_layer_keeps_stays(grad):
    model = with_tasks(with_layers(Keeping))
    layer, weights = model.model.layers[0].self_attn.v_proj, torch.tensor([0.5, 0.5])
    x = torch.randn(2, 3, layer.in_features)
    with model.sapt.fixed(weights), torch.set_grad_enabled(grad):
        y = layer(x)
    assert torch.equal(layer.kept, F.linear(x, layer.weight, layer.bias))
    assert not torch.allclose(y, layer.kept)


# --- what cannot mix ---


class Two(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Wide(nn.Linear):
    def forward(self, x):
        return F.pad(super().forward(x), (0, 3))


class Grouped(nn.Linear):
    def forward(self, x):
        return x.view(7, -1, self.in_features) @ self.weight.t()


class Late(nn.Linear):
    """What it returns depends on its values, so that only a call tells."""

    def forward(self, x):
        return super().forward(x) if x.sum().item() == 0 else super().forward(x)[..., :1]


def parametrised(layer):
    nn.utils.parametrizations.weight_norm(layer)


def resized(layer):
    layer.in_features = 5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (Two, "Two returns tuple, expected one tensor"),
        (Wide, r"Wide returns \[1, 2, 19\] for an input \[1, 2, 32\], expected \[1, 2, 16\]"),
        (Grouped, r"Grouped does not support an input \[1, 2, 32\]"),
        (parametrised, "it is parametrised"),
        (resized, r"its weight has shape \(16, 32\), expected \(16, 5\)"),
    ],
)
def test_reasons(change, reason):
    model = tiny("llama")
    layer = model.model.layers[0].self_attn.v_proj
    if isinstance(change, type):
        layer.__class__ = change
    else:
        change(layer)
    report = sapt_fast.patch(model, settings()).sapt.report
    [skipped] = report.skipped.items()
    assert skipped[0] == "model.layers.0.self_attn.v_proj"
    assert re.search(reason, skipped[1])


def test_layers_that_have_no_weights_yet():
    model = tiny("llama")
    model.model.layers[0].self_attn.v_proj = nn.LazyLinear(16)
    with pytest.raises(ValueError, match=r"v_proj\.weight is not initialised"):
        sapt_fast.patch(model, settings())
    assert not hasattr(model, "sapt")
    run(model)
    with_tasks(model)


def test_an_output_of_another_shape_raises_in_the_forward():
    model = tiny("llama")
    model.model.layers[0].self_attn.v_proj.__class__ = Late
    with_tasks(model)
    with pytest.raises(RuntimeError, match=r"Late: its forward gave shape .* expected \["):
        run(model)


class Block(LlamaForCausalLM):
    """A llama with layers whose weights something else reads."""

    def __init__(self, config):
        super().__init__(config)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.block = nn.TransformerEncoderLayer(32, 4, batch_first=True)
        self.reader = Reader()


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(32, 32), nn.Linear(32, 32)
        self.both = nn.Linear(32, 32)

    def forward(self, x, fast=False):
        if fast:
            return F.linear(x, self.both.weight)
        y = F.linear(x, self.read.weight, self.read.bias).to(self.called.weight.dtype)
        return self.both(self.called(y))


def test_layers_that_are_read_but_not_called(caplog):
    model = Block(tiny("llama").config)
    names = ["out_proj", "linear1", "linear2", "read", "called", "both", "q_proj"]
    report = sapt_fast.patch(model, settings(target_modules=names)).sapt.report
    refused = ["attention.out_proj", "block.self_attn.out_proj", "block.linear1", "block.linear2"]
    assert sorted(report.skipped) == sorted([*refused, "reader.read"])
    assert all("reads its weight without calling" in why for why in report.skipped.values())
    assert {"reader.called", "reader.both"} < set(report.patched)
    [note] = report.notes
    assert "Reader.both" in note
    assert note in caplog.text
    with pytest.raises(ValueError, match=r"(?s)strict: .*Its linear layers are named: \["):
        sapt_fast.patch(sapt_fast.unpatch(model), settings(target_modules=names), strict=True)


# --- which layers ---


def test_all_linear_is_what_peft_means():
    for model in (falcon(), tiny("gpt2"), tiny("t5"), tiny("bert"), MODELS["Plain"]()):
        task = "SEQ_CLS" if "Sequence" in type(model).__name__ else None
        config = LoraConfig(target_modules="all-linear", task_type=task)
        theirs = get_peft_model(copy.deepcopy(model), config)
        prefix = "base_model.model."
        expected = {
            name.removeprefix(prefix)
            for name, module in theirs.named_modules()
            if hasattr(module, "lora_A")
        }
        for targets in ("all-linear", ["All-Linear"]):
            sapt_fast.patch(model, settings(target_modules=targets), strict=True)
            assert set(model.sapt.report.patched) == expected
            sapt_fast.unpatch(model)


def test_the_hint_names_subclasses():
    with pytest.raises(ValueError, match=r"named: \['dense', .*'query_key_value'"):
        sapt_fast.patch(falcon(), settings(target_modules=["nothing"]))


@pytest.mark.parametrize("config", [LoraConfig(), {"r": 4}, "lora"])
def test_configs_of_others(config):
    model = tiny("llama")
    name = type(config).__name__
    for given in (model, get_peft_model(tiny("llama"), LoraConfig())):
        with pytest.raises(TypeError, match=f"config: got {name}, expected a sapt_fast.SaptConfig"):
            sapt_fast.patch(given, config)
        assert not hasattr(given, "sapt")
