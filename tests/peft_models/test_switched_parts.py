"""Weights own all that an adapter brings, as PEFT's active adapter does, or refuse to run."""

import copy
from contextlib import nullcontext

import pytest
import tiny_peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny_models import _CAUSAL, VOCABULARY, tiny, token_ids
from torch import nn

import sapt_fast

IDS = token_ids()  # [3, 9]


def randomised(model, seed=3):
    """Every adapter's own parameters, saved copies and tokens among them, at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name or "trainable_tokens" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model.eval()


def lora(targets=("q_proj", "v_proj"), **changed):
    return LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **changed)


def adapted(base, configs):
    model = get_peft_model(base, configs[0], adapter_name="a0")
    for k, config in enumerate(configs[1:], 1):
        model.add_adapter(f"a{k}", config)
    return randomised(model)


def classifier(kind="llama"):
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(**_CAUSAL, num_labels=3)
        return transformers.LlamaForSequenceClassification(config)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.RobertaConfig(
        vocab_size=VOCABULARY, num_attention_heads=4, num_labels=3, pad_token_id=0, **small
    )
    head = {"roberta": "SequenceClassification", "tokens": "TokenClassification"}[kind]
    return getattr(transformers, f"RobertaFor{head}")(config)


def with_heads(kind="llama"):
    """Three adapters with heads of their own, as PEFT adds them to classifiers."""
    targets = ("q_proj", "v_proj") if kind == "llama" else ("query", "value")
    task = "TOKEN_CLS" if kind == "tokens" else "SEQ_CLS"
    return adapted(classifier(kind), [lora(targets, task_type=task) for _ in range(3)])


def with_two_heads():
    """a0 and a1 save the head, a2 has LoRA alone."""
    configs = [lora(modules_to_save=["lm_head"]), lora(modules_to_save=["lm_head"]), lora()]
    return adapted(tiny("llama"), configs)


def logits(model, ids=IDS, **extra):
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits


def as_active(model, name, ids=IDS):
    """What plain PEFT computes with one adapter active."""
    model = copy.deepcopy(model)
    model.base_model.set_adapter(name)
    return logits(model, ids)


def one_hot(*rows, count=3):
    return torch.eye(count)[list(rows)]


class Given(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def forward(self, **_):
        return self.weights


# --- saved modules ---


@pytest.mark.parametrize("kind", ["llama", "roberta", "tokens", "saved"])
def test_all_the_weight_takes_the_adapters_own_head(kind):
    plain = with_two_heads() if kind == "saved" else with_heads(kind)
    expected = [as_active(plain, f"a{k}") for k in range(3)]
    assert (expected[0] - expected[1]).abs().max() > 0.1
    model = sapt_fast.patch(plain)
    for k in (1, 0, 2):
        torch.testing.assert_close(logits(model, mixture=one_hot(k)[0]), expected[k])
        with model.sapt.fixed(one_hot(k, k, k)):
            torch.testing.assert_close(logits(model), expected[k])
        model.sapt.router = Given(one_hot(k))
        torch.testing.assert_close(logits(model), expected[k])
        model.sapt.router = None
    torch.testing.assert_close(logits(model), expected[0])
    with model.disable_adapter(), model.sapt.fixed(one_hot(1)):
        alone = logits(model)
    torch.testing.assert_close(alone, logits(model, mixture=torch.zeros(3)))


@pytest.mark.parametrize("kind", ["llama", "tokens", "saved"])
def test_each_sample_takes_its_own_head(kind):
    plain = with_two_heads() if kind == "saved" else with_heads(kind)
    rows = [as_active(plain, f"a{k}", IDS[i : i + 1]) for i, k in enumerate((1, 2, 0))]
    expected = torch.cat(rows)
    model = sapt_fast.patch(plain)
    got = logits(model, mixture=one_hot(1, 2, 0))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    per_token = one_hot(1, 2, 0)[:, None].expand(3, IDS.shape[1], 3)
    torch.testing.assert_close(logits(model, mixture=per_token), got)


def test_a_head_that_nobody_owns_stays_the_bases():
    plain = with_two_heads()
    mixed = copy.deepcopy(plain)
    mixed.base_model.add_weighted_adapter(["a2"], [0.7], "mix", combination_type="cat")
    model = sapt_fast.patch(plain)
    expected = as_active(mixed, "mix")
    torch.testing.assert_close(
        logits(model, mixture=torch.tensor([0.0, 0.0, 0.7])), expected, rtol=1e-4, atol=1e-5
    )


MIXED = {
    "shared": torch.tensor([0.5, 0.5, 0.0]),
    "of half": torch.tensor([0.5, 0.0, 0.0]),
    "beside another": torch.tensor([1.0, 0.0, 0.5]),
    "in one sample": torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0.5, 0.5, 0]]),
}


@pytest.mark.parametrize("case", MIXED)
@pytest.mark.parametrize("given", ["mixture", "fixed", "router"])
def test_a_mixture_of_heads_is_refused_before_anything_runs(case, given):
    model, calls = sapt_fast.patch(with_heads()), []
    before = logits(model)
    model.get_input_embeddings().register_forward_pre_hook(lambda *_: calls.append(1))
    weights = MIXED[case]
    message = r"score: modules_to_save of adapters \['a0', 'a1', 'a2'\].*weight exactly 1"
    per_row = weights if weights.dim() == 2 else weights[None]
    model.sapt.router = Given(per_row) if given == "router" else None
    pinned = model.sapt.fixed(weights) if given == "fixed" else nullcontext()
    with pinned, pytest.raises(RuntimeError, match=message):
        logits(model, mixture=weights if given == "mixture" else None)
    assert not calls
    model.sapt.router = None
    assert torch.equal(logits(model), before)


def test_what_one_hot_weights_cannot_split_or_train():
    model = sapt_fast.patch(with_heads("roberta"))  # its head is no single layer
    with pytest.raises(RuntimeError, match="classifier: modules_to_save"):
        logits(model, mixture=one_hot(0, 1, 0))
    weights = one_hot(1)[0].requires_grad_()
    with pytest.raises(RuntimeError, match="that trains"):
        model(input_ids=IDS, mixture=weights)


def test_report_strict_and_merge_name_the_head():
    model = sapt_fast.patch(with_heads())
    [(path, why)] = model.sapt.report.skipped.items()
    assert path.endswith("score")
    assert "modules_to_save" in why
    assert len(model.sapt.report.patched) == 4
    plain = with_heads()
    kinds = [type(m) for m in plain.modules()]
    with pytest.raises(ValueError, match=r"(?s)strict: .*score"):
        sapt_fast.patch(plain, strict=True)
    assert [type(m) for m in plain.modules()] == kinds
    model = sapt_fast.patch(with_two_heads())
    for weights in (one_hot(1)[0], torch.tensor([0.5, 0.5, 0.0])):
        with pytest.raises(ValueError, match=r"nothing is merged.*lm_head"):
            model.sapt.merge(weights)
    expected = logits(model, mixture=one_hot(2)[0])
    model.sapt.merge(one_hot(2)[0])  # a2 has no head: the base's, though a0 is active
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_names_of_a_batch_and_back_again():
    plain = with_heads()
    names = ["a1", "__base__", "a0"]
    expected = logits(plain, adapter_names=names)
    model = sapt_fast.patch(copy.deepcopy(plain))
    model.sapt.router = Given(torch.full((3, 3), 0.3))  # names go before a router
    torch.testing.assert_close(logits(model, adapter_names=names), expected)
    model.sapt.router = None
    model = copy.deepcopy(model)
    torch.testing.assert_close(logits(model, mixture=one_hot(1)), as_active(plain, "a1"))
    kinds = [type(m) for m in plain.modules()]
    assert [type(m) for m in sapt_fast.unpatch(model).modules()] == kinds
    model.base_model.set_adapter("a1")
    assert torch.equal(logits(model), as_active(plain, "a1"))


def test_trainable_tokens_follow_the_weights():
    base = tiny("llama")
    configs = [lora(trainable_token_indices=[4, 5]), lora(trainable_token_indices=[5, 6]), lora()]
    plain = adapted(base, configs)
    expected = [as_active(plain, f"a{k}") for k in range(3)]
    model = sapt_fast.patch(plain)
    for k in range(3):
        torch.testing.assert_close(
            logits(model, mixture=one_hot(k)[0]), expected[k], rtol=1e-4, atol=1e-5
        )
    rows = torch.stack([expected[k][i] for i, k in enumerate((2, 1, 0))])
    got = logits(model, mixture=one_hot(2, 1, 0))
    torch.testing.assert_close(got, rows, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="embed_tokens: trainable_token_indices"):
        logits(model, mixture=torch.tensor([0.5, 0.5, 0.0]))


def test_generation_with_saved_modules():
    plain = adapted(tiny("llama"), [lora(modules_to_save=["lm_head"]) for _ in range(2)])
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    expected = []
    for k in (1, 0, 1):
        alone = copy.deepcopy(plain)
        alone.set_adapter(f"a{k}")
        row = IDS[len(expected) : len(expected) + 1]
        expected.append(alone.generate(input_ids=row, **options)[0])
    model = sapt_fast.patch(plain)
    got = model.generate(input_ids=IDS, mixture=one_hot(1, 0, 1, count=2), **options)
    for row, tokens in zip(got, expected, strict=True):
        assert torch.equal(row[: len(tokens)], tokens)


# --- embeddings and convolutions ---


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


# --- what cannot be mixed ---


def test_a_variant_without_weight_does_not_matter():
    configs = [lora(), lora(use_dora=True), lora()]
    plain = adapted(tiny("llama"), configs)
    plain.base_model.set_adapter("a1")
    expected = [as_active(plain, f"a{k}") for k in range(3)]
    model, calls = sapt_fast.patch(plain), []
    torch.testing.assert_close(logits(model), expected[1])
    for k in (0, 2):
        torch.testing.assert_close(
            logits(model, mixture=one_hot(k)[0]), expected[k], rtol=1e-4, atol=1e-5
        )
    model.get_input_embeddings().register_forward_pre_hook(lambda *_: calls.append(1))
    for weights in (one_hot(1)[0], torch.full((3, 3), 0.3)):
        with pytest.raises(RuntimeError, match=r"q_proj: .*\['a1'\] that cannot be mixed"):
            logits(model, mixture=weights)
    assert not calls
    merged = copy.deepcopy(model)
    merged.sapt.merge(torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(logits(merged), expected[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="nothing is merged"):
        model.sapt.merge(torch.full((3,), 0.3))


def test_a_bias_has_no_mixture():
    base = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4)
    )
    configs = [lora(["c_attn"], fan_in_fan_out=True, lora_bias=bias) for bias in (False, True)]
    model = sapt_fast.patch(adapted(base, configs))
    logits(model, mixture=torch.tensor([0.4, 0.0]))
    with pytest.raises(RuntimeError, match="a bias"):
        logits(model, mixture=torch.tensor([0.4, 0.6]))


def parameters_of_experts():
    return LoraConfig(r=2, target_modules=[], target_parameters=["mlp.up_proj.weight"])


def test_layers_that_are_not_pooled_refuse_weights():
    plain = adapted(tiny("llama"), [lora(), parameters_of_experts()])
    expected = [as_active(plain, f"a{k}") for k in range(2)]
    assert (expected[0] - expected[1]).abs().max() > 0.01
    model = sapt_fast.patch(plain)
    assert any("ParamWrapper" in why for why in model.sapt.report.skipped.values())
    torch.testing.assert_close(
        logits(model, mixture=torch.tensor([1.0, 0.0])), expected[0], rtol=1e-4, atol=1e-5
    )
    with pytest.raises(RuntimeError, match=r"up_proj: .*\['a1'\] have weight"):
        logits(model, mixture=torch.tensor([0.5, 0.5]))
    model.set_adapter("a1")
    torch.testing.assert_close(logits(model), expected[1])
    with pytest.raises(RuntimeError, match=r"\['a1'\] are active"):
        logits(model, mixture=torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="nothing is merged"):
        model.sapt.merge(torch.tensor([0.0, 1.0]))
    with model.disable_adapter():
        logits(model, mixture=torch.tensor([0.5, 0.5]))


def test_more_arguments_of_a_layer_do_not_drop_the_weights():
    model = sapt_fast.patch(tiny_peft.peft_model(configs=[tiny_peft.config("llama")] * 2))
    layer, x = tiny_peft.pooled_layers(model)[0], torch.randn(2, 32)
    weights = torch.tensor([[0.2, 0.5], [1.0, 0.0]])
    with torch.no_grad(), model.sapt.fixed(weights):
        torch.testing.assert_close(layer(x, alora_offsets=[None, None]), layer(x))
