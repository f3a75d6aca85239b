"""Packed rows: every text gets the weights, the logits and the gradients that it gets alone."""

import pytest
import torch
from tiny_models import Padded, checkpointed, error, oracle, patched, token_ids
from tiny_peft import peft_model
from tiny_prompts import prompted
from torch import nn
from transformers import DataCollatorWithFlattening, DynamicCache, Seq2SeqTrainingArguments

import sapt_fast
from sapt_fast.routing import hooks, router_call
from sapt_fast.routing.packing import find_segments

LENGTHS = (5, 4, 5, 1, 2)
TEXTS = [token_ids(1, length, seed=seed) for seed, length in enumerate(LENGTHS)]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
ROW = torch.cat(TEXTS, 1)


def flattened(texts=TEXTS, labels=None, **options):
    """The texts as transformers packs them; its labels are the ids unless others are given."""
    features = [{"input_ids": text[0].tolist()} for text in texts]
    for feature, own in zip(features, labels or [], strict=False):
        feature["labels"] = own[0].tolist()
    return DataCollatorWithFlattening(**options)(features)


def in_two_rows():
    """[2, 9]: two texts, and three of which the last two are one token long, as padding is."""
    rows = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[4], TEXTS[3], TEXTS[3])]
    ids = [torch.cat(row, 1) for row in rows]
    positions = [torch.cat([torch.arange(t.shape[1]) for t in row])[None] for row in rows]
    return {"input_ids": torch.cat(ids), "position_ids": torch.cat(positions)}, [*rows[0], *rows[1]]


def without(batch, *names):
    return {name: value for name, value in batch.items() if name not in names}


def logits(model, **inputs):
    """[tokens, V] of all rows."""
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits.flatten(0, 1)


def alone(model, texts=TEXTS):
    """Logits and weights [tokens, ...] of the texts, one by one."""
    out, weights = [], []
    for text in texts:
        out.append(logits(model, input_ids=text))
        weights.append(model.sapt.attention.expand(text.shape[1], -1))
    return torch.cat(out), torch.cat(weights)


def agree(model, inputs, texts=TEXTS):
    expected, weights = alone(model, texts)
    assert error(logits(model, **inputs), expected) < 1e-5
    rows = inputs.get("input_ids", inputs.get("inputs_embeds"))
    assert model.sapt.attention.shape == (*rows.shape[:2], 3)
    torch.testing.assert_close(model.sapt.attention.flatten(0, 1), weights)


# --- a forward ---

PACKED = {
    "collator": lambda m: (flattened(), TEXTS),
    "later_start": lambda m: ({"input_ids": ROW, "position_ids": POSITIONS + 2}, TEXTS),
    "lengths_too": lambda m: (flattened(return_flash_attn_kwargs=True, return_seq_idx=True), TEXTS),
    "one_dimension": lambda m: ({"input_ids": ROW, "position_ids": POSITIONS}, TEXTS),
    "two_rows": lambda m: in_two_rows(),
    "embeds": lambda m: (
        {"inputs_embeds": m.get_input_embeddings()(ROW), "position_ids": POSITIONS},
        TEXTS,
    ),
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("kind", PACKED)
def test_every_text_is_as_it_is_alone(family, kind):
    if (family, kind) == ("gpt2", "later_start"):
        pytest.skip("its positions are absolute")
    model = patched(family)
    agree(model, *PACKED[kind](model))


def test_every_text_is_that_of_its_merged_model():
    model = patched("llama")
    got = logits(model, **flattened()).split(LENGTHS)
    weights = model.sapt.attention[0].split(LENGTHS)
    assert len({tuple(w[0].tolist()) for w in weights}) == len(LENGTHS)
    merged = oracle(model, "llama")
    for text, own, one in zip(TEXTS, weights, got, strict=True):
        expected = merged.merged(own[0])(text).logits[0]
        torch.testing.assert_close(one, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "seq_idx"])
def test_lengths_without_positions(name):
    """Attention as without packing, which lengths change in flash attention alone."""
    model = patched("llama")
    batch = flattened(return_flash_attn_kwargs=True, return_seq_idx=True)
    logits(model, input_ids=ROW, **{name: batch[name]})
    torch.testing.assert_close(model.sapt.attention[0], alone(model)[1])


@pytest.mark.parametrize("changed", [{"mask_padding": False}, {"pooling": "max"}, {"top_k": 2}])
def test_settings_of_the_router(changed):
    agree(patched("llama", **changed), flattened())


def test_a_row_with_one_text_is_no_packed_one():
    model = patched("llama")
    logits(model, **flattened(TEXTS[:1]))
    torch.testing.assert_close(model.sapt.attention, model.sapt.route(TEXTS[0]).detach())
    for start in (0, 7):
        logits(model, input_ids=token_ids(), position_ids=torch.arange(start, start + 9)[None])
        assert torch.equal(model.sapt.attention, model.sapt.route(token_ids()))


