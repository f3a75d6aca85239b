"""CODA-Prompt and DualPrompt on models of texts: queries, generation, training, saving."""

import copy

import pytest
import torch
from tiny_models import Padded, decoder_inputs, run, tiny

import sapt_fast

METHODS = {
    "coda": sapt_fast.CodaConfig(pool=6, n_tasks=3, length=4, layers=[0, 1]),
    "dualprompt": sapt_fast.DualPromptConfig(g_length=2, e_length=3, g_layers=[0], e_layers=[1]),
}
GREEDY = {"do_sample": False, "max_new_tokens": 5}
BEAMS = {**GREEDY, "num_beams": 3}
MODES = {
    "greedy": GREEDY,
    "static": {**GREEDY, "cache_implementation": "static"},
    "beams": {**BEAMS, "num_return_sequences": 2},
    "static_beams": {**BEAMS, "cache_implementation": "static"},
    "no_cache": {**GREEDY, "use_cache": False},
}


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def handle(model):
    return model.coda if hasattr(model, "coda") else model.dualprompt


def patched(method, family):
    """A model with three tasks, whose rows are large, and each text of `Padded` has its own key."""
    model = sapt_fast.patch(tiny(family), METHODS[method])
    torch.manual_seed(3)
    for index in range(3):
        handle(model).grow(f"task {index}")
    encodes = family != "llama"  # which is padded on the left
    with torch.no_grad():
        for name, stack in handle(model).stacks().items():
            scale = 1.0 if name.endswith(("keys", "attention")) else 3.0
            stack.rows().copy_(torch.randn_like(stack.rows()) * scale)
        if method == "dualprompt":
            queries = [handle(model).query(text) for text in Padded(encodes).texts]
            model.dualprompt.keys.rows().copy_(torch.cat(queries))
    return model, Padded(encodes)


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_queries_are_means_of_embeddings_and_padding_is_unseen(method, family):
    model, batch = patched(method, family)
    own, table = handle(model), model.get_input_embeddings().weight
    places = {"position_ids": (batch.mask.cumsum(1) - 1).clamp(min=0)} if family == "llama" else {}
    logits = run(model, batch.ids, attention_mask=batch.mask, **places)
    weights = own.attention
    for row, text in enumerate(batch.texts):
        mean = table[text[0]].mean(0, keepdim=True)
        torch.testing.assert_close(own.query(text), mean)
        if method == "coda":
            a, k = (
                torch.cat([s.rows() for n, s in own.stacks().items() if n.endswith(name)])
                for name in ("attention", "keys")
            )
            expected = torch.cosine_similarity(mean * a, k, dim=1)[None]
            torch.testing.assert_close(weights[row : row + 1], expected)
        else:
            assert weights[row].item() == row
        alone = run(model, text)
        if family == "bert":
            torch.testing.assert_close(logits[row : row + 1], alone, rtol=1e-4, atol=1e-4)
        elif family == "llama":
            torch.testing.assert_close(
                logits[row, batch.where[row]], alone[0], rtol=1e-4, atol=1e-4
            )
    with own.fixed(weights[:1]):
        alike = run(model, batch.ids, attention_mask=batch.mask, **places)
    assert not torch.allclose(alike[1], logits[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generation_is_that_of_each_text_alone(method, family, mode):
    model, batch = patched(method, family)
    options = MODES[mode]
    got = model.generate(batch.ids, attention_mask=batch.mask, **options)
    given = handle(model).attention
    each = options.get("num_return_sequences", 1)
    start = 0 if family == "t5" else 9
    plain = {n: v for n, v in options.items() if n not in ("use_cache", "cache_implementation")}
    for row, text in enumerate(batch.texts):
        weights = handle(model).signal(input_ids=text)
        expected = model.generate(text, mixture=weights, use_cache=False, **plain)
        new = expected[:, 0 if family == "t5" else text.shape[1] :]
        length = new.shape[1]
        assert got[row * each : (row + 1) * each, start : start + length].tolist() == new.tolist()
    assert given is not None
    base = sapt_fast.unpatch(copy.deepcopy(model))
    assert base.generate(batch.ids, attention_mask=batch.mask, **options).tolist() != got.tolist()


def test_decoding_by_hand_keeps_the_weights_of_the_prompt(method):
    model, batch = patched(method, "llama")
    text = batch.ids[:1]
    first = model(text, use_cache=True)
    weights, cache = handle(model).attention, first.past_key_values
    token = torch.tensor([[7]])
    logits = model(token, past_key_values=cache).logits
    assert torch.equal(handle(model).attention, weights)
    with handle(model).fixed(weights):
        whole = model(torch.cat([text, token], 1)).logits
    torch.testing.assert_close(logits[:, -1], whole[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_training_saving_and_taking_off(method, family, tmp_path):
    base = tiny(family)
    ids = torch.randint(3, 90, (3, 6), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2]) if family == "bert" else ids.clone()
    if family == "llama":
        labels[:, :3] = -100  # the prompt, by which texts are queried
    before = run(base, ids)
    model = sapt_fast.patch(base, METHODS[method])
    assert torch.equal(run(model, ids), before)  # no task yet
    handle(model).grow("first")
    assert handle(model).config.modules_to_save == (["classifier"] if family == "bert" else None)
    optimizer = torch.optim.Adam(handle(model).trainable_parameters(), lr=0.05)
    model.train()
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=labels).loss
        (loss + handle(model).key_loss()).backward()
        named = handle(model).key_loss(input_ids=ids, labels=None if family == "bert" else labels)
        torch.testing.assert_close(named, handle(model).key_loss())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in handle(model).trainable_parameters())
    if family == "llama":
        seen = handle(model).query(ids, labels=labels)
        torch.testing.assert_close(seen, handle(model).query(ids[:, :3]))
    handle(model).save_pretrained(tmp_path)
    logits = run(model.eval(), ids)
    loaded = sapt_fast.load_pretrained(tiny(family), tmp_path)
    torch.testing.assert_close(run(loaded, ids), logits, rtol=0, atol=0)
    if family != "bert":
        assert torch.equal(run(sapt_fast.unpatch(model), ids), before)


@pytest.mark.thorough
def test_a_compiled_forward_is_one_graph(method):
    model, batch = patched(method, "llama")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = run(model, batch.ids, attention_mask=batch.mask)
        got = compiled(input_ids=batch.ids, attention_mask=batch.mask).logits
    torch.testing.assert_close(got, expected)


def test_what_is_refused(method):
    config = METHODS[method]
    with pytest.raises(ValueError, match="layer 0 of GPT2LMHeadModel has no attention"):
        sapt_fast.patch(tiny("gpt2"), config)
    for field, value in (("query_layer", 1), ("query_pooling", "cls")):
        changed = type(config).from_dict({**config.to_dict(), field: value})
        with pytest.raises(ValueError, match=f"{field}: got {value!r}, expected .*None for texts"):
            sapt_fast.patch(tiny("llama"), changed)
    model, batch = patched(method, "llama")
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(RuntimeError, match="2 texts in 1 rows, but a row has one set of weights"):
        model(batch.ids[:1, :6], position_ids=positions, use_cache=False)
    with (
        pytest.raises(ValueError, match="queries: got 2 for 3 texts"),
        handle(model).queries(torch.zeros(2, 32)),
    ):
        model(batch.ids)
    with pytest.raises(ValueError, match="attention_mask: got"):
        model(batch.ids, attention_mask=torch.ones(3, 1, 9, 9, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="call the patched model itself"):
        model.model.layers[0].self_attn(
            torch.zeros(1, 2, 32), position_embeddings=(torch.ones(1, 2, 8),) * 2
        )
    model.get_input_embeddings().requires_grad_(True)
    with pytest.raises(RuntimeError, match="token embeddings require a gradient"):
        model(batch.ids)
    encoder, batch = patched(method, "t5")
    outputs = encoder.get_encoder()(batch.ids, return_dict=False)
    with pytest.raises(RuntimeError, match="without routing_weights"):
        encoder(encoder_outputs=outputs, **decoder_inputs(encoder, batch.ids))
