"""Countries with names near to each other, looked up by a projection of character trigrams."""

import pytest
import torch

from sapt_fast.methods.edits.projector import ProjectedKeys

WORDINGS = (
    "What is the capital of {}?",
    "Which city is {}'s seat of government?",
    "Name the chief town of {}.",
)
OTHERS = (
    "Peru Chile Brazil Canada Mexico France Spain Italy Poland Norway Sweden Finland Denmark India "
    "China Japan Nepal Egypt Kenya Ghana Togo Chad Angola Cuba Haiti Fiji Samoa Tonga Laos Oman "
    "Dominica Austria Australia Iran Iraq Mali Malawi Gambia Zambia Ireland Iceland Slovakia"
)
TWO_WORDS = ("Dominican Republic", "American Samoa", "North Korea", "South Korea")
NEAR = [
    ("Nigeria", "Niger"),
    ("Guinea", "Guinea-Bissau"),
    ("Guinea-Bissau", "Guinea"),
    ("Sudan", "South Sudan"),
    ("South Sudan", "Sudan"),
]


def tokens(text):
    return torch.tensor([*text.encode()])


def trigrams(texts):
    """How often each trigram occurs, counted in 512 buckets."""
    rows = []
    for text in texts:
        a, b, c = text[:-2], text[1:-1], text[2:]
        rows.append(torch.bincount((a * 961 + b * 31 + c) % 512, minlength=512).float())
    return torch.nn.functional.normalize(torch.stack(rows), dim=1)


def asked(name, wordings=WORDINGS):
    return [tokens(wording.format(name)) for wording in wordings]


def distances(keys, name, near):
    """Those of a paraphrase, and of the near name in the words of the edit, to the edit's key."""
    own, paraphrase, other = keys([*asked(name, WORDINGS[:2]), *asked(near, WORDINGS[:1])])
    return float((own - paraphrase).norm()), float((own - other).norm())


@pytest.fixture(scope="module")
def keys():
    found = ProjectedKeys(trigrams, width=128, steps=60, learning_rate=1e-2)
    return found.fit(
        [[text.tolist() for text in asked(name)] for name in (*OTHERS.split(), *TWO_WORDS)]
    )


@pytest.mark.parametrize(("name", "near"), NEAR)
def test_a_projection_tells_near_names_from_paraphrases(keys, name, near):
    paraphrase, other = distances(trigrams, name, near)
    assert other < paraphrase  # no radius separates them without the projection
    paraphrase, other = distances(keys, name, near)
    assert paraphrase < other
