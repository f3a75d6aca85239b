"""Keys by a trained projection."""

import pytest
import torch
from edited_models import PAIRS, answer, patched

from sapt_fast.methods.edits.projector import ProjectedKeys

SUBJECTS = range(10, 40)
WORDINGS = ((1, 2, 3), (4, 5, 6), (2, 5, 7), (1, 6, 8))


def counts(texts):
    """How often each token occurs: two wordings of a question differ more than two subjects."""
    return torch.stack([torch.bincount(text, minlength=97).float() for text in texts])


def asked(subject, wordings):
    return [[*words, subject] for words in wordings]


def trained(**fields):
    groups = [asked(subject, WORDINGS[:3]) for subject in SUBJECTS[:20]]
    options = {"width": 32, "steps": 60, "learning_rate": 1e-2, **fields}
    return ProjectedKeys(counts, **options).fit(groups, others=[[9, 3, s] for s in SUBJECTS[:5]])


def test_paraphrases_of_other_subjects_are_nearest_to_their_own():
    keys = trained()
    prompts = [torch.tensor(asked(subject, WORDINGS[:1])[0]) for subject in SUBJECTS[20:]]
    other = [torch.tensor(asked(subject, WORDINGS[1:2])[0]) for subject in SUBJECTS[20:]]
    before = torch.cdist(counts(other), counts(prompts)) + 10 * torch.eye(10)
    assert (before.min(1).values < 10).all()  # without the map another subject is not farther
    distance = torch.cdist(keys(other), keys(prompts))
    assert distance.argmin(1).tolist() == list(range(10))
    own = distance.diagonal()
    assert own.max() < (distance + 10 * torch.eye(10)).min()
    assert keys.loss < 3.0


def test_the_same_seed_gives_the_same_map(tmp_path):
    first, second, other = trained(steps=3), trained(steps=3), trained(steps=3, seed=1)
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)
    first.save(tmp_path / "keys")
    loaded = ProjectedKeys(counts, width=32).load(tmp_path / "keys")
    texts = [torch.tensor([1, 2, 3, 50])]
    assert torch.equal(loaded(texts), first(texts))
    with pytest.raises(ValueError, match=r"expected projected keys with weight \[16, D\]"):
        ProjectedKeys(counts, width=16).load(tmp_path / "keys")
    prompts = [torch.tensor([1, 2, 5, 5])]
    with torch.autocast("cpu", torch.bfloat16):
        found = trained()(prompts)
    assert found.dtype == torch.float32
    assert torch.equal(found, trained()(prompts))


def test_an_edit_acts_on_a_paraphrase():
    model = patched(keys="function", radius=0.7)
    model.grace.look_up_by(trained())
    model.grace.edit([1, 2, 3, 15], PAIRS[0][1])
    assert answer(model, [1, 2, 3, 15]) == PAIRS[0][1]
    assert model.grace.which([4, 5, 6, 15]).acts
    assert not model.grace.which([1, 2, 3, 16]).acts


@pytest.mark.parametrize(
    ("groups", "others", "message"),
    [
        ([[[1], [2]]], [], "groups: got 1, expected at least two"),
        ([[[1], [2]], [[3]]], [], r"groups\[1\]: got 1 prompts"),
        ([[[1], [2]], [[3], [4]]], [[2]], r"got the prompt \[2\] in two places"),
        ([[[1], [2]], [[3], [96]]], [], "features: got NaN or infinity for prompt 3"),
    ],
)
def test_bad_groups_are_named(groups, others, message):
    def features(texts):
        return counts(texts).where(counts(texts)[:, 96:] == 0, float("nan"))

    keys = ProjectedKeys(features, width=4)
    with pytest.raises(ValueError, match=message):
        keys.fit(groups, others)
    assert keys.weight is None
    with pytest.raises(RuntimeError, match=r"call fit\(groups\)"):
        keys([torch.tensor([1])])
