"""How the mixture weights are chosen, and that each layer sees those of its own forward."""

import pytest
import torch
import transformers
from tiny_models import (
    FAMILIES,
    WIDTH,
    Oracle,
    decoder_inputs,
    error,
    oracle,
    patched,
    run,
    tiny,
    token_ids,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

# --- a forward ---


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_matches_the_merged_model_of_each_sample(family):
    model, ids = patched(family), token_ids()
    logits, weights = run(model, ids), model.sapt.attention
    assert weights.shape == (3, 3)
    assert not weights.requires_grad
    assert torch.equal(weights, model.sapt.route(ids))
    torch.testing.assert_close(weights.sum(-1), torch.ones(3))
    merged = oracle(model, family)
    for row in range(3):
        expected = run(merged.merged(weights[row]), ids[row : row + 1])
        torch.testing.assert_close(logits[row : row + 1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("shape", ["[K]", "[B, K]", "[B, T, K]"])
def test_fixed_weights_reach_the_layer(family, shape):
    model, ids = patched(family), token_ids()
    layer = model.get_submodule(model.sapt.report.patched[-1])
    seen = {}
    layer.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    size = {"[K]": (3,), "[B, K]": (3, 3), "[B, T, K]": (3, 9, 3)}[shape]
    weights = torch.rand(size, generator=torch.Generator().manual_seed(0))
    with model.sapt.fixed(weights):
        run(model, ids)
    weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
    expected = nn.functional.linear(seen["x"], weight, layer.bias)
    per_token = weights.expand(3, 9, 3) if len(size) != 2 else weights[:, None].expand(3, 9, 3)
    for k in range(3):
        a, b = layer.sapt_pool.adapter(k)
        expected = expected + per_token[..., k, None] * 2.0 * (seen["x"] @ a.t() @ b)
    torch.testing.assert_close(seen["y"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "kind",
    ["T5EncoderModel", "T5Model", "T5ForSequenceClassification", "LlamaModel",
     "LlamaForSequenceClassification", "BertModel"],
)  # fmt: skip
def test_models_with_other_heads(kind):
    def build():
        torch.manual_seed(0)
        config = tiny({"T": "t5", "L": "llama", "B": "bert"}[kind[0]]).config
        return getattr(transformers, kind)(config).eval()

    ids = token_ids()
    ids[:, -1] = 1  # sequence classification reads T5's end token
    model = patched(build())
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if kind == "T5Model" else {})}
    with torch.no_grad():
        got, merged = model(**inputs)[0], Oracle(model, build())
        for row, weights in enumerate(model.sapt.attention):
            own = {name: value[row : row + 1] for name, value in inputs.items()}
            expected = merged.merged(weights)(**own)[0]
            assert error(got[row : row + 1], expected) < 1e-4


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_the_weights_are_computed_once(family, monkeypatch):
    model, calls = patched(family), []
    own = model.sapt.router.pool
    monkeypatch.setattr(model.sapt.router, "pool", lambda *a: calls.append(1) or own(*a))
    run(model, token_ids())
    assert len(calls) == 1
    model.generate(token_ids(), max_new_tokens=4, num_beams=2)
    assert len(calls) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_embeds_and_positional_arguments(family):
    model, ids = patched(family), token_ids()
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    expected = run(model, ids, attention_mask=mask)
    weights = model.sapt.attention
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        got = model(inputs_embeds=embeds, attention_mask=mask, **decoder_inputs(model, ids)).logits
        torch.testing.assert_close(model.sapt.attention, weights)
        if family != "gemma":  # which scales its embeddings after the look-up in some versions
            assert error(got, expected) < 1e-4
        model.sapt.routing.weights = None
        if family == "gpt2":  # forward(input_ids, past_key_values, cache_position, attention_mask)
            model(ids, attention_mask=mask)
        else:
            model(ids, mask, **decoder_inputs(model, ids))
    assert torch.equal(model.sapt.attention, weights)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_model_inside_routes_when_called_on_its_own(family):
    model, ids = patched(family), token_ids()
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states[-1]
        model(token_ids(seed=2))
        got = model.base_model(ids).last_hidden_state
    torch.testing.assert_close(got, expected)


def test_a_failed_forward_leaves_nothing_behind():
    model, ids = patched("llama"), token_ids()
    with torch.no_grad():
        expected = model.base_model(ids).last_hidden_state
        model(token_ids(seed=2))
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            model(torch.full_like(ids, 9999))
        assert torch.equal(model.base_model(ids).last_hidden_state, expected)


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_an_interrupted_forward_leaves_nothing_behind(family):
    model, ids = patched(family), token_ids()
    kwargs = decoder_inputs(model, ids)
    with torch.no_grad():
        part = model.get_decoder() if family == "t5" else model.model.layers[0].self_attn.q_proj
        expected = model.base_model(ids, **kwargs)[0]
        layer = model.get_submodule(model.sapt.report.patched[-1])
        handle = layer.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(token_ids(seed=2), **kwargs)
        handle.remove()
        if family == "t5":
            with pytest.raises(RuntimeError, match="no mixture weights"):
                part(input_ids=ids, encoder_hidden_states=torch.randn(3, 9, WIDTH))
        else:
            with model.sapt.fixed([0.2, 0.3, 0.5]):
                assert torch.equal(model.sapt.routing.running, torch.tensor([[0.2, 0.3, 0.5]]))
        assert torch.equal(model.base_model(ids, **kwargs)[0], expected)


def test_a_forward_in_a_forward():
    """A hook runs the same model on other inputs; the outer one goes on with its own weights."""
    model, ids, other = patched("llama"), token_ids(), token_ids(batch=2, seed=2)
    expected, inner = run(model, ids), run(model, other)
    got, layer = [], model.get_submodule(model.sapt.report.patched[1])

    def again(*_):
        if not got:
            got.append(None)
            got.append(run(model, other))

    layer.register_forward_pre_hook(again)
    assert torch.equal(run(model, ids), expected)
    assert torch.equal(got[1], inner)
    assert torch.equal(model.sapt.attention, model.sapt.route(ids))


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_parts_do_not_take_the_last_forwards_weights(family):
    model, ids = patched(family), token_ids()
    run(model, ids)
    assert model.sapt.attention.shape == (3, 3)
    hidden = torch.randn(3, 9, WIDTH)
    layer = model.get_submodule(model.sapt.report.patched[0])
    with pytest.raises(RuntimeError, match="no mixture weights for MixedLinear"):
        layer(hidden)
    if family == "t5":
        with pytest.raises(RuntimeError, match="no mixture weights"):
            model.decoder(input_ids=ids, encoder_hidden_states=hidden)
        with model.sapt.fixed(torch.eye(3)):
            model.decoder(input_ids=ids, encoder_hidden_states=hidden)


def test_parts_without_weights_raise():
    model = patched("llama")
    hidden = torch.randn(1, 4, WIDTH)
    layer = model.get_submodule(model.sapt.report.patched[0])
    with pytest.raises(RuntimeError, match="no mixture weights"):
        layer(hidden)
    with model.sapt.fixed([0.2, 0.3, 0.5]):
        layer(hidden)


# --- which tokens are pooled ---


def test_causal_labels_take_no_part():
    model, ids = patched("llama"), token_ids()
    labels = ids.clone()
    labels[:, :5] = -100
    weights = model.sapt.route(ids[:, :5])
    model(ids, labels=labels)
    torch.testing.assert_close(model.sapt.attention, weights.detach())
    torch.testing.assert_close(model.sapt.route(ids, labels=labels), weights)
    changed = ids.clone()
    changed[:, 5:] = token_ids(seed=2)[:, 5:]
    model(changed, labels=torch.where(labels == -100, labels, changed))
    assert torch.equal(model.sapt.attention, model.sapt.route(ids, labels=labels).detach())
    changed[:, 0] = 4
    model(changed, labels=labels)
    assert (model.sapt.attention - weights).abs().min(1).values.max() > 1e-3


def test_training_and_generating_choose_the_same_weights():
    """Prompt and answer, padded left and right: the weights are those of the bare prompt."""
    model, prompt = patched("llama"), token_ids(length=5)
    model.generate(prompt, max_new_tokens=1)
    weights = model.sapt.attention
    pad, answer = torch.zeros(3, 2, dtype=torch.long), token_ids(length=3, seed=3)
    ids, ones = torch.cat([pad, prompt, answer, pad], 1), torch.ones(3, 8, dtype=torch.long)
    nothing = torch.full((3, 7), -100)
    labels = torch.cat([nothing, answer, nothing[:, :2]], 1)
    model(ids, attention_mask=torch.cat([pad, ones, pad], 1), labels=labels)
    torch.testing.assert_close(model.sapt.attention, weights)


def test_labels_everywhere_pool_the_whole_row():
    model, ids = patched("llama"), token_ids()
    labels = ids.clone()
    labels[0, :4] = -100
    weights = model.sapt.route(ids, labels=labels)
    torch.testing.assert_close(weights[1:], model.sapt.route(ids)[1:])
    torch.testing.assert_close(weights[:1], model.sapt.route(ids[:1, :4]))


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_labels_of_other_models_do_not_matter(family):
    model, ids = patched(family), token_ids()
    labels = torch.full_like(ids, -100) if family == "t5" else torch.tensor([0, 1, 2])
    if family == "t5":
        labels[:, 0] = 5
    model(input_ids=ids, labels=labels)
    assert torch.equal(model.sapt.attention, model.sapt.route(ids))


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("masked", [True, False])
def test_mask_padding(family, masked):
    model, ids = patched(family, mask_padding=masked), token_ids(length=6)
    padded = torch.cat([ids, torch.zeros(3, 3, dtype=torch.long)], 1)
    mask = (padded != 0).long()
    run(model, padded, attention_mask=mask)
    bare, whole = model.sapt.route(ids), model.sapt.route(padded)
    torch.testing.assert_close(model.sapt.attention, (bare if masked else whole).detach())
    assert (bare - whole).abs().max() > 1e-3


def test_sparse_weights():
    model = patched("llama", top_k=1)
    weights = model.sapt.route(token_ids())
    assert torch.equal(weights.amax(-1), torch.ones(3))
    assert (weights == 0).sum() == 6


# --- fixed ---


def test_fixed_nests_and_survives_exceptions():
    model, ids = patched("llama"), token_ids()
    routed = run(model, ids)
    outer, inner = torch.tensor([1.0, 0, 0]), torch.tensor([[0, 1.0, 0]])
    with model.sapt.fixed(outer):
        with model.sapt.fixed(inner):
            run(model, ids)
            assert torch.equal(model.sapt.attention, inner.expand(3, 3))
            with pytest.raises((IndexError, RuntimeError, ValueError)), model.sapt.fixed(outer):
                model(torch.full_like(ids, 9999))
        for call, rows in (
            (lambda: run(model, ids), 3),
            (lambda: model.base_model(ids), 3),
            (lambda: model.generate(ids, max_new_tokens=2, num_beams=2), 6),
        ):
            call()
            assert torch.equal(model.sapt.attention, outer.expand(rows, 3))
    assert torch.equal(run(model, ids), routed)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, float("nan"), 0.5], "finite"),
        ([0.5, float("inf"), 0.5], "finite"),
        ([1, 0, 0], "floats"),
        ([0.5, 0.5], r"weights: got shape \(2,\), expected \[3\]"),
        ([[[[0.2, 0.3, 0.5]]]], "got shape"),
        (torch.zeros(0, 3), r"got shape \(0, 3\)"),
        (torch.zeros(2, 0, 3), "got shape"),
    ],
    ids=["nan", "inf", "integers", "too_few", "four_dimensions", "no_sample", "no_token"],
)
def test_bad_fixed_weights(weights, message):
    model = patched("llama")
    with pytest.raises(ValueError, match=message):
        model.sapt.fixed(torch.as_tensor(weights))
    assert model.sapt.routing.pinned is None


