"""Routers: the loss, the decisions, the questions, training, saved folders."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from tiny_models import tiny
from tiny_tasks import word_tokenizer

from sapt_fast.generation.router.classifier import ROUTER_FILE, ClassifierRouter
from sapt_fast.generation.router.confusion import Confusion, choose_threshold
from sapt_fast.generation.router.decision import Router
from sapt_fast.generation.router.loss import router_loss
from sapt_fast.generation.router.prompt import PromptRouter
from sapt_fast.generation.router.questions import (
    SPLITS,
    LabelledQuestion,
    packaged_questions,
    read_questions,
    split_questions,
)
from sapt_fast.generation.router.training import RouterSettings, train_router

ROWS = [
    LabelledQuestion(f"{word} {('of', 'a', 'b')[i % 3]} {colour}", label)
    for i, word in enumerate(("pick", "choose", "word", "north", "south", "a"))
    for label, colour in enumerate(("red", "blue"))
]


def router(threshold: float = 0.5, **config) -> ClassifierRouter:
    values = {"initializer_range": 0.5, **config}
    model = tiny("bert", vocab_size=16, num_labels=2, **values)
    return ClassifierRouter(model, word_tokenizer(), threshold)


# --- the loss ---


def by_the_formula(logits, labels, tversky=0.75, a=0.7, b=0.3, smoothing=0.9, weights=(1.0, 1.0)):
    """The loss of SoT-R, sample by sample, in Python's floats."""
    entropy = total = common = positives = targets = 0.0
    for (zero, one), label in zip(logits.tolist(), labels.tolist(), strict=True):
        p = 1 / (1 + math.exp(zero - one))
        entropy -= weights[label] * math.log(p if label else 1 - p)
        total += weights[label]
        t = smoothing * label
        common, positives, targets = common + min(p, t), positives + p, targets + t
    weighted = common + a * (positives - common) + b * (targets - common)
    return (1 - tversky) * entropy / total + tversky * (1 - common / weighted)


@pytest.mark.parametrize("labels", [[0, 1, 1, 0, 1], [0] * 5, [1] * 5, [1]])
def test_the_loss_is_that_of_its_formula(labels):
    torch.manual_seed(0)
    wanted = torch.tensor(labels)
    logits = torch.randn(len(labels), 2, dtype=torch.float64, requires_grad=True)
    for given, weights in (({}, (1.0, 1.0)), ({"tversky": 0.2}, (0.5, 3.0))):
        found = router_loss(
            logits, wanted, class_weights=torch.tensor(weights, dtype=torch.float64), **given
        )
        expected = by_the_formula(logits, wanted, weights=weights, **given)
        assert found.item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: router_loss(x, wanted), logits)


@pytest.mark.parametrize("labels", [[0, 0], [1, 1], [0, 1]])
@pytest.mark.parametrize("size", [90.0, 1e4])
def test_the_loss_stays_finite_where_probabilities_underflow(labels, size):
    for sign in (1, -1):
        logits = torch.tensor([[size, -size]] * 2).mul(sign).requires_grad_()
        loss = router_loss(logits, torch.tensor(labels))
        loss.backward()
        assert loss.isfinite()
        assert logits.grad.isfinite().all()


def test_half_precision_is_computed_in_float32_and_bad_shapes_are_named():
    logits, labels = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    half = logits.bfloat16()
    assert torch.equal(router_loss(half, labels), router_loss(half.float(), labels))
    for shape, count in (((0, 2), 0), ((4, 3), 4), ((4, 2), 3)):
        with pytest.raises(ValueError, match=r"(logits|labels): got \["):
            router_loss(torch.zeros(shape), torch.zeros(count, dtype=torch.int64))


# --- by prompt ---


@pytest.mark.parametrize(
    ("reply", "skeleton"),
    [("A", True), (" a.\n", True), ("**(A)**", True), ("B", False), ("C.", False)],
)
def test_a_reply_of_one_letter_decides(reply, skeleton):
    decision = PromptRouter(lambda prompt: reply).decide("How {can} I sleep?")
    assert decision.skeleton is skeleton
    assert decision.reason.startswith("the model says")