# --- routers of users ---


class Router(nn.Module):
    """Knows nothing of masks: a text that is padded, or beside another, gets other weights."""

    def __init__(self, embedding, kind):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.kind = [embedding], kind
        self.linear = nn.Linear(embedding.weight.shape[1], 3)

    def forward(self, input_ids, inputs_embeds, attention_mask, labels):
        assert attention_mask is None
        embeds = self.embedding[0](input_ids) if inputs_embeds is None else inputs_embeds
        if self.kind == "same for all":
            return self.linear.bias[None]
        if self.kind == "per token":
            return torch.softmax(self.linear(embeds.cumsum(1)) * 30, -1)
        last = embeds.mean(1) + embeds[:, -1] * embeds.shape[1]
        return torch.softmax(self.linear(last) * 30, -1)


@pytest.mark.parametrize("kind", ["same for all", "per text", "per token"])
def test_routers_on_peft_models(kind):
    model = sapt_fast.patch(peft_model())
    model.sapt.router = Router(model.get_input_embeddings(), kind)
    for inputs, texts in ((flattened(), TEXTS), in_two_rows()):
        expected = torch.cat([logits(model, input_ids=text) for text in texts])
        assert error(logits(model, **without(inputs, "labels")), expected) < 1e-5
    embeds = {"inputs_embeds": model.get_input_embeddings()(ROW), "position_ids": POSITIONS}
    assert error(logits(model, **embeds), alone_peft(model)) < 1e-5


def alone_peft(model):
    return torch.cat([logits(model, input_ids=text) for text in TEXTS])


def test_a_router_with_weights_for_others_raises():
    model = sapt_fast.patch(peft_model())
    model.sapt.router = Router(model.get_input_embeddings(), "per text")
    model.sapt.router.forward = lambda **_: torch.rand(7, 3)
    with pytest.raises(RuntimeError, match=r"shape \(7, 3\).*2 texts of 5 tokens"):
        model(**without(flattened(), "labels"))


# --- training ---


def labelled():
    """A plain text, prompts of two and three tokens, and a text all of which is prompt."""
    labels = [text.clone() for text in TEXTS]
    for own, prompt in zip(labels, (0, 2, 3, 0, 2), strict=True):
        own[:, :prompt] = -100
    return labels


def backward(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("labels", [None, labelled()], ids=["plain", "prompts"])
def test_training_is_that_of_the_texts_one_by_one(reentrant, labels):
    model = patched("llama").train()
    if reentrant is not None:
        checkpointed(model, {"use_reentrant": reentrant})
    got = model(**flattened(labels=labels), use_cache=False).loss
    grads, total, count = backward(model, got), 0, 0
    for text, own in zip(TEXTS, labels or TEXTS, strict=True):
        trained = int((own[:, 1:] != -100).sum())
        if trained:
            total = total + model(text, labels=own, use_cache=False).loss * trained
            count += trained
    expected = total / count
    torch.testing.assert_close(got, expected)
    wanted = backward(model, expected)
    assert grads.keys() == wanted.keys()
    assert {"sapt.router.keys.trainable", "sapt.router.down.weight"} <= grads.keys()
    for name, grad in grads.items():
        assert error(grad, wanted[name]) < 1e-4, name


def test_a_first_label_alone_is_no_prompt():
    """The collator hides it from the loss, in which it has no part anyway."""
    model, text = patched("llama"), TEXTS[0]
    hidden = text.clone()
    hidden[:, 0] = -100
    torch.testing.assert_close(model.sapt.route(text, labels=hidden), model.sapt.route(text))
    padded = torch.cat([text, torch.zeros(1, 2, dtype=torch.long)], 1)
    labels = padded.masked_fill(padded == 0, -100)
    got = model.sapt.route(padded, (padded != 0).long(), labels=labels)
    torch.testing.assert_close(got, model.sapt.route(text))


def test_routing_labels():
    model, labels = patched("llama"), labelled()
    batch = flattened(labels=labels)
    packed = batch.pop("labels")
    logits(model, **batch, routing_labels=packed)
    for got, text, own in zip(model.sapt.attention[0].split(LENGTHS), TEXTS, labels, strict=True):
        torch.testing.assert_close(got[:1], model.sapt.route(text, labels=own))


# --- the handle ---


def test_route_and_reflection_loss():
    model = patched("llama")
    own = torch.cat([model.sapt.route(text) for text in TEXTS])
    got = model.sapt.route(ROW, position_ids=POSITIONS)
    assert got.requires_grad
    torch.testing.assert_close(got[0], own.repeat_interleave(torch.tensor(LENGTHS), 0))
    targets = torch.softmax(torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), -1)
    for target in (targets, targets[0]):
        each = target.expand(5, 2)
        losses = [model.sapt.reflection_loss(t, each[i]) for i, t in enumerate(TEXTS)]
        got = model.sapt.reflection_loss(ROW, target, position_ids=POSITIONS)
        torch.testing.assert_close(got, torch.stack(losses).mean())


