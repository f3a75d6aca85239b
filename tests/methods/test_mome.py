"""MoME: facts are recalled from experts, and everything else stays as it is."""

import copy

import pytest
import torch
from tiny_models import checkpointed, run, tiny, token_ids

import sapt_fast
from sapt_fast import SaptConfig
from sapt_fast.demo.backbone import load_backbone
from sapt_fast.methods.memory import fitting
from sapt_fast.methods.mome import MomeConfig
from sapt_fast.pools.experts import ExpertBank
from sapt_fast.pools.slot_choice import SlotUse

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
TARGETS = [[20, 30, 1], [21, 31, 1], [22, 1]]
FACTS = list(zip(PROMPTS, TARGETS, strict=True))
OTHER = [40, 41, 42, 43]
SETTINGS = {"num_experts": 64, "k": 4, "components": 6, "threshold": 0.9, "learning_rate": 0.1}
_MADE = {}


def fresh(family="llama"):
    return load_backbone() if family == "t5" else tiny(family, initializer_range=0.3)


def router_data(count=20):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 8, (count,), generator=generator).tolist()
    return [torch.randint(3, 60, (length,), generator=generator) for length in lengths]


def patched(family="llama", **fields):
    model = sapt_fast.patch(fresh(family), MomeConfig(**{**SETTINGS, **fields}))
    model.mome.fit_router(router_data())
    return model


def memorised(family="llama", facts=FACTS, **fields):
    """A copy of a model with facts, which are memorised once."""
    key = repr((family, facts, fields))
    if key not in _MADE:
        _MADE[key] = patched(family, **fields)
        assert _MADE[key].mome.memorise(facts, until=0.3, batch_size=2).unfitted == []
    return copy.deepcopy(_MADE[key])


def answer(model, prompt, **options):
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": 5, "do_sample": False, **options}
    row = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
    row = row[1 if model.config.is_encoder_decoder else len(prompt) :]
    return row[: row.index(1) + 1] if 1 in row else row


@pytest.mark.parametrize(
    "family", ["llama", "t5", pytest.param("gpt2", marks=pytest.mark.thorough)]
)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}])
def test_every_fact_is_answered(family, options):
    model = memorised(family)
    assert [answer(model, prompt, **options) for prompt in PROMPTS] == TARGETS


def test_in_a_padded_batch():
    model = memorised()
    ids = torch.tensor([[0] * (5 - len(p)) + p for p in [*PROMPTS, OTHER]])
    rows = model.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=3, do_sample=False)
    assert [row[5 : 5 + len(t)].tolist() for row, t in zip(rows, TARGETS, strict=False)] == TARGETS
    assert rows[3, 5:].tolist() == answer(fresh(), OTHER, max_new_tokens=3)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_other_prompts_give_the_same_bits(family):
    ids = token_ids() % 60 + 3
    assert torch.equal(run(memorised(family), ids), run(fresh(family), ids))


def test_with_a_static_cache():
    model = memorised()
    assert [answer(model, p, cache_implementation="static") for p in PROMPTS] == TARGETS


@pytest.mark.parametrize(("gate", "weight"), [("softmax", 0.25), ("sigmoid", 0.7311 / 4)])
def test_the_equation(gate, weight):
    """At the last token, the layer computes as with a changed product of weights."""
    model = memorised(facts=FACTS[:1], gate=gate)
    ((path, layer),) = model.mome.layers.items()
    a, b = layer.bank.rows(torch.tensor(model.mome.experts_of(PROMPTS[0]).experts))
    bare = fresh()
    bare.get_submodule(path).register_forward_hook(
        lambda module, args, y: y + weight * torch.einsum("btd,krd,kro->bto", args[0], a, b)
        * (torch.arange(4) == 3)[None, :, None]
    )  # fmt: skip
    ids = torch.tensor([PROMPTS[0]])
    torch.testing.assert_close(run(model, ids), run(bare, ids), rtol=1e-3, atol=1e-4)


def test_facts_that_share_no_expert_do_not_change_each_other():
    model = memorised(facts=FACTS[:1])
    before = run(model, torch.tensor([PROMPTS[0]]))
    model.mome.memorise(FACTS[1:], until=0.3)
    assert torch.equal(run(model, torch.tensor([PROMPTS[0]])), before)
    assert [answer(model, p) for p in PROMPTS] == TARGETS


