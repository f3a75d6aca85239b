"""GRACE: edits act where they should, nowhere else, in every way to run a model."""

import copy
import random

import pytest
import torch
from tiny_models import run, tiny, token_ids

import sapt_fast
from sapt_fast import SaptConfig
from sapt_fast.demo.backbone import load_backbone
from sapt_fast.methods.grace import EditError, GraceConfig

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16], [17, 18]]
TARGETS = [[20, 30, 1], [21, 31, 1], [22, 32, 33, 1], [23, 1]]
PAIRS = list(zip(PROMPTS, TARGETS, strict=True))
TIGHT = {"radius": 1e-3, "replacement": "per_token", "margin": 1.0}


def fresh(family="llama"):
    """A model whose logits are far enough apart that beams find what is the likeliest."""
    return load_backbone() if family == "t5" else tiny(family, initializer_range=0.3)


def edited(family="llama", pairs=PAIRS, **fields):
    model = fresh(family)
    sapt_fast.patch(model, GraceConfig(**{**TIGHT, **fields}))
    model.grace.edit(pairs)
    return model


@pytest.fixture(scope="module", params=["llama", "gpt2", "t5"])
def model(request):
    return edited(request.param)


@pytest.fixture(scope="module")
def llama():
    return edited("llama")


def answers(model, prompt, **options):
    """What the model generates behind a prompt, up to the end token."""
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    rows = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    start = 1 if model.config.is_encoder_decoder else len(prompt)
    return [cut(row[start:].tolist()) for row in rows]


def cut(row):
    return row[: row.index(1) + 1] if 1 in row else row


def bare(model):
    return fresh(model.config.model_type)


class TestGeneration:
    def test_every_edit_is_answered(self, model):
        assert [answers(model, prompt) for prompt in PROMPTS] == [[t] for t in TARGETS]

    @pytest.mark.parametrize(
        "options",
        [
            {"num_beams": 3, "num_return_sequences": 2},
            {"do_sample": True, "num_return_sequences": 2, "temperature": 0.01},
            {"cache_implementation": "static"},
            {"use_cache": False},
        ],
        ids=["beams", "sampling", "static cache", "no cache"],
    )
    def test_however_it_is_decoded(self, model, options):
        for prompt, target in PAIRS[1:3]:
            assert answers(model, prompt, **options)[0] == target

    def test_a_prompt_in_chunks(self, llama):
        assert answers(llama, PROMPTS[2], prefill_chunk_size=2) == [TARGETS[2]]

    def test_a_padded_batch_of_edited_and_other_prompts(self, model):
        prompts, other = [*PROMPTS[:3], [40, 41, 42, 43, 44, 45]], bare(model)
        ids, mask = padded(prompts, left=not model.config.is_encoder_decoder)
        options = {"max_new_tokens": 6, "do_sample": False}
        rows = model.generate(ids, attention_mask=mask, **options).tolist()
        start = 1 if model.config.is_encoder_decoder else ids.shape[1]
        assert [cut(row[start:]) for row in rows[:3]] == TARGETS[:3]
        expected = other.generate(ids, attention_mask=mask, **options)[3].tolist()
        shortest = min(len(rows[3]), len(expected))  # other rows end at other steps
        assert rows[3][:shortest] == expected[:shortest]

    def test_by_hand_with_a_cache(self, llama):
        ids, cache, tokens = torch.tensor([PROMPTS[0], PROMPTS[0]]), None, []
        with torch.no_grad():
            for _ in TARGETS[0]:
                found = llama(input_ids=ids, past_key_values=cache, use_cache=True)
                cache = found.past_key_values
                ids = found.logits[:, -1:].argmax(-1)
                tokens.append(ids[0, 0].item())
        assert tokens == TARGETS[0]

    def test_one_value_for_all_tokens(self):
        model = edited(pairs=[([5, 6, 7], [20])], replacement="generation")
        assert answers(model, [5, 6, 7], max_new_tokens=1) == [[20]]

    def test_a_second_turn_is_looked_up_anew(self, llama):
        with torch.no_grad():
            first = llama(input_ids=torch.tensor([[40, 41]]), use_cache=True)
            whole = torch.tensor([[40, 41, *PROMPTS[0]]])
            options = {"max_new_tokens": 3, "do_sample": False}
            expected = llama.generate(whole, **options)
            found = llama.generate(whole, past_key_values=first.past_key_values, **options)
        assert torch.equal(found, expected)


def padded(prompts, left):
    width = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    return ids, mask


