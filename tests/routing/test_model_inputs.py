"""Inputs of other dimensions than [B, T]: several choices per sample, and what no router reads."""

import pytest
import torch
import transformers
from tiny_models import error, oracle, patched, run, token_ids
from tiny_peft import peft_model

import sapt_fast

_BERT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def bert():
    config = transformers.BertConfig(**_BERT, pad_token_id=0)
    return transformers.BertForMultipleChoice(config), ["query", "value"]


def roberta():
    config = transformers.RobertaConfig(**_BERT, pad_token_id=1, max_position_embeddings=40)
    return transformers.RobertaForMultipleChoice(config), ["query", "value"]


def distilbert():
    config = transformers.DistilBertConfig(
        vocab_size=97, dim=32, hidden_dim=48, n_layers=2, n_heads=4
    )
    return transformers.DistilBertForMultipleChoice(config), ["q_lin", "v_lin"]


def double_heads():
    config = transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, num_labels=1, bos_token_id=2, eos_token_id=1
    )
    return transformers.GPT2DoubleHeadsModel(config), ["c_attn"]


IDS = token_ids(6, 7).view(2, 3, 7)
MASK = torch.ones_like(IDS)
MASK[0, 1, 4:] = MASK[1, 2, 5:] = 0
WEIGHTS = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
encoders = pytest.mark.parametrize("build", [bert, roberta, distilbert])


def made(build):
    torch.manual_seed(0)
    model, targets = build()
    return patched(model.eval(), target_modules=targets)


def scores(model, ids=IDS, mask=MASK, **inputs):
    """[B, C]"""
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, **inputs)
    return out.mc_logits if hasattr(out, "mc_logits") else out.logits


def one_by_one(model, weights=None):
    """The scores of each choice alone, without padding."""
    alone = []
    for number, (ids, mask) in enumerate(zip(IDS.flatten(0, 1), MASK.flatten(0, 1), strict=True)):
        own = {} if weights is None else {"mixture": weights[number]}
        count = int(mask.sum())
        alone.append(scores(model, ids[None, None, :count], mask[None, None, :count], **own))
    return torch.cat(alone).view(2, 3)


@encoders
def test_every_choice_is_routed_as_a_sample(build):
    model = made(build)
    assert error(scores(model), one_by_one(model)) < 1e-5
    weights = model.sapt.attention
    scores(model)
    weights = model.sapt.attention
    assert weights.shape == (6, 3)
    assert torch.equal(weights, model.sapt.route(IDS, MASK))
    assert torch.equal(weights, model.sapt.route(IDS.flatten(0, 1), MASK.flatten(0, 1)))
    embeds = model.get_input_embeddings()(IDS)
    got = scores(model, ids=None, inputs_embeds=embeds)
    assert error(got, scores(model)) < 1e-5
    torch.testing.assert_close(model.sapt.route(inputs_embeds=embeds, attention_mask=MASK), weights)


@encoders
def test_weights_per_choice_and_per_sample(build):
    model = made(build)
    expected = one_by_one(model, WEIGHTS)
    with model.sapt.fixed(WEIGHTS):
        assert error(scores(model), expected) < 1e-5
    per_sample = WEIGHTS[:2].repeat_interleave(3, 0)
    expected = one_by_one(model, per_sample)
    assert error(scores(model, mixture=WEIGHTS[:2]), expected) < 1e-5
    assert torch.equal(model.sapt.attention, per_sample)
    with (
        model.sapt.fixed(WEIGHTS[:4]),
        pytest.raises(RuntimeError, match="for 4 samples, but the model's input has 6 rows"),
    ):
        scores(model)