def test_facts_that_share_experts_are_trained_together(caplog):
    """Four experts, two for each of three facts: the first and the third share theirs."""
    model = patched(num_experts=4, k=2, learning_rate=0.05)
    model.mome.memorise(FACTS[:2], until=0.3)
    report = model.mome.memorise(FACTS[2:], until=0.3)
    assert "67% of the facts share experts" in caplog.text
    assert report.collisions == pytest.approx(2 / 3)
    assert report.unfitted == []
    assert [answer(model, p) for p in PROMPTS] == TARGETS


def test_forget():
    model = memorised()
    before = run(model, torch.tensor([PROMPTS[0]]))
    model.mome.forget(1)
    ids = torch.tensor([PROMPTS[1]])
    assert torch.equal(run(model, ids), run(fresh(), ids))
    assert torch.equal(run(model, torch.tensor([PROMPTS[0]])), before)
    (bank,) = model.mome.banks
    assert sorted(bank.touched.tolist()) == [0, 1, 2, 3, 8, 9, 10, 11]
    assert model.mome.memorise(FACTS[1:2], until=0.3).facts == [3]  # in the experts that are free
    assert model.mome.facts[-1].experts == (4, 5, 6, 7)
    model.mome.forget([0, 2, 3])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="fact: got 7"):
        model.mome.forget(7)


def test_a_fact_that_changes():
    model = memorised()
    report = model.mome.memorise([(PROMPTS[0], TARGETS[1]), FACTS[1]], until=0.3)
    assert report.facts == [3, 1]
    assert answer(model, PROMPTS[0]) == TARGETS[1]
    assert [fact.fact for fact in model.mome.facts] == [1, 2, 3]


@pytest.mark.parametrize("place", [0, 1])
def test_a_fact_that_changes_in_a_full_memory(place, caplog):
    """It takes the experts of the one that it replaces, which stay trained."""
    model = memorised(facts=FACTS[:2], num_experts=8)
    model.mome.memorise([(PROMPTS[place], TARGETS[2])], until=0.3)
    assert answer(model, PROMPTS[place]) == TARGETS[2]
    assert answer(model, PROMPTS[1 - place]) == TARGETS[1 - place]
    assert "share experts" not in caplog.text


def test_a_fact_that_is_given_twice():
    model = memorised(facts=FACTS[:1])
    report = model.mome.memorise([FACTS[1], FACTS[1]], until=0.3)
    assert report.facts == [1, 1]
    assert report.losses[0] == report.losses[1] <= 0.3
    model.mome.forget([1, 1])
    assert [fact.fact for fact in model.mome.facts] == [0]


def test_a_fact_below_the_threshold_of_learned_keys_is_not_memorised():
    config = MomeConfig(**{**SETTINGS, "keys": "learned", "threshold": 0.99, "epochs": 1})
    model = sapt_fast.patch(fresh(), config)
    before = model.mome.lookup.index.keys.clone()
    model.mome.fit_router([(prompt, [7, 1]) for prompt in router_data()])
    assert not torch.equal(model.mome.lookup.index.keys, before)
    report = model.mome.memorise(FACTS[:1])
    assert (report.unfitted, report.collisions) == ([0], 0)
    assert model.mome.facts[0].experts == ()
    model.mome.forget(0)


def test_a_layer_inside_another_one_looks_up_first():
    model = sapt_fast.patch(fresh(), MomeConfig(**SETTINGS, target_modules=("mlp", "down_proj")))
    *_, inner, outer = model.mome.layers
    assert inner == f"{outer}.down_proj"
    assert [layer.decides for layer in model.mome.layers.values()] == [True, False, False, False]


def test_an_error_while_facts_are_added_changes_nothing(monkeypatch):
    model = memorised(facts=FACTS[:2], num_experts=8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(model.mome.lookup.index, "build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.mome.memorise([(PROMPTS[0], TARGETS[2])], until=0.3)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert answer(model, PROMPTS[0]) == TARGETS[0]


def test_a_ratio_allows_facts_with_the_same_key():
    lookup = patched(ratio=0.8).mome.lookup
    ids, keys = torch.arange(2), torch.nn.functional.normalize(torch.randn(100, 6), dim=1)
    lookup.table.add(ids, ids, torch.arange(8).view(2, 4))
    for key in keys:
        lookup.index.set_rows(ids, key.expand(2, -1))
        assert lookup.decide(key[None])["fact"] >= 0
    lookup.index.set_rows(ids, keys[:2])
    between = torch.nn.functional.normalize(keys[0] + keys[1], dim=0)
    lookup.threshold = None
    assert lookup.decide(between[None])["fact"] < 0


@pytest.mark.thorough
def test_several_layers_with_one_bank_and_with_one_each():
    for shared in (False, True):
        model = memorised(target_modules=("mlp",), shared=shared)
        assert len(model.mome.banks) == (1 if shared else 2)
        assert [answer(model, p) for p in PROMPTS] == TARGETS


def test_save_and_load(tmp_path):
    model = memorised()
    model.save_pretrained(tmp_path / "whole")
    model.mome.save_pretrained(tmp_path / "own")
    ids = torch.tensor([PROMPTS[0]])
    for folder in ("whole", "own"):
        loaded = sapt_fast.load_pretrained(fresh(), tmp_path / folder)
        assert loaded.mome.facts == model.mome.facts
        assert torch.equal(run(loaded, ids), run(model, ids))
    other = sapt_fast.patch(fresh(), MomeConfig(**SETTINGS))
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other, ids), run(model, ids))
    sapt_fast.unpatch(other)
    assert torch.equal(run(other, ids), run(fresh(), ids))
    assert set(other.state_dict()) == set(fresh().state_dict())