def test_weights_of_texts():
    """What is a mean over texts, such as the loss on a task's own key, counts each once."""
    model = patched("llama")
    logits(model, **flattened())
    own = torch.cat([model.sapt.route(text) for text in TEXTS]).detach()
    torch.testing.assert_close(model.sapt.routing.weights_of_texts, own)
    logits(model, input_ids=token_ids())
    assert torch.equal(model.sapt.routing.weights_of_texts, model.sapt.attention)


def test_a_trainers_loss_counts_each_text_once(tmp_path):
    model = patched("llama", own_key_loss=0.5).train()
    arguments = Seq2SeqTrainingArguments(tmp_path, report_to="none", use_cpu=True)
    trainer = sapt_fast.SaptTrainer(model, arguments)
    model.config.use_cache = False  # as the Trainer sets it
    labels = labelled()
    got = trainer.compute_loss(model, flattened(labels=labels))
    total, keys = 0, []
    for text, own in zip(TEXTS, labels, strict=True):
        trained = int((own[:, 1:] != -100).sum())
        total += model(text, labels=own).loss * trained if trained else 0
        keys.append(model.sapt.route(text, labels=own)[0, -1].log())
    count = sum(int((own[:, 1:] != -100).sum()) for own in labels)
    torch.testing.assert_close(got, total / count - 0.5 * torch.stack(keys).mean())


@pytest.mark.parametrize("peft", [False, True])
def test_given_weights(peft):
    model = sapt_fast.patch(peft_model()) if peft else patched("llama")
    weights = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    batch = without(flattened(), "labels")
    each = zip(TEXTS, weights, strict=True)
    expected = torch.cat([logits(model, input_ids=text, mixture=own) for text, own in each])
    assert error(logits(model, **batch, mixture=weights), expected) < 1e-5
    with model.sapt.fixed(weights):
        assert error(logits(model, **batch), expected) < 1e-5
        assert model.sapt.attention.shape == (1, 17, 3)
        with pytest.raises(RuntimeError, match="for 5 samples, but the model's input has 1 rows"):
            model(input_ids=ROW)
    with (
        model.sapt.fixed(weights[:4]),
        pytest.raises(RuntimeError, match="for 4 samples, but the model's input has 1 rows"),
    ):
        model(**batch)


# --- what is not packed, or cannot be told ---


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("fill", [0, 1, "last"])
def test_padding_is_no_restart(left, fill):
    model, batch = patched("llama"), Padded(False, left)
    positions = batch.mask.cumsum(1) - 1
    if fill != "last":
        positions = positions.masked_fill(batch.mask == 0, fill)
    got = logits(model, input_ids=batch.ids, attention_mask=batch.mask, position_ids=positions)
    assert model.sapt.attention.shape == (3, 3)
    for row, (text, where) in enumerate(zip(batch.texts, batch.where, strict=True)):
        own = got.view(3, 9, -1)[row, where]
        assert error(own, logits(model, input_ids=text)) < 1e-4


def ones(*shape):
    return torch.ones(shape, dtype=torch.long)


UNCLEAR = {
    "mask": ({"attention_mask": ones(1, 17)}, "attention_mask"),
    "mask_of_four_dimensions": ({"attention_mask": torch.zeros(1, 1, 17, 17)}, "attention_mask"),
    "other_lengths": (
        {"cu_seq_lens_q": torch.tensor([0, 9, 17], dtype=torch.int32)},
        "position_ids and cu_seq_lens_q|cu_seq_lens_q and position_ids",
    ),
    "lengths_of_other_rows": ({"cu_seq_lens_q": torch.tensor([0, 9])}, "cu_seq_lens_q: got"),
}


@pytest.mark.parametrize("case", UNCLEAR)
@pytest.mark.parametrize("peft", [False, True])
def test_what_cannot_be_told_raises(case, peft):
    inputs, message = UNCLEAR[case]
    model = sapt_fast.patch(peft_model()) if peft else patched("llama")
    if peft:
        model.sapt.router = Router(model.get_input_embeddings(), "per text")
    with pytest.raises(RuntimeError, match=message) as caught:
        model(input_ids=ROW, position_ids=POSITIONS, **inputs)
    assert "fixed" in str(caught.value) or "expected" in str(caught.value)


