"""Mixtures of adapters on embeddings and convolutions, against PEFT's own."""

import copy

import pytest
import torch
import transformers
from adapter_parts import IDS, adapted, logits, lora
from peft import LoraConfig
from tiny_models import _CAUSAL, tiny
from torch import nn

import sapt_fast

EMBEDDED = ("embed_tokens", "q_proj")


def embedding_model(base=None, configs=None):
    configs = configs or [lora(EMBEDDED), lora(EMBEDDED, use_rslora=True), lora(EMBEDDED)]
    return adapted(tiny("llama") if base is None else base, configs)


def gemma3():
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        **_CAUSAL, head_dim=8, tie_word_embeddings=False, layer_types=["full_attention"] * 2
    )
    return transformers.Gemma3ForCausalLM(config)


@pytest.mark.parametrize("scaled", [False, True], ids=["llama", "gemma3"])
def test_embeddings_are_mixed(scaled):
    plain = embedding_model(gemma3() if scaled else None)
    weights = torch.tensor([[0.3, 0.0, -1.2], [0.0, 1.0, 0.0], [0.5, 0.7, 0.9]])
    rows = []
    for row, ids in zip(weights, IDS, strict=True):
        alone = copy.deepcopy(plain)
        alone.base_model.add_weighted_adapter(
            ["a0", "a1", "a2"], row.tolist(), "mix", combination_type="cat"
        )
        alone.base_model.set_adapter("mix")
        rows.append(logits(alone, ids[None]))
    expected = torch.cat(rows)
    model = sapt_fast.patch(plain, strict=True)
    got = logits(model, mixture=weights)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    per_token = weights[:, None].expand(3, IDS.shape[1], 3)
    torch.testing.assert_close(logits(model, mixture=per_token), got, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        logits(model, ids=IDS[:1], mixture=weights[0]), got[:1], rtol=1e-5, atol=1e-5
    )


def test_gradients_through_embeddings_are_pefts():
    models = [embedding_model().double() for _ in range(2)]
    sapt_fast.patch(models[1])
    for model in models:
        model.base_model.set_adapter(["a0", "a1", "a2"])
    models[0](input_ids=IDS, labels=IDS).loss.backward()
    models[1](input_ids=IDS, labels=IDS, mixture=torch.ones(3, 3).double()).loss.backward()
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("part", ["embedding", "convolution"])
def test_gradients_of_weights(part):
    module = nn.Embedding(9, 5) if part == "embedding" else nn.Conv1d(6, 4, 3)
    model, layer = with_part(module, ["extra"])
    sapt_fast.patch(model.double())
    x = torch.randint(9, (3, 2)) if part == "embedding" else torch.randn(3, 6, 9).double()
    weights = torch.rand(3, 3, dtype=torch.float64)
    weights[0, 1] = 0

    def output(weights):
        with model.sapt.fixed(weights):
            return layer(x)

    assert torch.autograd.gradcheck(output, weights.requires_grad_())


def test_a_mixture_with_embeddings_merges():
    model = sapt_fast.patch(embedding_model())
    weights = torch.tensor([0.4, 0.0, -0.7])
    expected, before = logits(model, mixture=weights), logits(model)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    model.sapt.merge(weights)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.sapt.unmerge()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(logits(model), before)


def with_part(part, targets, **changed):
    """A model that has one more module, which its forward does not call."""
    base = tiny("llama")
    base.extra = part
    configs = [LoraConfig(r=r, target_modules=targets, **changed) for r in (4, 2, 6)]
    model = adapted(base, configs)
    return model, model.get_base_model().extra


