"""Each metric against examples worked out by hand."""

import math

import pytest
import torch
from tiny_models import tiny

from sapt_fast.demo.backbone import load_backbone
from sapt_fast.editing.answers import Examiner, matches
from sapt_fast.editing.data import EditRow, Probe
from sapt_fast.editing.metrics import mean, measure, questions, untouched

A, B, C, D = (5,), (6,), (7,), (8,)  # prompts
X, Y, Z = (20, 1), (21, 1), (22, 1)  # answers


class Scripted:
    """Answers as it is told."""

    def __init__(self, told):
        self.told = told

    def answers(self, prompts):
        return [self.told[prompt] for prompt in prompts]

    def forced(self, pairs):
        return [0.25 if self.told[prompt] != target else 1.0 for prompt, target in pairs]


def test_what_is_asked():
    rows = [
        EditRow(A, X, paraphrases=(C,), locality=(Probe(B), Probe(D))),
        EditRow(B, Y, locality=(Probe(D), Probe((9,), Z))),
        EditRow(A, Z, paraphrases=(C, B)),
    ]
    upstream = [Probe(C), Probe(A), Probe((10,), X)]
    before = {B: X, C: X, D: Y, A: X}
    assert untouched(rows, upstream) == [C, A, B, D]
    asked = questions(rows, upstream, before)
    assert asked.retention == [(A, Z), (B, Y)], "the last target of a prompt counts"
    assert asked.upstream == [(C, X), ((10,), X)], "an edited prompt is not untouched"
    assert asked.paraphrase == [(C, Z)]
    assert asked.locality == [(D, Y), ((9,), Z)], "each prompt counts once"
    earlier = questions(rows[:1], upstream, before)
    assert earlier.retention == [(A, X)]
    assert earlier.locality == [(B, X), (D, Y)]


def test_groups_count_beside_the_metric():
    rows = [EditRow(A, X, locality=(Probe(B, group="near"), Probe(C)))]
    upstream = [Probe(D, group="near"), Probe(A, group="edited"), Probe((9,), Z)]
    asked = questions(rows, upstream, {B: X, C: X, D: Y})
    assert asked.groups == {"near": [(D, Y), (B, X)], "edited": []}
    told = {A: X, B: X, C: Y, D: Z, (9,): Z}
    found = measure(Scripted(told), asked, teacher_forcing=False)
    assert found["groups"] == {"near": 0.5, "edited": None}
    assert found["generated"]["upstream"] == found["generated"]["locality"] == 0.5
    assert found["forced"]["upstream"] is None


def test_known_answers_are_not_asked_again():
    asked = questions([], [Probe(A), Probe(B, Z)], {A: X})
    found = measure(Scripted({B: Z}), asked, teacher_forcing=False, known={A: X})
    assert found["generated"]["upstream"] == 1.0


def test_rates():
    rows = [EditRow(A, X), EditRow(B, Y), EditRow(C, X), EditRow(D, X, paraphrases=((9,),))]
    told = {A: X, B: Z, C: Y, D: X, (9,): X}
    found = measure(Scripted(told), questions(rows, [], {}))
    assert found["generated"] == {
        "retention": 0.5, "upstream": None, "paraphrase": 1.0, "locality": None,
    }  # fmt: skip
    assert found["forced"]["retention"] == (1 + 0.25 + 0.25 + 1) / 4
    assert mean([]) is None


@pytest.mark.parametrize(
    ("answer", "right"),
    [((20, 21, 1), True), ((20, 1), False), ((20, 21), False), ((20, 21, 22), False), ((), False)],
)
def test_an_answer_is_right_only_as_a_whole(answer, right):
    assert matches(answer, (20, 21, 1)) is right


def greedy(model, prompt, tokens):
    """Without a cache, one text at a time."""
    answer = []
    while len(answer) < tokens and answer[-1:] != [1]:
        if model.config.is_encoder_decoder:
            given = {"input_ids": [prompt], "decoder_input_ids": [[0, *answer]]}
        else:
            given = {"input_ids": [[*prompt, *answer]]}
        given = {name: torch.tensor(rows) for name, rows in given.items()}
        answer.append(model(**given, use_cache=False).logits[0, -1].argmax().item())
    return tuple(answer)


def made(family):
    return load_backbone() if family == "t5" else tiny(family, initializer_range=0.3)


PROMPTS = [(5, 6, 7), (8, 9), (10, 11, 12), (13, 14), (15, 16, 17, 18)]


@pytest.mark.parametrize("family", ["t5", "llama", "gpt2"])
def test_answers_are_greedy(family):
    model = made(family)
    model.generation_config.repetition_penalty = 50.0  # of the model's own; must not act
    model.generation_config.do_sample = True
    examiner = Examiner(model, 2, 6)
    with torch.no_grad():
        assert examiner.answers(PROMPTS) == [greedy(model, prompt, 6) for prompt in PROMPTS]


@pytest.mark.parametrize("family", ["t5", "llama", "gpt2"])
def test_teacher_forcing_by_hand(family):
    model = made(family)
    targets = [greedy(model, prompt, 3) for prompt in PROMPTS]
    wrong = [(target[0], 40, *target[2:]) for target in targets]
    examiner = Examiner(model, 2, 6)
    pairs = list(zip(PROMPTS, targets, strict=True))
    assert examiner.forced(pairs) == [1.0] * len(pairs)
    shares = examiner.forced(list(zip(PROMPTS, wrong, strict=True)))
    for prompt, target, share in zip(PROMPTS, wrong, shares, strict=True):
        hits = 0
        for place, token in enumerate(target):
            if model.config.is_encoder_decoder:
                given = {"input_ids": [prompt], "decoder_input_ids": [[0, *target[:place]]]}
            else:
                given = {"input_ids": [[*prompt, *target[:place]]]}
            given = {name: torch.tensor(rows) for name, rows in given.items()}
            with torch.no_grad():
                hits += model(**given).logits[0, -1].argmax().item() == token
        assert share == pytest.approx(hits / len(target))
        assert share < 1


def test_a_classifier():
    model = tiny("bert")
    with torch.no_grad():
        expected = [(model(torch.tensor([p])).logits.argmax().item(),) for p in PROMPTS]
    examiner = Examiner(model, 2, 6)
    assert examiner.answers(PROMPTS) == expected
    wrong = [((c + 1) % 5,) for (c,) in expected]
    assert examiner.forced(list(zip(PROMPTS, expected, strict=True))) == [1.0] * 5
    assert examiner.forced(list(zip(PROMPTS, wrong, strict=True))) == [0.0] * 5


def test_perplexity_by_hand():
    model, text = tiny("llama", initializer_range=0.3), tuple(range(3, 14))
    losses = []
    for start, end in ((0, 5), (5, 10)):  # the last window has one token, which nothing predicts
        part = torch.tensor([text[start:end]])
        with torch.no_grad():
            logs = model(part).logits[0].log_softmax(-1)
        losses += [-logs[i, part[0, i + 1]].item() for i in range(end - start - 1)]
    expected = math.exp(sum(losses) / len(losses))
    assert Examiner(model, 4, 6).perplexity(text, 5) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="not decoder-only"):
        Examiner(load_backbone(), 4, 6).perplexity(text, 5)
    with pytest.raises(ValueError, match="got 1 tokens"):
        Examiner(model, 4, 6).perplexity(text[:1], 5)