def test_a_decoder_with_choices():
    """GPT-2 itself lays the choices one below the other; token types and labels as well."""
    model = made(double_heads)
    labels = IDS.clone()
    labels[:, :, :3] = -100
    extra = {"token_type_ids": torch.zeros_like(IDS), "labels": labels}
    got = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **extra)
    weights = model.sapt.attention
    torch.testing.assert_close(weights, model.sapt.route(IDS, labels=labels).detach())
    torch.testing.assert_close(weights[4], model.sapt.route(IDS[1, 1:2, :3])[0].detach())
    with model.sapt.fixed(weights[4]):
        alone = model(input_ids=IDS[1:, 1:2], token_type_ids=torch.zeros_like(IDS[1:, 1:2]))
    torch.testing.assert_close(got.logits[1, 1], alone.logits[0, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.mc_logits[1, 1], alone.mc_logits.flatten()[0])


def test_training_with_choices():
    model = made(bert)
    loss = model(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([0, 2])).loss
    loss.backward()
    grad = model.sapt.router.keys.trainable.grad.clone()
    model.zero_grad()
    rows, mask = IDS.flatten(0, 1), MASK.flatten(0, 1)
    pooled = model.bert(rows, attention_mask=mask).pooler_output
    logits = model.classifier(pooled).view(2, 3)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2])).backward()
    assert error(model.sapt.router.keys.trainable.grad, grad) < 1e-4


def test_routers_of_peft_models_see_rows():
    torch.manual_seed(0)
    model = sapt_fast.patch(peft_model("bert", base=bert()[0]))
    seen = []

    def route(input_ids, attention_mask, **_):
        seen.append((input_ids, attention_mask))
        return WEIGHTS[: input_ids.shape[0]]

    model.sapt.router = torch.nn.Identity()
    model.sapt.router.forward = route
    got = scores(model)
    assert torch.equal(seen[0][0], IDS.flatten(0, 1))
    assert torch.equal(seen[0][1], MASK.flatten(0, 1))
    model.sapt.router = None
    assert torch.equal(got, scores(model, mixture=WEIGHTS))
    assert error(got, one_by_one(model, WEIGHTS)) < 1e-5


# --- what has too few or too many dimensions ---


@pytest.mark.parametrize("family", ["llama", "t5", "bert", "gpt2"])
@pytest.mark.parametrize("shape", [(7,), (2, 2, 3, 7)], ids=str)
def test_other_dimensions_are_refused_in_words(family, shape):
    model = patched(family)
    ids = token_ids(1, torch.Size(shape).numel()).view(shape)
    extra = {"decoder_input_ids": token_ids()} if family == "t5" else {}
    with pytest.raises(ValueError, match=r"input_ids: got shape \(.*expected \[B, T\]"):
        model(input_ids=ids, **extra)
    with pytest.raises(ValueError, match=r"input_ids: got shape \(.*expected \[B, T\]"):
        model.sapt.route(ids)
    with pytest.raises(ValueError, match=r"input_ids: got list, expected \[B, T\]"):
        model(input_ids=ids.tolist(), **extra)
    embeds = torch.randn(7, 32)
    with pytest.raises(ValueError, match=r"inputs_embeds: got shape \(7, 32\), expected \[B, T, D"):
        model(inputs_embeds=embeds, **extra)


def test_codes_of_sounds_are_no_choices():
    """Where a third dimension counts codebooks, weights are per sample, and nothing is routed."""
    model = patched("gpt2")
    model.config.num_codebooks = 3
    ids = token_ids(6, 3).view(2, 3, 3)
    with pytest.raises(ValueError, match="input_ids: got shape"):
        model(input_ids=ids)
    with model.sapt.fixed(torch.eye(3)[:2]), pytest.raises(RuntimeError, match="MixedConv1D: got"):
        model(input_ids=ids)  # GPT-2 takes them for choices all the same


def test_both_parts_of_a_clip_text_model():
    config = transformers.CLIPTextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, projection_dim=16, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = patched(
        transformers.CLIPTextModelWithProjection(config).eval(), target_modules=["q_proj", "v_proj"]
    )
    ids = token_ids()
    with torch.no_grad():
        got = model(ids).text_embeds
        for row in range(3):
            alone = model(ids[row : row + 1]).text_embeds
            torch.testing.assert_close(got[row : row + 1], alone, atol=1e-5, rtol=1e-4)


def test_ordinary_rows_are_as_they_were():
    model, ids = patched("llama"), token_ids()
    got = run(model, ids)
    expected = run(oracle(model, "llama").merged(model.sapt.attention[1]), ids[1:2])
    torch.testing.assert_close(got[1:2], expected, atol=1e-4, rtol=1e-4)
