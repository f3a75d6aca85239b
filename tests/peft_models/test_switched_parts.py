"""Weights own all that an adapter brings, as PEFT's active adapter does, or refuse to run."""

import copy
from contextlib import nullcontext

import pytest
import tiny_peft
import torch
import transformers
from adapter_parts import IDS, adapted, as_active, logits, lora
from peft import LoraConfig
from tiny_models import _CAUSAL, VOCABULARY, tiny
from torch import nn

import sapt_fast


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