def test_per_token_weights_for_another_length_raise():
    model = patched("t5")
    weights = torch.full((3, 9, 3), 1 / 3)
    message = r"MixedLinear: got an input of shape \(3, 4, 32\).*expected \[3, 9"
    with model.sapt.fixed(weights), pytest.raises(RuntimeError, match=message):
        model(input_ids=token_ids(), decoder_input_ids=token_ids(length=4))


# --- which rows are which samples ---


@pytest.mark.parametrize("family", FAMILIES)
def test_fixed_weights_of_another_batch_raise(family):
    model = patched(family)
    with (
        model.sapt.fixed(torch.eye(3)[:2]),
        pytest.raises(RuntimeError, match="for 2 samples, but the model's input has 4 rows"),
    ):
        run(model, token_ids(batch=4))


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ((2, 5, WIDTH), True),
        ((2, 3, 4, WIDTH), True),
        ((10, WIDTH), True),  # flattened
        ((2, WIDTH), True),
        ((4, 5, WIDTH), False),
        ((5, 2, WIDTH), False),
        ((8, 2, WIDTH), False),  # tokens first
        ((1, 5, WIDTH), False),  # shared by the samples
        ((5, WIDTH), False),
    ],
    ids=str,
)
def test_the_first_dimension_is_the_batch(shape, fits):
    model, x = patched("llama"), torch.randn(shape)
    layer = model.get_submodule(model.sapt.report.patched[0])
    with model.sapt.fixed(torch.eye(3)[:2]):
        if not fits:
            with pytest.raises(
                RuntimeError, match=rf"MixedLinear: got .*{WIDTH}.* of shape \(2, 3\)"
            ):
                layer(x)
        else:
            both, rows = layer(x), x.shape[0] // 2
    if fits:
        for k in range(2):
            with model.sapt.fixed(torch.eye(3)[k]):
                one = layer(x[k * rows : (k + 1) * rows])
            torch.testing.assert_close(both[k * rows : (k + 1) * rows], one)
    with model.sapt.fixed([0.2, 0.3, 0.5]):
        layer(x)  # the same for all samples: any shape will do