class TestWhereNoEditActs:
    def test_the_same_bits(self, model):
        ids = token_ids() % 60 + 3
        assert torch.equal(run(model, ids), run(bare(model), ids))

    def test_no_hook_without_an_edit(self):
        model = sapt_fast.patch(fresh(), GraceConfig(**TIGHT, steps=1))
        with pytest.raises(EditError, match="after 1 steps") as error:
            model.grace.edit([([5, 6], [20, 30, 1]), ([7, 8], [21, 1])])
        assert error.value.unfitted == [0, 1]
        hooks = [m._forward_hooks or m._forward_pre_hooks for m in model.modules()]
        assert not any(hooks)
        assert "generate" not in vars(model)

    def test_unpatch_leaves_nothing(self):
        model = sapt_fast.unpatch(edited())
        assert vars(model).keys() == vars(fresh()).keys()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        ids = torch.tensor([PROMPTS[0]])
        assert torch.equal(run(model, ids), run(fresh(), ids))


class TestUndo:
    @pytest.mark.parametrize("rule", ["fixed", "split"])
    def test_any_edit_restores_the_bits_of_before(self, rule):
        ids = [torch.tensor([p]) for p in PROMPTS]
        for gone in range(3):
            kept = [pair for place, pair in enumerate(PAIRS[:3]) if place != gone]
            model, other = (
                edited(pairs=[], rule=rule, radius=30.0),
                edited(pairs=[], rule=rule, radius=30.0),
            )
            edits = [model.grace.edit(*pair) for pair in PAIRS[:3]]
            before = [run(model, x) for x in ids]
            model.grace.undo(model.grace.edit(*PAIRS[3]))
            assert all(torch.equal(run(model, x), y) for x, y in zip(ids, before, strict=True))
            model.grace.undo(edits[gone])
            for pair in kept:
                other.grace.edit(*pair)
            books = [next(iter(m.grace.layers.values())).codebook for m in (model, other)]
            torch.testing.assert_close(books[0].radii, books[1].radii)
            assert torch.equal(books[0].keys, books[1].keys)

    def test_a_fact_that_changes_twice(self):
        model = edited(pairs=[PAIRS[0]])
        second = model.grace.edit(PROMPTS[0], TARGETS[1])
        assert answers(model, PROMPTS[0]) == [TARGETS[1]]
        model.grace.undo(second)
        assert answers(model, PROMPTS[0]) == [TARGETS[0]]
        model.grace.undo(0)
        assert torch.equal(
            run(model, torch.tensor([PROMPTS[0]])), run(fresh(), torch.tensor([PROMPTS[0]]))
        )

    def test_an_older_edit_of_a_fact_is_taken_back(self):
        model = edited(pairs=[PAIRS[0]])
        model.grace.edit(PROMPTS[0], TARGETS[1])
        model.grace.undo(0)
        assert answers(model, PROMPTS[0]) == [TARGETS[1]]


class TestTable:
    def test_edits_and_which(self, llama):
        table = llama.grace.edits
        assert [(e.prompt, e.target) for e in table] == [(tuple(p), tuple(t)) for p, t in PAIRS]
        match = llama.grace.which(PROMPTS[2])
        assert (match.edit, match.acts) == (2, True)
        assert match.distance < 1e-4
        far = llama.grace.which([40, 41, 42])
        assert not far.acts
        assert far.distance > far.radius

    def test_hits_count_prompts_not_tokens(self):
        model = edited(pairs=PAIRS[:2])
        answers(model, PROMPTS[0])
        answers(model, PROMPTS[0])
        answers(model, [40, 41])
        model.grace.which(PROMPTS[1])
        assert [e.hits for e in model.grace.edits] == [2, 0]

    def test_an_answer_that_is_given_already_is_no_edit(self):
        model = edited(pairs=PAIRS[:1])
        given = answers(fresh(), [40, 41], max_new_tokens=2)[0]
        assert model.grace.edit([40, 41], given) is None
        assert model.grace.edit([(PROMPTS[0], TARGETS[0]), PAIRS[1]]) == [None, 1]


