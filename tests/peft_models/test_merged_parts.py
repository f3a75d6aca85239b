"""Merging into embeddings and convolutions, also of other classes, and compiled saved modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny_models import tiny, token_ids
from torch import nn

import sapt_fast

WEIGHTS = torch.tensor([0.4, -0.7])


class ScaledTable(nn.Embedding):
    """As Gemma's: PEFT scales what the adapters add by `embed_scale` as well."""

    embed_scale = 3.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class ShiftedTable(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) + 1


class OtherConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x)


class StandardConv(nn.Conv2d):
    """As BiT's: its weight is standardised when it is read."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


def adapted(base, **options):
    model = get_peft_model(base, LoraConfig(**options, init_lora_weights=False), adapter_name="a0")
    model.add_adapter("a1", LoraConfig(**options, init_lora_weights=False))
    return model.eval()


def with_part(part):
    torch.manual_seed(0)
    base = tiny("llama")
    base.extra = part
    model = adapted(base, r=3, target_modules=["extra"])
    return sapt_fast.patch(model), model.get_base_model().extra


@pytest.mark.parametrize(
    ("part", "x"),
    [
        (nn.Embedding(9, 5, padding_idx=0), torch.tensor([[0, 1, 8]])),
        (ScaledTable(9, 5), torch.tensor([[0, 1, 8]])),
        (nn.Conv1d(4, 6, 3, stride=2), torch.ones(2, 4, 8)),
        (OtherConv(4, 6, 3, padding=1), torch.ones(2, 4, 8, 8)),
    ],
)
def test_a_merged_mixture_computes_the_same(part, x):
    model, layer = with_part(part)
    before = layer.base_layer.weight.clone()
    with torch.no_grad(), model.sapt.fixed(WEIGHTS):
        expected, alone = layer(x), layer.base_layer(x)
    assert (expected - alone).abs().max() > 1e-3
    model.sapt.merge(WEIGHTS)
    torch.testing.assert_close(layer(x).detach(), expected, rtol=1e-4, atol=1e-5)
    model.sapt.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize(
    ("part", "why"),
    [
        (ShiftedTable(9, 5), "the forward of ShiftedTable"),
        (StandardConv(4, 6, 3), "the forward of StandardConv"),
        (nn.Embedding(9, 5, max_norm=1.0), "max_norm"),
    ],
)
def test_other_formulas_are_not_merged_into(part, why):
    model, layer = with_part(part)
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match=f"extra: .*{why}"):
        model.sapt.merge(WEIGHTS)
    assert torch.equal(layer.base_layer.weight, before)


def test_a_compiled_model_takes_the_head_of_each_call():
    base, targets = tiny("llama"), ["q_proj"]
    plain = adapted(base, r=3, target_modules=targets, modules_to_save=["lm_head"])
    with torch.no_grad():
        plain.get_base_model().lm_head.modules_to_save["a1"].weight.normal_()
    expected = []
    for name in ("a0", "a1"):
        alone = copy.deepcopy(plain)
        alone.set_adapter(name)
        with torch.no_grad():
            expected.append(alone(input_ids=token_ids()).logits)
    torch._dynamo.reset()
    model = torch.compile(sapt_fast.patch(plain), backend="eager")
    with torch.no_grad():
        for k in (0, 1, 0):
            got = model(input_ids=token_ids(), mixture=torch.eye(2)[k]).logits
            torch.testing.assert_close(got, expected[k], rtol=1e-4, atol=1e-5)


def test_a_hook_that_comes_between_forwards_is_seen():
    model = sapt_fast.patch(adapted(tiny("llama"), r=3, target_modules=["q_proj"]))
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    with torch.no_grad(), model.sapt.fixed(WEIGHTS):
        model(input_ids=token_ids())
        x = torch.randn(3, 9, 32)
        layer(x)
        hook = layer.lora_A["a1"].register_forward_hook(lambda _, __, y: 2 * y)
        for run in (lambda: layer(x), lambda: model(input_ids=token_ids())):
            with pytest.raises(RuntimeError, match="hooked"):
                run()
        hook.remove()
        layer(x)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("part", ["embedding", "convolution"])
def test_a_zero_that_trains_leaves_out_what_is_not_finite(part, value):
    module = nn.Embedding(9, 5) if part == "embedding" else nn.Conv1d(4, 6, 3)
    x = torch.tensor([[1, 2], [3, 4]]) if part == "embedding" else torch.ones(2, 4, 8)
    model, layer = with_part(module)
    with torch.no_grad(), model.sapt.fixed(torch.tensor([0.5, 0.0])):
        expected = layer(x)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".a1" in name and "extra" in name:
                p.fill_(value)
    weights = torch.tensor([0.5, 0.0], requires_grad=True)
    with model.sapt.fixed(weights):
        y = layer(x)
    torch.testing.assert_close(y.detach(), expected)
    y.sum().backward()
    assert weights.grad.isfinite().all()