def longformer():
    config = transformers.LongformerConfig(
        vocab_size=97, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, attention_window=4, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return transformers.LongformerModel(config).eval(), ["query", "value"]


def deberta():
    config = transformers.DebertaV2Config(
        vocab_size=97, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, relative_attention=True, pos_att_type=["p2c", "c2p"],
        share_att_key=True, position_biased_input=False, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.DebertaV2Model(config).eval(), ["query_proj", "value_proj"]


@pytest.mark.parametrize("build", [longformer, deberta])
def test_layers_without_the_batch_first_raise(build):
    model, targets = build()
    model = patched(model, target_modules=targets)
    ids = token_ids(batch=2, length=8)
    with pytest.raises(RuntimeError, match="first dimension is not the batch"):
        model(ids)
    model(ids[:1])
    with model.sapt.fixed([0.2, 0.3, 0.5]):
        model(ids)


# --- after a new task ---


def test_weights_from_before_a_task_are_refused():
    model, ids = patched("t5"), token_ids()
    outputs, weights = model.get_encoder()(ids), torch.full((3,), 1 / 3)
    causal = patched("llama")
    cache = causal(ids, use_cache=True).past_key_values
    for one in (model, causal):
        one.sapt.add_task("new")
        assert one.sapt.attention is None
    with pytest.raises(RuntimeError, match="3 adapters, but this layer has 4"):
        model(encoder_outputs=outputs, labels=ids)
    with pytest.raises(RuntimeError, match="3 adapters, but this layer has 4"):
        causal(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match=r"expected \[4\]"):
        model.sapt.fixed(weights)
    run(model, ids)
    assert model.sapt.attention.shape == (3, 4)