def test_a_damaged_shard_is_named_and_an_earlier_bank_is_removed(tmp_path):
    model = memorised()
    for _ in range(2):
        model.mome.save_pretrained(tmp_path)
    (folder,) = tmp_path.glob("mome_bank_*")
    shard = folder / "experts-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4] + b"\0\0\0\1")
    target = sapt_fast.patch(fresh(), MomeConfig(**SETTINGS))
    with pytest.raises(ValueError, match="experts-00000"):
        sapt_fast.load_pretrained(target, tmp_path)
    assert target.mome.facts == []
    target = memorised(facts=FACTS[:1])
    with pytest.raises(ValueError, match="experts-00000"):
        target.mome.restore_values(tmp_path)
    assert len(target.mome.facts) == 1
    assert answer(target, PROMPTS[0]) == TARGETS[0]


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_an_approximate_index(index, tmp_path):
    pytest.importorskip("faiss")
    model = memorised(index=index)
    assert [answer(model, p) for p in PROMPTS] == TARGETS
    model.mome.save_pretrained(tmp_path)
    loaded = sapt_fast.load_pretrained(fresh(), tmp_path)
    assert [answer(loaded, p) for p in PROMPTS] == TARGETS
    loaded.mome.forget(0)
    assert not loaded.mome.experts_of(PROMPTS[0]).acts
    rows = loaded.mome.lookup.table.keys
    loaded.mome.lookup.index.set_rows(rows, loaded.mome.keys_of(loaded.mome.lookup.table.facts))
    with pytest.raises(RuntimeError, match="older than its keys"):
        loaded.mome.experts_of(PROMPTS[1])


def test_a_pinned_bank_is_served_by_its_cache():
    model = memorised(storage="pinned")
    (bank,) = model.mome.banks
    assert bank.home.type == "cpu"
    assert [answer(model, p) for p in PROMPTS] == TARGETS
    before = bank.hit_rate
    assert [answer(model, p) for p in PROMPTS] == TARGETS
    assert bank.hit_rate > before


@pytest.mark.thorough
def test_a_mapped_bank(tmp_path):
    model = memorised(storage="mapped")
    model.mome.save_pretrained(tmp_path)
    loaded = sapt_fast.load_pretrained(fresh(), tmp_path)
    assert [answer(loaded, p) for p in PROMPTS] == TARGETS
    loaded.mome.memorise([(OTHER, [23, 1])], until=0.3)
    assert [answer(loaded, p) for p in [*PROMPTS, OTHER]] == [*TARGETS, [23, 1]]


@pytest.mark.parametrize(
    "fields",
    [
        {"keys": "product", "heads": 2, "gate": "sigmoid"},
        pytest.param({"keys": "learned"}, marks=pytest.mark.thorough),
        pytest.param({"keys": "learned", "query": "token"}, marks=pytest.mark.thorough),
    ],
)
def test_keys_of_experts(fields, tmp_path):
    """The first stage trains keys and nothing else; facts then share the experts they find."""
    config = MomeConfig(**{**SETTINGS, "threshold": None, **fields})
    model, ids = sapt_fast.patch(fresh(), config), torch.tensor([PROMPTS[0]])
    (lookup,) = model.mome.lookups
    before = [lookup.projection.clone(), *(p.clone() for p in lookup.index.parameters())]
    model.mome.fit_router([(prompt, [7, 1]) for prompt in router_data(40)])
    after = [lookup.projection, *lookup.index.parameters()]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(run(model, ids), run(fresh(), ids))
    assert model.mome.memorise(FACTS, until=0.5).unfitted == []
    assert [answer(model, p) for p in PROMPTS] == TARGETS
    model.mome.save_pretrained(tmp_path)
    loaded = sapt_fast.load_pretrained(fresh(), tmp_path)
    assert torch.equal(run(loaded, ids), run(model, ids))
    assert loaded.mome.experts_of(PROMPTS[0]) == model.mome.experts_of(PROMPTS[0])


