"""Pseudo-samples: rows, what is usable, the base model, interruption, and a run that uses them."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_tasks import (
    make_encoder,
    make_model,
    make_settings,
    make_tasks,
    word_tasks,
    word_tokenizer,
)

from sapt_fast.continual.data.rows import TaskData, read_pseudo_samples
from sapt_fast.continual.run import loop
from sapt_fast.continual.run.loop import run_continual
from sapt_fast.continual.run.pseudo_samples import PseudoSample, _Generator, make_pseudo_samples
from sapt_fast.continual.settings import ContinualSettings, GeneratorSettings
from sapt_fast.demo.tasks import CharTokenizer

TOKENIZER = CharTokenizer()
QUICK = {
    "steps": 40, "batch_size": 8, "learning_rate": 1e-2, "lora_dropout": 0.0, "top_k": 2,
    "repetition_penalty": 1.0, "max_length": 24, "share": 0.5,
}  # fmt: skip
LAYERS = {
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def task(rows: int = 20, same: bool = True) -> TaskData:
    """A task whose rows are all one, or those of the demo."""
    made = make_tasks(1, train=rows)[0]
    return replace(made, train=(made.train[0],) * rows) if same else made


def generator(kind: str, **options: Any) -> _Generator:
    return _Generator(make_model(kind), TOKENIZER, GeneratorSettings(**options), None, "0/x")


def make(kind: str, folder: Path, given: TaskData, model: Any = None, **options: Any) -> Path:
    made = GeneratorSettings(**{**QUICK, **options})
    model = make_model(kind) if model is None else model
    return make_pseudo_samples(
        model, TOKENIZER, given, folder, made, target_modules=LAYERS[kind], progress=False
    )


# --- rows and samples ---


@pytest.mark.parametrize("answers", [False, True])
def test_rows_are_instruction_marker_and_input(answers: bool) -> None:
    given = task(1)
    ids = lambda text: TOKENIZER.encode(text, add_special_tokens=False)  # noqa: E731
    row = given.train[0]
    size = TOKENIZER.vocab_size
    gen, inp, ans, end = size, size + 1, size + 2, TOKENIZER.eos_token_id
    tail = [ans, *ids(row.output)] if answers else []
    target = [*ids(given.definition), inp, *ids(row.input), *tail, end]
    (seq2seq,) = generator("t5", answers=answers).rows(given)
    assert seq2seq == {"input_ids": [gen, end], "labels": target}
    (causal,) = generator("llama", answers=answers).rows(given)
    assert causal == {"input_ids": [gen, *target], "labels": [-100, *target]}
    (short,) = generator("t5", answers=answers, max_length=len(target) - 2).rows(given)
    cut = [*ids(given.definition), inp, *ids(row.input)[:-2], *tail, end]
    assert short["labels"] == cut


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("AB|cd.", False, PseudoSample("AB", "cd", "")),
        ("|cd", False, PseudoSample("", "cd", "")),
        ("AB|cd|e.f", False, PseudoSample("AB", "cde", "")),
        ("ABcd.", False, None),
        ("AB|.cd", False, None),
        ("AB|cd>e.", True, PseudoSample("AB", "cd", "e")),
        ("AB|cd.", True, None),
        ("AB|cd>.", True, None),
        ("AB>e|cd.", True, None),
    ],
)
def test_what_is_usable(text: str, answers: bool, expected: PseudoSample | None) -> None:
    made = generator("t5", answers=answers)
    special = {"|": made.inp, ">": made.ans, ".": TOKENIZER.eos_token_id}
    ids = [special.get(c) or TOKENIZER.encode(c, add_special_tokens=False)[0] for c in text]
    assert made.parse([*ids, TOKENIZER.pad_token_id]) == expected


@pytest.mark.parametrize("kind", ["t5", pytest.param("llama", marks=pytest.mark.thorough)])
def test_a_generator_writes_what_it_learned_and_leaves_the_model_alone(
    kind: str, tmp_path: Path
) -> None:
    model, given = make_model(kind), task()
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    modules = {name: type(module) for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    config, attributes = model.config.to_dict(), set(vars(model))
    random_state = torch.get_rng_state()
    path = make(kind, tmp_path, given, model, answers=True, steps=100)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.grad is None
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert model.config.to_dict() == config
    assert set(vars(model)) == attributes
    assert model.get_input_embeddings().num_embeddings == TOKENIZER.vocab_size

    assert path == tmp_path / given.benchmark / given.name / "train.json"
    definition, rows = read_pseudo_samples(tmp_path, given.benchmark, given.name)
    assert 0 < len(rows) <= 10  # share 0.5 of 20
    if kind == "t5":  # so small a decoder alone does not learn the row by heart so soon
        learned = given.train[0]
        assert definition == given.definition
        assert (learned.input, learned.output) in {(row.input, row.output) for row in rows}
    assert json.loads(path.read_text())["Source"] == [f"generated by {type(model).__name__}"]
    assert [p.name for p in tmp_path.iterdir() if p.name != given.benchmark] == [".generators"]
    assert not list((tmp_path / ".generators").iterdir())


def test_nothing_usable_keeps_one_real_row_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = task(same=False)
    with caplog.at_level(logging.WARNING):
        path = make("t5", tmp_path, given, steps=1, max_length=2)
    assert "made no usable sample; one training row is kept instead of 10" in caplog.text
    (instance,) = json.loads(path.read_text())["Instances"]
    assert instance["input"] in {row.input for row in given.train}
    assert json.loads(path.read_text())["Source"] == ["a training row"]


def test_interrupted_in_training_and_in_sampling_it_comes_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, options = task(40, same=False), {"steps": 20, "tries": 8, "batch_size": 4}
    expected = make("t5", tmp_path / "whole", given, **options).read_text()
    folder = tmp_path / "cut"
    own_step, own_draw, calls = transformers.Trainer.training_step, _Generator._draw, {}

    def dies(name: str, own: Any, at: int) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            if calls[name] == at:
                raise InterruptedError(name)
            return own(*args, **kwargs)

        return called

    monkeypatch.setattr(transformers.Trainer, "training_step", dies("step", own_step, 12))
    monkeypatch.setattr(_Generator, "_draw", dies("draw", own_draw, 2))
    with pytest.raises(InterruptedError, match="step"):
        make("t5", folder, given, **options)
    assert (folder / ".generators" / given.name / "checkpoint-10").is_dir()
    with pytest.raises(InterruptedError, match="draw"):
        make("t5", folder, given, **options)
    assert calls == {"step": 12 + 10, "draw": 2}
    torch.manual_seed(99)
    assert make("t5", folder, given, **options).read_text() == expected
    assert calls["step"] == 22
    draws = calls["draw"]
    make("t5", folder, given, **options)  # it is there
    assert calls["draw"] == draws


@pytest.mark.thorough
def test_a_run_killed_in_generating_comes_to_the_same(tmp_path: Path) -> None:
    tests, name = Path(__file__).parents[1], "t5-sapt-generated"
    process = subprocess.run(
        [sys.executable, str(tests / "killed_run.py"), str(tmp_path), name, "generator", "sample"],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), *sys.path])},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    # What is left by SIGKILL in the 13th of 40 steps, and in drawing the second batch.
    assert json.loads(process.stdout.splitlines()[-1])[name] == {
        "uninterrupted": 0,
        "generator": [-signal.SIGKILL, ["checkpoint-12"], 0],
        "sample": [-signal.SIGKILL, ["checkpoint-40", "samples.json"], 0],
    }, process.stderr
    whole, *resumed = (
        tmp_path / name / place for place in ("uninterrupted", "generator", "sample")
    )
    (samples,) = whole.glob("pseudo_samples/*/*/train.json")
    content = json.loads(samples.read_text())
    assert content["Source"] == ["generated by T5ForConditionalGeneration"]
    assert len(content["Instances"]) > 4  # of the second batch too
    for folder in resumed:
        for file in (samples.relative_to(whole), "weights.safetensors"):
            assert (folder / file).read_bytes() == (whole / file).read_bytes(), (folder.name, file)


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="BertModel, which does not generate"):
        make("t5", tmp_path, task(), make_encoder())
    with pytest.raises(ValueError, match="has no training rows"):
        make("t5", tmp_path, replace(task(), train=()))
    for name, value in (("steps", 0), ("share", 0.0), ("lora_dropout", 1.0), ("top_k", 2.5)):
        with pytest.raises(ValueError, match=rf"generator\.{name}: got {value}"):
            GeneratorSettings(**{name: value})
    with pytest.raises(ValueError, match=r"generator: got unknown fields \['step'\]"):
        ContinualSettings.of(generator={"step": 3})
    settings = make_settings(replay="generated")
    with pytest.raises(ValueError, match="replay: got 'generated', but BertModel"):
        loop._Run(make_encoder(), word_tokenizer(), word_tasks(), settings)


def test_released_settings() -> None:
    made = ContinualSettings().generator
    assert (made.r, made.lora_alpha, made.lora_dropout, made.learning_rate) == (8, 32, 0.1, 1e-3)
    assert (made.steps, made.batch_size, made.top_k) == (5000, 16, 20)
    assert (made.repetition_penalty, made.share) == (2.5, 0.02)
    settings = ContinualSettings.of(replay="generated", generator={"steps": 7})
    assert settings.generator == GeneratorSettings(steps=7)
    assert ContinualSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


# --- in a run ---


@pytest.mark.parametrize(
    ("kind", "strategy", "count"),
    [
        ("llama", "sapt", 2),
        ("t5", "generative_replay", 2),
        pytest.param("t5", "sapt", 3, marks=pytest.mark.thorough),
    ],
)
def test_a_run_generates_what_it_replays(
    kind: str, strategy: str, count: int, tmp_path: Path
) -> None:
    tasks = make_tasks(count)
    options = make_settings(
        strategy=strategy, replay="generated", generator=GeneratorSettings(**{**QUICK, "steps": 5})
    )
    model = make_model(kind)
    results = run_continual(model, TOKENIZER, tasks, tmp_path, options)
    assert results.scores.shape == (count, count)
    folder = tmp_path / "pseudo_samples" / tasks[0].benchmark
    assert sorted(p.name for p in folder.iterdir()) == sorted(t.name for t in tasks[:-1])
    # A later run may read them as a folder: the same samples, hence the same scores.
    again = replace(options, replay=str(tmp_path / "pseudo_samples"))
    repeated = run_continual(make_model(kind), TOKENIZER, tasks, tmp_path / "again", again)
    assert (repeated.scores == results.scores)[[0, 1, 1], [0, 0, 1]].all()
    assert not (tmp_path / "training").exists()