class TestRules:
    def test_split_halves_the_distance_of_other_targets(self):
        model = edited(pairs=PAIRS[:3], rule="split", radius=30.0)
        book = next(iter(model.grace.layers.values())).codebook
        distance = torch.cdist(book.keys, book.keys) + torch.eye(3) * 1e9
        torch.testing.assert_close(book.radii, distance.min(1).values / 2, atol=2e-5, rtol=1e-4)
        assert [answers(model, p) for p in PROMPTS[:3]] == [[t] for t in TARGETS[:3]]

    def test_the_mean_of_the_prompt(self):
        model = edited(keys="mean")
        key = model.grace.key_of(PROMPTS[0])
        (layer,) = model.grace.layers.values()
        torch.testing.assert_close(key[0], layer.codebook.keys[0])
        ids, mask = padded(PROMPTS, left=True)
        rows = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        assert [cut(row[ids.shape[1] :].tolist()) for row in rows] == TARGETS

    @pytest.mark.parametrize("family", ["llama", "t5"])
    def test_keys_by_a_function(self, family):
        model = sapt_fast.patch(
            fresh(family),
            GraceConfig(keys="function", radius=0.5, replacement="per_token"),
        )
        with pytest.raises(ValueError, match="look_up_by"):
            model.grace.edit(*PAIRS[0])
        model.grace.look_up_by(lambda texts: torch.stack([one_hot(t) for t in texts]))
        model.grace.edit(PAIRS)
        reordered = [8, 7, 6, 5]
        assert model.grace.which(reordered).acts
        assert answers(model, PROMPTS[0], num_beams=2) == [TARGETS[0]]
        ids = token_ids() % 60 + 3
        assert torch.equal(run(model, ids), run(bare(model), ids))

    def test_a_function_is_set_again_after_loading(self, tmp_path):
        model = sapt_fast.patch(fresh(), GraceConfig(**{**TIGHT, "keys": "function"}))
        function = lambda texts: torch.stack([one_hot(t)[:32] for t in texts])  # noqa: E731
        model.grace.look_up_by(function)
        model.grace.edit(PAIRS[:1])
        model.grace.save_pretrained(tmp_path)
        loaded = sapt_fast.load_pretrained(fresh(), tmp_path)
        with pytest.raises(RuntimeError, match="look_up_by"):
            run(loaded, token_ids())
        loaded.grace.look_up_by(function)
        assert answers(loaded, PROMPTS[0]) == [TARGETS[0]]

    def test_the_ratio_to_the_second(self):
        model = edited(ratio=0.5, radius=1e3)
        assert all(model.grace.which(p).acts for p in PROMPTS)
        assert not model.grace.which([40, 41, 42]).acts
        assert edited(radius=1e3).grace.which([40, 41, 42]).acts

    def test_two_layers(self):
        model = edited(target_modules=("mlp.down_proj",), radius=0.1)
        assert len(model.grace.layers) == 2
        assert [answers(model, p) for p in PROMPTS] == [[t] for t in TARGETS]


def one_hot(text):
    return torch.bincount(text.cpu(), minlength=128).float()


class TestClassifier:
    def test_labels_are_flipped_one_by_one(self):
        model = fresh("bert")
        ids = token_ids(batch=6)
        before = model(input_ids=ids).logits
        wanted = (before.argmax(-1) + 1) % 5
        sapt_fast.patch(model, GraceConfig(radius=1e-3))
        model.grace.edit([(ids[i], int(wanted[i])) for i in range(3)])
        after = run(model, ids)
        assert torch.equal(after[:3].argmax(-1), wanted[:3])
        assert torch.equal(after[3:], run(fresh("bert"), ids)[3:])

    def test_padding_on_the_right(self):
        model = fresh("bert")
        sapt_fast.patch(model, GraceConfig(radius=1e-2))
        prompts = [row[:n].tolist() for row, n in zip(token_ids(), (9, 5, 7), strict=True)]
        ids, mask = padded(prompts, left=False)
        wanted = (run(model, ids, attention_mask=mask).argmax(-1) + 1) % 5
        model.grace.edit([(p, int(w)) for p, w in zip(prompts, wanted, strict=True)])
        assert torch.equal(run(model, ids, attention_mask=mask).argmax(-1), wanted)