def test_only_some_experts_are_trained(tmp_path):
    """By TF-IDF, with the router's prompts as the other data."""
    model = sapt_fast.patch(
        fresh(), MomeConfig(**{**SETTINGS, "threshold": None}, keys="learned", slots=3)
    )
    pairs = [(prompt, [7, 1]) for prompt in router_data(40)]
    model.mome.fit_router(pairs)
    found = [
        torch.tensor([model.mome.experts_of(prompt).experts for prompt, _ in pairs[at : at + 16]])
        for at in range(0, 40, 16)
    ]
    expected = SlotUse(64)
    for index in found:
        expected.add(index)
    (use,) = model.mome.uses
    assert torch.equal(use.counts, expected.state_dict()["counts"])
    model.mome.memorise(FACTS, until=0.5)
    index = torch.tensor([fact.experts for fact in model.mome.facts])
    assert model.mome.banks[0].touched.tolist() == expected.choose(index, 3).tolist()
    assert index.unique().numel() > 3
    model.mome.save_pretrained(tmp_path)
    loaded = sapt_fast.load_pretrained(fresh(), tmp_path)
    assert torch.equal(loaded.mome.uses[0].counts, use.counts)
    loaded.mome.memorise([(OTHER, [23, 1])], until=0.5)


@pytest.mark.parametrize("storage", ["device", "pinned"])
def test_experts_are_found_once_per_prompt(storage, monkeypatch):
    model, calls, own = memorised(storage=storage), [], ExpertBank.select
    monkeypatch.setattr(ExpertBank, "select", lambda *args: calls.append(1) or own(*args))
    assert answer(model, PROMPTS[0], max_new_tokens=5) == TARGETS[0]
    assert len(calls) == 1
    ids, step = torch.tensor([PROMPTS[0], OTHER]), torch.tensor([[20], [44]])
    labels = torch.cat([torch.full_like(ids, -100), step, step], 1)
    whole = run(model, torch.cat([ids, step, step], 1), labels=labels)[:, -1]
    cache = model(input_ids=ids, use_cache=True).past_key_values
    several = model(input_ids=step.repeat(1, 2), past_key_values=copy.deepcopy(cache)).logits
    torch.testing.assert_close(several[:, -1], whole)
    model(input_ids=step, past_key_values=cache)
    torch.testing.assert_close(
        model(input_ids=step, past_key_values=copy.deepcopy(cache)).logits[:, 0], whole
    )
    model.mome.forget(0)  # which the cache still names
    plain = fresh()(input_ids=step, past_key_values=copy.deepcopy(cache)).logits
    assert torch.equal(model(input_ids=step, past_key_values=cache).logits, plain)


def test_beside_sapt():
    model = sapt_fast.patch(fresh(), SaptConfig(r=2, target_modules=("q_proj",)))
    model.sapt.add_task("one")
    sapt_fast.patch(model, MomeConfig(**SETTINGS))
    model.mome.fit_router(router_data())
    assert model.mome.memorise(FACTS, until=0.3).unfitted == []
    assert [answer(model, p) for p in PROMPTS] == TARGETS


def test_in_bfloat16_under_autocast_and_checkpointing():
    model, ids = memorised(), torch.tensor([PROMPTS[0]])
    expected = run(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(model, ids).float()
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.3)
    assert [answer(model.bfloat16(), p) for p in PROMPTS] == TARGETS
    assert model.mome.banks[0].rows(torch.tensor([0]))[0].dtype == torch.float32
    model = checkpointed(memorised()).train()
    torch.testing.assert_close(run(model, ids), expected)


@pytest.mark.thorough
def test_compiled():
    model, ids = memorised(), torch.tensor([PROMPTS[0], OTHER])
    expected = run(model, ids)
    torch.testing.assert_close(run(torch.compile(model, backend="eager"), ids), expected)
    with torch.no_grad():  # a step of decoding is one graph
        cache = model(input_ids=ids, use_cache=True).past_key_values
        step = {"input_ids": torch.tensor([[20], [44]])}
        expected = model(**step, past_key_values=copy.deepcopy(cache)).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**step, past_key_values=cache).logits, expected)


