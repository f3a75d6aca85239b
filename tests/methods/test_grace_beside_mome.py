"""Edits and memorised facts on one model: each answers its prompts, and each can be taken off."""

import copy

import pytest
import torch
from edited_models import answer
from tiny_models import run, tiny, token_ids

import sapt_fast
from sapt_fast.methods.grace import GraceConfig
from sapt_fast.methods.mome import MomeConfig

FACTS = [([5, 6, 7, 8], [20, 30, 1]), ([9, 10, 11], [21, 31, 1])]
EDITS = [([12, 13, 14, 15, 16], [22, 32, 1]), ([17, 18], [23, 33, 1])]
MOME = MomeConfig(num_experts=64, k=4, components=6, threshold=0.9, learning_rate=0.1)
GRACE = GraceConfig(radius=1e-3, replacement="per_token", margin=1.0)


def fresh():
    return tiny("llama", initializer_range=0.3)


def fit_router(model):
    generator = torch.Generator().manual_seed(0)
    model.mome.fit_router([torch.randint(3, 60, (5,), generator=generator) for _ in range(20)])


@pytest.fixture(scope="module", params=["mome first", "grace first"])
def both(request):
    model = fresh()
    for config in (MOME, GRACE)[:: 1 if request.param == "mome first" else -1]:
        sapt_fast.patch(model, config)
    fit_router(model)
    if request.param == "mome first":
        assert model.mome.memorise(FACTS, until=0.3).unfitted == []
    model.grace.edit(EDITS)
    if request.param == "grace first":
        assert model.mome.memorise(FACTS, until=0.3).unfitted == []
    return model


def answers(model, pairs, **options):
    return [answer(model, prompt, **options) for prompt, _ in pairs]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_both_answer(both, options):
    assert answers(both, FACTS + EDITS, **options) == [target for _, target in FACTS + EDITS]


def test_both_in_a_padded_batch(both):
    prompts = [prompt for prompt, _ in FACTS + EDITS]
    ids = torch.tensor([[0] * (5 - len(prompt)) + prompt for prompt in prompts])
    rows = both.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=3, do_sample=False)
    assert rows[:, 5:].tolist() == [target for _, target in FACTS + EDITS]


def test_other_prompts_give_the_same_bits(both):
    ids = token_ids() % 60 + 3
    assert torch.equal(run(both, ids), run(fresh(), ids))


def test_one_folder_holds_both(both, tmp_path):
    both.save_pretrained(tmp_path)
    loaded = sapt_fast.load_pretrained(fresh(), tmp_path)
    assert answers(loaded, FACTS + EDITS) == [target for _, target in FACTS + EDITS]
    for prompt, _ in FACTS + EDITS:
        assert torch.equal(run(loaded, torch.tensor([prompt])), run(both, torch.tensor([prompt])))


@pytest.mark.parametrize("gone", ["mome", "grace"])
def test_one_is_taken_off(both, gone):
    model = sapt_fast.unpatch(copy.deepcopy(both), gone)
    kept, lost = (EDITS, FACTS) if gone == "mome" else (FACTS, EDITS)
    assert answers(model, kept) == [target for _, target in kept]
    assert answers(model, lost) == answers(fresh(), lost)
    sapt_fast.unpatch(model)
    assert answers(model, kept) == answers(fresh(), kept)
    assert vars(model).keys() == vars(fresh()).keys()


def test_a_memorised_fact_is_edited_and_the_edit_undone(both):
    model, (prompt, target) = copy.deepcopy(both), FACTS[0]
    before = run(model, torch.tensor([prompt]))
    edit = model.grace.edit(prompt, [24, 34, 1])
    assert answer(model, prompt) == [24, 34, 1]
    assert answers(model, FACTS[1:] + EDITS) == [t for _, t in FACTS[1:] + EDITS]
    model.grace.undo(edit)
    assert answer(model, prompt) == target
    assert torch.equal(run(model, torch.tensor([prompt])), before)