CONVOLUTIONS = {
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, stride=2, padding=1), (3, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, padding="same"), (3, 6, 8, 7)),
    "1x1": (lambda: nn.Conv2d(6, 4, 1), (3, 6, 5, 5)),
    "groups": (lambda: nn.Conv2d(6, 4, 3, stride=2, groups=2), (3, 6, 8, 7)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 2), (3, 6, 4, 5, 3)),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_are_mixed(case):
    make, shape = CONVOLUTIONS[case]
    torch.manual_seed(0)
    model, layer = with_part(make(), ["extra"])
    x = torch.randn(shape)
    weights = torch.tensor([[0.3, 0.0, -1.2], [0.0, 1.0, 0.0], [0.5, 0.7, 0.9]])
    with torch.no_grad():
        base = layer.base_layer(x)
        outputs = []
        for k in range(3):
            model.base_model.set_adapter(f"a{k}")
            outputs.append(layer(x) - base)
        scaled = [o * weights[:, k].view(3, *[1] * (x.dim() - 1)) for k, o in enumerate(outputs)]
        expected = base + sum(scaled)
        model.base_model.set_adapter(["a0", "a1", "a2"])
        summed, named = layer(x), layer(x, adapter_names=["a2", "a0", "__base__"])
        sapt_fast.patch(model)
        assert torch.equal(layer(x), summed)
        torch.testing.assert_close(layer(x, adapter_names=["a2", "a0", "__base__"]), named)
        with model.sapt.fixed(weights):
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        with model.sapt.fixed(weights[2]):
            one = base[1] + sum(o[1] * w for o, w in zip(outputs, weights[2], strict=True))
            torch.testing.assert_close(layer(x)[1], one, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(layer(x[1]), one, rtol=1e-4, atol=1e-5)
        with (
            model.sapt.fixed(torch.rand(3, shape[-1], 3)),
            pytest.raises(RuntimeError, match="per token"),
        ):
            layer(x)
        with model.sapt.fixed(torch.rand(2, 3)), pytest.raises(RuntimeError, match="samples"):
            layer(x)
        if case == "groups":
            with pytest.raises(ValueError, match=r"extra: .*groups.*nothing is merged"):
                model.sapt.merge(weights[2])
            return
        before = layer.base_layer.weight.clone()
        with model.sapt.fixed(weights[2]):
            mixed = layer(x)
        model.sapt.merge(weights[2])
        torch.testing.assert_close(layer(x), mixed, rtol=1e-4, atol=1e-5)
        model.sapt.unmerge()
        assert torch.equal(layer.base_layer.weight, before)


def test_an_absent_adapter_of_a_convolution_or_an_embedding_is_not_read():
    for part, x in (
        (nn.Conv1d(6, 4, 3), torch.randn(2, 6, 9, requires_grad=True)),
        (nn.Embedding(9, 5), torch.tensor([[1, 2], [3, 4]])),
    ):
        torch.manual_seed(0)
        model, layer = with_part(part, ["extra"])
        expected = layer(x).detach()  # a0 is active
        with torch.no_grad():
            for name, p in model.named_parameters():
                if ".a1" in name:
                    p.fill_(float("inf"))
        sapt_fast.patch(model)
        weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.5]])
        model.base_model.set_adapter(["a0", "a1", "a2"])
        with model.sapt.fixed(weights):
            y = layer(x)
        torch.testing.assert_close(y[0], expected[0])
        y.sum().backward()
        for name, p in model.named_parameters():
            if "extra" in name and "lora" in name:
                assert (p.grad is None) == (".a1" in name), name
                assert p.grad is None or p.grad.isfinite().all()
        with model.sapt.fixed(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])):
            mixed = layer(x)
        torch.testing.assert_close(mixed[0], expected[0])
        assert not mixed[1].isfinite().all()


def test_dropout_before_a_convolution():
    model, layer = with_part(nn.Conv1d(6, 4, 3), ["extra"], lora_dropout=0.5)
    reference, plain = with_part(nn.Conv1d(6, 4, 3), ["extra"], lora_dropout=0.5)
    reference.load_state_dict(model.state_dict())
    sapt_fast.patch(model)
    x, results = torch.randn(2, 6, 9), []
    reference.base_model.set_adapter(["a0", "a1", "a2"])
    for dropout in (*plain.lora_dropout.values(), *layer.lora_dropout.values()):
        dropout.train()
    for run in (plain, layer):
        torch.manual_seed(1)
        with model.sapt.fixed(torch.ones(3)):
            results.append(run(x))
    torch.testing.assert_close(*results)
    assert not torch.equal(results[1], layer(x))


def test_a_table_of_relative_positions_has_no_samples():
    configs = [lora(("q", "relative_attention_bias")) for _ in range(2)]
    model = sapt_fast.patch(adapted(tiny("t5"), configs))
    ids = IDS[:, :3]  # as many tokens as samples
    extra = {"decoder_input_ids": ids}
    logits(model, ids, mixture=torch.tensor([0.3, 0.7]), **extra)
    with pytest.raises(RuntimeError, match=r"relative_attention_bias: .*relative positions"):
        logits(model, ids, mixture=torch.rand(3, 2), **extra)
