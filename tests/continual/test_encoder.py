"""Encoders: inputs matched to frozen encodings of the labels, in the loop and from files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny
from tiny_tasks import make_encoder, make_model, make_settings, word_tasks, word_tokenizer
from transformers import AutoConfig, Seq2SeqTrainingArguments
from typer.testing import CliRunner

import sapt_fast
from sapt_fast import SaptConfig, cli
from sapt_fast.continual.data import encoder
from sapt_fast.continual.data.collate import Collator
from sapt_fast.continual.data.sources import Source
from sapt_fast.continual.run import loop
from sapt_fast.continual.run.evaluate import answers
from sapt_fast.continual.run.loop import evaluate_run, run_continual
from sapt_fast.continual.trainer import SaptTrainer
from sapt_fast.demo.tasks import CharTokenizer

DATA = Path(__file__).parents[1] / "data" / "CL_Benchmark"
TOKENIZER = word_tokenizer()


def settings(**options: Any) -> Any:
    defaults = {"steps": 30, "save_steps": 100, "batch_size": 8, "accumulation": 1}
    return make_settings(**{**defaults, **options})


def test_logits_are_cosines_of_mean_hidden_states() -> None:
    rng = np.random.default_rng(0)
    hidden, encodings = rng.normal(size=(2, 3, 5)), rng.normal(size=(4, 5))
    encodings /= np.linalg.norm(encodings, axis=1, keepdims=True)
    mask = np.array([[1, 1, 0], [1, 1, 1]])
    space = encoder.LabelSpace(tuple("abcd"), torch.tensor(encodings, dtype=torch.float32), 0.1)
    logits = space(torch.tensor(hidden, dtype=torch.float32), torch.tensor(mask))
    means = np.stack([hidden[0, :2].mean(0), hidden[1].mean(0)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(logits[:, 0].numpy(), means @ encodings.T / 0.1, atol=1e-5)
    assert (space.index("d"), space.index("x")) == (3, -100)


def test_labels_are_encoded_by_the_base_model_one_by_one() -> None:
    model = make_encoder()
    space = encoder.encode_labels(model, TOKENIZER, ["red", "a b of", "red"], 0.05, batch_size=2)
    assert space.labels == ("red", "a b of")
    for label, encoding in zip(space.labels, space.encodings, strict=True):
        ids = TOKENIZER(label, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            mean = model(ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(encoding, mean / mean.norm())


def test_prompts_are_the_start_of_the_instruction_and_the_input() -> None:
    task = word_tasks()[0]
    made = {
        count: encoder.plain_prompts(task.train[:1], task.definition, TOKENIZER, count)[0].prompt
        for count in (None, 0, 2, 50)
    }
    assert made == {
        None: "pick a word of a b a red",
        0: "a red",
        2: "pick a a red",
        50: "pick a word of a b a red",
    }
    with pytest.raises(ValueError, match="tokenizer: got CharTokenizer, expected a fast one"):
        encoder.plain_prompts(task.train, task.definition, CharTokenizer(), 2)
    without = replace(task, labels=None)
    assert encoder.label_strings(without) == ("blue", "red")


def test_the_loss_is_the_cross_entropy_over_all_labels(tmp_path: Path) -> None:
    model, task = make_encoder(), word_tasks()[1]
    space = encoder.encode_labels(model, TOKENIZER, ["red", "yes", "no"], 0.5)
    sapt_fast.patch(model, SaptConfig(r=2)).sapt.add_task("only")
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], remove_unused_columns=False
    )
    trainer = SaptTrainer(model, arguments, data_collator=Collator(0), space=space)
    rows = encoder.encode_label_rows(TOKENIZER, task.train[:5], space, 20)
    loss = trainer.compute_loss(model.eval(), Collator(0)(rows), num_items_in_batch=torch.tensor(7))
    logits = []
    for row in rows:
        hidden = model(torch.tensor([row["input_ids"]])).last_hidden_state[0].double().mean(0)
        logits.append(hidden / hidden.norm() @ space.encodings.double().T / 0.5)
    labels = torch.tensor([["red", "yes", "no"].index(row.output) for row in task.train[:5]])
    expected = -torch.stack(logits).log_softmax(-1)[torch.arange(5), labels].sum() / 7
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="space: got none for BertModel"):
        SaptTrainer(model, arguments)
    other = sapt_fast.patch(make_model("t5"))
    other.sapt.add_task("only")
    with pytest.raises(ValueError, match="space: got one for T5For"):
        SaptTrainer(other, arguments, space=space)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"pooling": "max", "standardize_query": True},
        {"key_init": "mean_query", "own_key_loss": 0.3},
    ],
)
def test_sapt_learns_with_an_encoder(config: dict[str, Any], tmp_path: Path) -> None:
    tasks, options = word_tasks(), settings(sapt=SaptConfig(r=2, lora_alpha=4, **config))
    model = make_encoder()
    results = run_continual(model, TOKENIZER, tasks, tmp_path, options)
    # Untrained, the right label of the two or four is a matter of luck.
    assert results.scores.diagonal().min() == 100
    assert results.testing_attention is not None
    np.testing.assert_allclose(results.testing_attention.sum(1), 1, atol=1e-5)
    if "own_key_loss" in config:
        assert results.training_attention.diagonal().min() > 0.5
    if "standardize_query" in config:
        assert model.sapt.router.query_std.unique().numel() > 1
    again = evaluate_run(make_encoder(), TOKENIZER, tasks, tmp_path, options)
    np.testing.assert_array_equal(again.scores, results.scores)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["metrics"]["AP"] == results.metrics.ap


def test_answers_are_labels_of_all_tasks(tmp_path: Path) -> None:
    model, tasks = make_encoder(), word_tasks()
    run = loop._Run(model, TOKENIZER, tasks, settings())
    assert run.bench.space.labels == ("red", "blue", "yes", "no")
    rows = run.tasks[2].test
    chosen = answers(model, TOKENIZER, rows, settings(eval_batch_size=4), None, run.bench.space)
    assert len(chosen) == 6
    assert set(chosen) <= {"red", "blue", "yes", "no"}
    alone = answers(model, TOKENIZER, rows, settings(eval_batch_size=1), None, run.bench.space)
    assert alone == chosen


@pytest.mark.parametrize("strategy", ["joint", "replay", "ewc", "lwf", "olora", "epi", "gainlora"])
def test_every_strategy_that_needs_no_text(strategy: str, tmp_path: Path) -> None:
    options = settings(strategy=strategy, steps=20)
    results = run_continual(make_encoder(), TOKENIZER, word_tasks()[:2], tmp_path, options)
    assert results.scores[0, 0] > 75  # one of four labels, right by chance in a quarter


@pytest.mark.parametrize("bf16", [False, True])
def test_features_and_answers_are_computed_as_training_was(bf16: bool, tmp_path: Path) -> None:
    model = make_encoder()
    options = settings(strategy="epi", steps=1, bf16=bf16)
    run = loop._Run(model, TOKENIZER, word_tasks()[:2], options)
    seen = set()
    model.get_input_embeddings().register_forward_hook(
        lambda module, *_: seen.add((module.training, torch.is_autocast_enabled("cpu")))
    )
    run.open(tmp_path, None, resume=True)
    run.learn_all()
    assert seen == {(True, bf16), (False, bf16)}


def test_heads_and_strategies_that_generate_are_refused(tmp_path: Path) -> None:
    options = settings(strategy="lfpt5", replay=str(tmp_path))
    with pytest.raises(ValueError, match="'lfpt5' generates text, which BertModel cannot"):
        loop._Run(make_encoder(), TOKENIZER, word_tasks(), options)
    with pytest.raises(
        ValueError, match="BertForSequenceClassification, expected a model that generates"
    ):
        loop._Run(tiny("bert"), TOKENIZER, word_tasks(), settings())


# --- from files ---


@pytest.mark.parametrize(
    ("model_type", "architecture", "kind"),
    [
        ("bert", "BertModel", "encoder"),
        ("bert", "BertForMaskedLM", "encoder"),
        ("bert", "BertLMHeadModel", "causal"),
        ("roberta", None, "encoder"),
        ("t5", "T5ForConditionalGeneration", "seq2seq"),
        ("bart", None, "seq2seq"),
        ("llama", None, "causal"),
        ("gpt2", "GPT2LMHeadModel", "causal"),
    ],
)
def test_the_architecture_tells_the_kind(
    model_type: str, architecture: str | None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    config = AutoConfig.for_model(model_type)
    config.architectures = None if architecture is None else [architecture]
    loaded: list[str] = []

    def loader(name: str) -> Any:
        def from_pretrained(*args: Any, **options: Any) -> Any:
            loaded.append(name)
            return SimpleNamespace(config=config, can_generate=lambda: name == "causal")

        return SimpleNamespace(from_pretrained=from_pretrained)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *args: config)
    for auto, name in (
        ("AutoModelForSeq2SeqLM", "seq2seq"),
        ("AutoModelForCausalLM", "causal"),
        ("AutoModel", "encoder"),
    ):
        monkeypatch.setattr(transformers, auto, loader(name))
    tokenizer = SimpleNamespace(from_pretrained=lambda *args: TOKENIZER)
    monkeypatch.setattr(transformers, "AutoTokenizer", tokenizer)
    Source(model="somewhere", benchmark="demo").load_model()
    assert loaded == [kind]


def test_an_encoder_from_the_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_encoder().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    command = [
        "train", "--model", str(folder), "--data", str(DATA), "--benchmark", "long_sequence",
        "--tasks", "copa,qqp", "--steps", "2", "--max-source-length", "16", "--device", "cpu",
        "--instruction-tokens", "4", "--attention", "eager", "--no-progress",
    ]  # fmt: skip
    output = tmp_path / "run"
    result = CliRunner().invoke(cli.app, [*command, "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "AP" in result.output
    result = CliRunner().invoke(cli.app, ["eval", str(output), "--no-progress"])
    assert "largest deviation from results.json: 0" in result.output
    with pytest.raises(ValueError, match="kind: got 'magic'"):
        Source(model="x", benchmark="demo", kind="magic")
    with pytest.raises(ValueError, match="instruction_tokens: got -1"):
        settings(instruction_tokens=-1)