GAPS = {
    "left_padding": [1, 1, 1, 0, 1, 2, 3],
    "right_padding_of_roberta": [2, 3, 4, 5, 1, 1, 1],
    "a_jump": [0, 1, 2, 3, 9, 10, 11],
    "steps_of_several_texts": [7, 12, 3, 9, 7, 8, 2],
}


@pytest.mark.parametrize("case", GAPS)
def test_texts_that_begin_elsewhere_raise(case):
    """Without a mask transformers takes such rows apart, into what are not whole texts."""
    model = patched("llama")
    with pytest.raises(RuntimeError, match=r"position_ids: the \d texts in 1 rows begin at"):
        model(input_ids=ROW[:, :7], position_ids=torch.tensor([GAPS[case]]))


def test_a_paged_cache_raises():
    model = patched("llama")
    with pytest.raises(RuntimeError, match="continuous batching"):
        model(input_ids=ROW, position_ids=POSITIONS, write_index=[torch.arange(17)])


def test_padding_inside_a_mask_does_not_hide_a_restart():
    model = patched("llama")
    mask = ones(1, 17)
    mask[0, 5] = 0
    with pytest.raises(RuntimeError, match="position_ids"):
        model(input_ids=ROW, position_ids=POSITIONS, attention_mask=mask)


def test_encoders_are_not_known_to_keep_texts_apart():
    model = patched("bert")
    with pytest.raises(RuntimeError, match="position_ids: they restart"):
        model(input_ids=ROW, position_ids=POSITIONS)
    model(input_ids=ROW, position_ids=torch.arange(17)[None])
    assert model.sapt.attention.shape == (1, 3)


def test_positions_of_images_are_none_of_texts():
    inputs = {"input_ids": ROW, "position_ids": POSITIONS[None].expand(3, 1, 17)}
    assert find_segments(inputs, lambda: True) is None
    with_text = {**inputs, "position_ids": POSITIONS[None].expand(4, 1, 17)}
    assert find_segments(with_text, lambda: True).lengths == list(LENGTHS)


# --- caches, generation, compilation, prompts ---


@pytest.mark.parametrize("peft", [False, True])
def test_the_cache_of_packed_rows_is_not_used_on(peft):
    model = sapt_fast.patch(peft_model()) if peft else patched("llama")
    extra = {"mixture": torch.rand(5, 3)} if peft else {}
    for cache in (None, DynamicCache(config=model.config)):
        inputs = {"input_ids": ROW, "position_ids": POSITIONS, **extra}
        with torch.no_grad():
            cache = model(**inputs, past_key_values=cache, use_cache=True).past_key_values
        for length in (1, 17):
            with pytest.raises(RuntimeError, match=r"past_key_values: got .* packed rows"):
                model(input_ids=ROW[:, :length], past_key_values=cache)


def test_steps_of_decoding_do_not_look_at_positions(monkeypatch):
    model, ids = patched("llama"), token_ids()
    cache = model(ids, use_cache=True).past_key_values

    def look(*_):
        raise AssertionError

    for module in (hooks, router_call):
        monkeypatch.setattr(module, "find_segments", look)
    positions = torch.full((3, 1), 9)
    model(ids[:, :1], past_key_values=cache, position_ids=positions)
    with model.sapt.fixed(torch.eye(3)):
        model(ids, position_ids=torch.arange(9).expand(3, 9))


def test_generating_from_packed_rows_raises():
    for model in (patched("llama"), prompted("llama")):
        for weights in (None, [0.2, 0.3, 0.5]):
            if weights is not None and not hasattr(model.sapt, "prompts"):
                continue  # the same weights for all texts
            with pytest.raises(RuntimeError, match="position_ids: got 5 texts in 1 rows"):
                model.generate(
                    ROW, position_ids=POSITIONS, mixture=weights and torch.tensor(weights)
                )


def test_prompts_do_not_go_with_packed_rows():
    model = prompted("llama")
    with pytest.raises(RuntimeError, match="position_ids: got 5 texts in 1 rows"):
        model(**flattened())
    with (
        model.sapt.fixed([0.2, 0.3, 0.5]),
        pytest.raises(RuntimeError, match="position_ids: got 5 texts in 1 rows"),
    ):
        model(ROW, position_ids=POSITIONS)
    with pytest.raises(RuntimeError, match="5 texts in 1 rows"):
        model(ROW, cu_seq_lens_q=torch.tensor([0, 5, 9, 14, 15, 17]))


def test_compiled_forwards_say_so():
    model = patched("llama")
    expected = logits(model, **flattened())
    torch._dynamo.reset()
    whole = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="position_ids: whether they restart"):
        whole(input_ids=ROW, position_ids=POSITIONS, use_cache=False)
    weights = model.sapt.route(ROW, position_ids=POSITIONS).detach()
    with model.sapt.fixed(weights):
        assert error(logits(whole, input_ids=ROW, position_ids=POSITIONS), expected) < 1e-5