@pytest.mark.parametrize("reply", ["", "A or B", "As a model, I", "Answer: A", "D", "AA", "\u0410"])
def test_any_other_reply_is_quoted_and_means_ordinary_decoding(reply):
    decision = PromptRouter(lambda prompt: reply).decide("Why?")
    assert not decision.skeleton
    assert decision.reason == f"the model's reply is not A, B or C: {reply!r}"


def test_the_prompt_holds_the_question_and_blank_questions_are_named():
    asked = []
    assert isinstance(PromptRouter(asked.append), Router)
    PromptRouter(lambda prompt: asked.append(prompt) or "A").decide("  {x} \\1 %s ")
    assert "Question: {x} \\1 %s\n" in asked[0]
    for one in (PromptRouter(asked.append), router()):
        for question, error in ((" \n", ValueError), (None, TypeError)):
            with pytest.raises(error, match="question: got"):
                one.decide(question)
    assert len(asked) == 1


# --- by classifier ---


def test_a_score_above_the_threshold_decides_and_padding_does_not():
    one = router()
    questions = [row.question for row in ROWS] + ["red"]
    together, alone = one.scores(questions, 5), [one.scores([q])[0] for q in questions]
    assert together == pytest.approx(alone, abs=1e-5)
    score = alone[-1]
    one.threshold = score
    assert not one.decide("red").skeleton
    one.threshold = math.nextafter(score, 0)
    one.model.train()
    decision = one.decide("red")
    assert (decision.skeleton, decision.score) == (True, score)


def test_it_is_saved_and_loaded_and_damage_is_named(tmp_path):
    one, folder = router(0.25), tmp_path / "router"
    one.save_pretrained(folder, {"any": 1})
    (folder / "notes.txt").write_text("mine")
    one.threshold = 0.75
    one.save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir() if "report" in p.name or "notes" in p.name) == [
        "notes.txt"
    ]
    again = ClassifierRouter.from_pretrained(folder)
    questions = [row.question for row in ROWS]
    assert again.scores(questions) == one.scores(questions)
    assert (again.threshold, again.max_length) == (0.75, one.max_length)

    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"model.safetensors: is damaged"):
        ClassifierRouter.from_pretrained(folder)
    weights.write_bytes(content)
    stored = json.loads((folder / ROUTER_FILE).read_text())
    for change, message in (
        ({"version": 2}, "version: got 2"),
        ({"threshold": 1.5}, "threshold: got 1.5"),
        ({"files": {"../x": ""}}, "names of files"),
        ({"files": {}}, "expected digests"),
    ):
        (folder / ROUTER_FILE).write_text(json.dumps({**stored, **change}))
        with pytest.raises(ValueError, match=message):
            ClassifierRouter.from_pretrained(folder)
    for path in (tmp_path / "missing", weights, tmp_path):
        with pytest.raises(FileNotFoundError, match="router: got"):
            ClassifierRouter.from_pretrained(path)


def test_a_model_that_is_no_router_is_named():
    with pytest.raises(ValueError, match="model: got 5 labels, expected 2"):
        ClassifierRouter(tiny("bert"), word_tokenizer())
    with pytest.raises(ValueError, match="threshold: got nan"):
        router(math.nan)
    one = router()
    one.model.classifier.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="returns NaN"):
        one.decide("red")


def test_the_threshold_is_the_lowest_with_the_rate_of_false_positives():
    draws = random.Random(0)
    for _ in range(200):
        scores = [draws.randrange(9) / 8 for _ in range(draws.randrange(1, 12))]
        labels = [draws.randrange(2) for _ in scores[1:]] + [0]
        rate = draws.choice((0.0, 0.1, 0.25, 0.5, 1.0))
        found = choose_threshold(scores, labels, rate)

        negatives = [s for s, label in zip(scores, labels, strict=True) if not label]
        shares = {t: sum(s > t for s in negatives) / len(negatives) for t in {0.0, *scores}}
        lowest = min(t for t, share in shares.items() if share <= rate)
        above = min((score for score in scores if score > lowest), default=1.0)
        assert found == (0.0 if rate == 1 else (lowest + above) / 2)
        assert Confusion.of(scores, labels, found).rates()["false_positive_rate"] <= rate
    with pytest.raises(ValueError, match="there is none"):
        choose_threshold([0.5], [1], 0.1)