class TestSaving:
    def test_save_and_load(self, model, tmp_path):
        model.grace.save_pretrained(tmp_path)
        loaded = sapt_fast.load_pretrained(bare(model), tmp_path)
        assert loaded.grace.edits == model.grace.edits
        assert [answers(loaded, p) for p in PROMPTS] == [[t] for t in TARGETS]

    def test_state_dict_is_complete(self):
        model = edited()
        other = sapt_fast.patch(fresh(), GraceConfig(**TIGHT))
        other.load_state_dict(model.state_dict())
        assert other.grace.edits == model.grace.edits
        assert [answers(other, p) for p in PROMPTS] == [[t] for t in TARGETS]
        assert other.grace.edit([40, 41, 42], [24, 1]) == len(PAIRS)

    def test_a_copy_is_its_own(self):
        model = edited(pairs=PAIRS[:2])
        other = copy.deepcopy(model)
        other.grace.undo(0)
        assert answers(model, PROMPTS[0]) == [TARGETS[0]]
        assert answers(other, PROMPTS[1]) == [TARGETS[1]]
        assert answers(other, PROMPTS[0]) != [TARGETS[0]]

    @pytest.mark.parametrize("first", ["sapt", "grace"])
    def test_beside_sapt(self, first, tmp_path):
        model = fresh()
        sapt = SaptConfig(r=2, reserve_tasks=2)
        for config in (sapt, GraceConfig(**TIGHT))[:: 1 if first == "sapt" else -1]:
            sapt_fast.patch(model, config)
        model.sapt.add_task("a")
        with torch.no_grad():
            for pool in model.sapt.pools.values():
                pool.b.trainable.normal_(0, 0.2)
        model.grace.edit(PAIRS[:2])
        assert [answers(model, p) for p in PROMPTS[:2]] == [[t] for t in TARGETS[:2]]
        model.save_pretrained(tmp_path)
        loaded = sapt_fast.load_pretrained(fresh(), tmp_path)
        assert torch.equal(run(loaded, token_ids()), run(model, token_ids()))
        assert [answers(loaded, p) for p in PROMPTS[:2]] == [[t] for t in TARGETS[:2]]
        assert sapt_fast.unpatch(model, "sapt").grace.tasks == ["0", "1"]

    def test_damaged_tensors_change_nothing(self, tmp_path):
        model = edited(pairs=PAIRS[:2])
        tensors, values = model.grace.stored()
        other = sapt_fast.patch(fresh(), GraceConfig(**TIGHT))
        path = next(iter(other.grace.layers))
        for name, wrong in (
            ("log:prompt_lengths", torch.tensor([1, 1])),
            (f"{path}:radii", torch.ones(1)),
            (f"{path}:edits", torch.tensor([0, 7])),
            (f"{path}:lengths", torch.tensor([1, 1])),
            (f"{path}:keys", torch.ones(2, 3)),
            *(
                (name, torch.full_like(tensors[name], float("nan")))
                for name in (f"{path}:keys", f"{path}:radii", f"{path}:values")
            ),
        ):
            with pytest.raises(ValueError, match=r"log|rows|keys|NaN"):
                other.grace.restore({**tensors, name: wrong}, values)
            assert other.grace.tasks == []

    def test_each_edit_stores_as_many_values_as_its_target_has_tokens(self):
        model = edited(pairs=PAIRS)  # trained in one batch
        book = next(iter(model.grace.layers.values())).codebook
        lengths = [len(target) for target in TARGETS]
        assert book.lengths.tolist() == lengths
        assert book.values.shape == (sum(lengths), 32)
        model.grace.undo(1)
        assert book.values.shape == (sum(lengths) - lengths[1], 32)
        kept = [PAIRS[0], *PAIRS[2:]]
        assert [answers(model, prompt) for prompt, _ in kept] == [[target] for _, target in kept]

    @pytest.mark.parametrize("replacement", ["per_token", "replace_last"])
    def test_values_as_they_were_stored_before_load(self, replacement):
        pairs = PAIRS if replacement == "per_token" else [([5, 6, 7], [20])]
        model = edited(pairs=pairs, replacement=replacement)
        tensors, values = model.grace.stored()
        path = next(iter(model.grace.layers))
        counts = tensors.pop(f"{path}:lengths").tolist()
        parts = tensors[f"{path}:values"].split(counts)
        long = [torch.cat([p, p[-1:].expand(max(counts) - len(p), -1)]) for p in parts]
        loaded = sapt_fast.patch(fresh(), model.grace.config)
        loaded.grace.restore({**tensors, f"{path}:values": torch.stack(long)}, values)
        book = loaded.grace.layers[path].codebook
        assert book.lengths.tolist() == counts
        assert torch.equal(book.values, model.grace.layers[path].codebook.values)
        assert [answers(loaded, p) for p, _ in pairs] == [answers(model, p) for p, _ in pairs]