@pytest.mark.thorough
def test_a_look_up_per_token_is_part_of_the_graph():
    config = MomeConfig(**{**SETTINGS, "threshold": None, "keys": "product", "query": "token"})
    model, ids = sapt_fast.patch(fresh(), config), torch.tensor([PROMPTS[0], OTHER])
    model.mome.fit_router([(prompt, [7, 1]) for prompt in router_data()])
    model.mome.memorise(FACTS[:1], until=0.5)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(run(compiled, ids), run(model, ids))


def test_what_a_prompt_recalls():
    model = memorised()
    found = model.mome.experts_of(PROMPTS[1])
    assert (found.fact, found.acts, found.experts) == (1, True, (4, 5, 6, 7))
    assert found.score == pytest.approx(1)
    assert found.weights == (0.25,) * 4
    assert not model.mome.experts_of(OTHER).acts
    assert patched().mome.experts_of(OTHER).fact is None


class TestErrors:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"k": 65}, "k: got 65, expected at most num_experts"),
            ({"heads": 2}, "heads: got 2, expected 1 with keys='facts'"),
            ({"query": "token"}, "query: got 'token'"),
            ({"index": "product"}, "index: got 'product', expected one of exact"),
            ({"keys": "product", "index": "exact"}, "index: got 'exact', expected one of product"),
            ({"gate": "top"}, "gate: got 'top'"),
            ({"key_layer": 5}, "layer: got 5"),
            ({"target_modules": ("nothing",)}, "matches no module"),
            ({"pattern": "("}, "pattern"),
        ],
    )
    def test_bad_configs(self, fields, message):
        with pytest.raises(ValueError, match=message):
            sapt_fast.patch(fresh(), MomeConfig(**{**SETTINGS, **fields}))

    def test_facts_that_contradict_each_other(self, monkeypatch):
        model = patched()
        with pytest.raises(ValueError, match="facts: 0 and 1 have the same prompt"):
            model.mome.memorise([FACTS[0], (PROMPTS[0], [9])])
        same = torch.ones(3, 6) / 6**0.5
        monkeypatch.setattr(model.mome.router, "query", lambda features, texts: same[: len(texts)])
        with pytest.raises(ValueError, match="contradict each other"):
            model.mome.memorise(FACTS)
        assert model.mome.facts == []

    def test_before_and_after_the_router(self):
        model = sapt_fast.patch(fresh(), MomeConfig(**SETTINGS))
        with pytest.raises(RuntimeError, match="fit_router"):
            model.mome.memorise(FACTS)
        with pytest.raises(ValueError, match="got 6 for 3 vectors"):
            model.mome.fit_router(PROMPTS)
        with pytest.raises(ValueError, match="with 3 facts"):
            memorised().mome.fit_router(router_data())

    def test_more_facts_than_experts(self):
        model = patched(num_experts=2, k=2)
        with pytest.raises(ValueError, match="facts: got 3"):
            model.mome.memorise(FACTS)

    def test_what_does_not_fit_is_named(self, caplog):
        report = patched(epochs=1).mome.memorise(FACTS)
        assert report.unfitted == [0, 1, 2]
        assert "3 of 3 facts do not reach the loss 0.02" in caplog.text


class TestFolder:
    def test_an_interrupted_call_comes_to_the_same_experts(self, tmp_path, monkeypatch):
        expected = memorised()
        model, own, calls = patched(), fitting.Trainer.train, []

        def interrupted(self, batches):
            if calls:
                raise KeyboardInterrupt
            calls.append(1)
            return own(self, batches)

        monkeypatch.setattr(fitting.Trainer, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.mome.memorise(FACTS, until=0.3, batch_size=2, folder=tmp_path)
        assert model.mome.facts == []
        assert model.mome.banks[0].touched.tolist() == []
        monkeypatch.undo()
        model.mome.memorise(FACTS, until=0.3, batch_size=2, folder=tmp_path)
        for got, wanted in zip(
            model.mome.banks[0].stored().values(), expected.mome.banks[0].stored().values(),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(got, wanted)
        with pytest.raises(ValueError, match="another call of memorise, which differs in until"):
            patched().mome.memorise(FACTS, until=0.2, batch_size=2, folder=tmp_path)
        damaged = tmp_path / "groups" / "00001" / "rows.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-4] + b"\0\0\0\1")
        with pytest.raises(ValueError, match="00001"):
            patched().mome.memorise(FACTS, until=0.3, batch_size=2, folder=tmp_path)