# --- questions ---


def test_the_packaged_questions_are_varied_and_their_parts_share_nothing():
    rows = packaged_questions()
    parts = split_questions(rows)
    assert len(rows) == sum(map(len, parts.values())) == 613
    assert len({row.language for row in rows}) == 16
    for part in parts.values():
        assert 0.4 < sum(row.label for row in part) / len(part) < 0.6
    words = {
        name: [set(re.findall(r"\w+", row.question.lower())) for row in part]
        for name, part in parts.items()
    }
    for one in words["test"]:
        for other in words["train"] + words["dev"]:
            assert len(one & other) / len(one | other) < 0.75


def test_questions_without_a_split_are_divided_by_label():
    rows = [LabelledQuestion(str(i), int(i < 40)) for i in range(100)]
    parts = split_questions(rows, 3)
    assert [[sum(r.label == x for r in parts[n]) for x in (1, 0)] for n in SPLITS] == [
        [28, 42], [6, 9], [6, 9],
    ]  # fmt: skip
    assert parts == split_questions(rows, 3) != split_questions(rows, 4)
    divided = [row for part in parts.values() for row in part]
    assert sorted(divided, key=lambda row: int(row.question)) == rows
    with pytest.raises(ValueError, match=r"labels \[0\] in the questions for training"):
        split_questions(rows[50:])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b"", "has no questions"),
        (b"[]", "line 1: expected an object with question and label"),
        (b'{"question": "a"}', "expected an object"),
        (b'{"question": " ", "label": 1}', "question: got ' '"),
        (b'\n{"question": "a", "label": true}', "line 2: label: got 'True'"),
        (b'{"question": "a", "label": 2}', "label: got '2'"),
        (b'{"question": "a", "label": 1, "split": "x"}', "split: got 'x'"),
        (b'{"question": "a", "label": 1}\n{"question": "a", "label": 0}', "question of line 1"),
        (
            b'{"question": "a", "label": 1}\n{"question": "b", "label": 0, "split": "dev"}',
            "some questions have a split",
        ),
        (b"{", "line 1: broken JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, lines, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_questions(path)


# --- training ---


def test_training_learns_repeats_itself_and_leaves_the_generator_alone():
    settings = RouterSettings(epochs=12, learning_rate=3e-3, batch_size=4, seed=1)
    held_out = ["of red", "south blue", "blue", "pick word red"]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trained = []
    for _ in range(2):
        one = router(hidden_dropout_prob=0.1, initializer_range=0.1)
        torch.set_rng_state(before)
        trained.append(train_router(one.model, one.tokenizer, ROWS, settings))
        assert torch.equal(torch.get_rng_state(), before)
    first, second = (one.scores(held_out) for one in trained)
    assert first == second
    assert [score > 0.5 for score in first] == [False, True, True, False]
    assert not trained[0].model.training


def test_rare_labels_are_balanced_and_bad_settings_are_named():
    one = router()
    rows = [*ROWS[::2], ROWS[1]]
    settings = RouterSettings(epochs=1, learning_rate=1e-9, batch_size=16, balance=True, tversky=0)
    losses = []

    def seen(logits, labels, **given):
        losses.append(given["class_weights"].tolist())
        return router_loss(logits, labels, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sapt_fast.generation.router.training.router_loss", seen)
        train_router(one.model, one.tokenizer, rows, settings)
    assert losses == [[pytest.approx(7 / 12), pytest.approx(7 / 2)]]
    with pytest.raises(ValueError, match="balance: got the label 0 only"):
        train_router(one.model, one.tokenizer, ROWS[::2], settings)
    with pytest.raises(ValueError, match="rows: got no questions"):
        train_router(one.model, one.tokenizer, [])
    with pytest.raises(ValueError, match="learning_rate: got 0"):
        RouterSettings(learning_rate=0)


def test_the_files_are_packaged():
    assert (Path(__file__).parents[2] / "MANIFEST.in").read_text().count("*.jsonl") == 1