class TestBadInput:
    @pytest.mark.parametrize(
        ("prompt", "target", "message"),
        [
            ([], [1], "prompt: got shape"),
            ([5], [], "target: got shape"),
            ([500], [1], "prompt: got token 500"),
            ([5], [-1], "target: got token -1"),
            ([5] * 128, [1], "prompt and target: got 129 tokens"),
            ("text", [1], "tokenizer is None"),
            ([0.5], [1], "expected integers"),
            ([(PROMPTS[0], [7]), (PROMPTS[1], [8]), (PROMPTS[0], [9])], None, "edits: 0 and 2"),
            ([(PROMPTS[0], [7]), (PROMPTS[1], [])], None, r"edits\[1\]: target"),
            ("text", None, "expected a list"),
        ],
    )
    def test_is_named_and_changes_nothing(self, llama, prompt, target, message):
        before = llama.state_dict()
        with pytest.raises((ValueError, TypeError), match=message):
            llama.grace.edit(prompt, target)
        after = llama.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"rule": "half"}, "rule"),
            ({"radius": 0.0}, "radius"),
            ({"radius": float("nan")}, "radius"),
            ({"replacement": "some"}, "replacement"),
            ({"ratio": 1.5}, "ratio"),
            ({"steps": 0}, "steps"),
            ({"learning_rate": -1.0}, "learning_rate"),
            ({"rule": "coverage", "keys": "mean"}, "rule"),
            ({"target_modules": ("none",)}, "matches no module"),
        ],
    )
    def test_in_the_config(self, fields, message):
        with pytest.raises(ValueError, match=message):
            sapt_fast.patch(fresh(), GraceConfig(**fields))

    def test_a_loss_that_is_not_finite(self):
        model = edited(pairs=PAIRS[:1])
        before = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            model.lm_head.weight[50] = float("nan")
        with pytest.raises(FloatingPointError, match="loss"):
            model.grace.edit([40, 41], [24, 1])
        model.lm_head.weight.data.copy_(before["lm_head.weight"])
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())

    def test_prompts_that_cannot_be_told_apart(self):
        model = sapt_fast.patch(fresh(), GraceConfig(keys="function", radius=0.5))
        model.grace.look_up_by(lambda texts: torch.ones(len(texts), 3))
        with pytest.raises(ValueError, match="cannot be told apart"):
            model.grace.edit([([5, 6], [20]), ([7, 8], [21])])
        assert model.grace.tasks == []

    def test_undo(self, llama):
        with pytest.raises(ValueError, match="expected the number of an edit"):
            llama.grace.undo(99)

    def test_a_cache_from_before(self):
        model = sapt_fast.patch(fresh(), GraceConfig(**TIGHT))
        cache = model(input_ids=token_ids(), use_cache=True).past_key_values
        model.grace.edit(PAIRS[:1])
        with pytest.raises(RuntimeError, match="filled before the model was edited"):
            model(input_ids=token_ids()[:, :1], past_key_values=cache)

    def test_packed_rows(self, llama):
        positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]] * 3)
        with pytest.raises(RuntimeError, match="several texts in a row"):
            llama(input_ids=token_ids(), position_ids=positions)


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.thorough)])
def test_many_edits_in_a_row(count):
    """Each edited prompt gives its answer, others give the same bits, and undo takes one back."""
    chosen = random.Random(0)
    texts = {tuple(chosen.randrange(3, 60) for _ in range(8)): None for _ in range(count + 10)}
    prompts = [[*text] for text in texts][:count]
    pairs = [(p, [chosen.randrange(3, 60), 1]) for p in prompts]
    model = edited("t5", pairs=[], steps=60)
    for start in range(0, count, 100):
        model.grace.edit(pairs[start : start + 100], batch_size=100)
    wanted = [t for _, t in pairs]
    rows = model.generate(torch.tensor(prompts), max_new_tokens=4, do_sample=False).tolist()
    assert [cut(row[1:]) for row in rows] == wanted
    others = torch.tensor([[*text] for text in texts][count:])
    assert torch.equal(run(model, others), run(load_backbone(), others))
    last = torch.tensor(prompts[50:51])
    model.grace.undo(50)
    expected = run(load_backbone(), last)
    assert torch.equal(run(model, last), expected)


def test_gradient_checkpointing_keeps_the_edits():
    model = edited("llama", pairs=PAIRS[:2])
    sapt_fast.patch(model, SaptConfig(r=2, reserve_tasks=2))
    model.sapt.add_task("a")
    ids = torch.tensor([PROMPTS[0] + TARGETS[0]])
    labels = ids.clone()
    labels[:, : len(PROMPTS[0])] = -100
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
            model.train()
        model(input_ids=ids, labels=labels).loss.backward()
        found = [p.grad.clone() for p in model.sapt.trainable_parameters() if p.grad is not None]
        gradients.append(found)
        model.zero_grad()
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)
