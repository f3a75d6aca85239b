"""`sapt-fast train-router`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import tiny
from tiny_tasks import word_tokenizer
from typer.testing import CliRunner

from sapt_fast import cli
from sapt_fast.generation.router.classifier import ClassifierRouter


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(
        cli.app, ["train-router", *arguments, "--no-progress"], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"question": f"{word} {colour}", "label": label, "split": split}
        for split, words in (("train", "of a b pick"), ("dev", "word choose"), ("test", "north"))
        for word in words.split()
        for label, colour in enumerate(("red", "blue"))
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_it_trains_an_encoder_and_writes_the_confusion(tmp_path: Path, data: Path) -> None:
    model, folder = tmp_path / "model", tmp_path / "router"
    tiny("bert", vocab_size=16, initializer_range=0.1).bert.save_pretrained(model)
    word_tokenizer().save_pretrained(model)
    output = invoke(
        "--model", str(model), "--data", str(data), "--output", str(folder), "--epochs", "20",
        "--lr", "3e-3", "--batch-size", "4", "--threshold", "auto", "--device", "cpu",
        "--false-positive-rate", "0",
    )  # fmt: skip
    report = json.loads((folder / "report.json").read_text())
    counts = report["confusion"]["test"]
    assert (counts["true_positives"], counts["true_negatives"], counts["accuracy"]) == (1, 1, 1.0)
    assert report["confusion"]["dev"]["false_positives"] == 0
    assert report["wrong"] == []
    assert (report["settings"]["epochs"], report["settings"]["weight_decay"]) == (20, 0.01)
    assert "100.0%" in output
    router = ClassifierRouter.from_pretrained(folder)
    assert router.threshold == report["threshold"]
    assert router.decide("choose blue").skeleton
    assert not router.decide("choose red").skeleton


def test_tiny_needs_no_model_and_repeats_itself(tmp_path: Path, data: Path) -> None:
    weights = []
    for name in ("a", "b"):
        torch.rand(1)
        given = ("--data", str(data), "--output", str(tmp_path / name), "--device", "cpu")
        invoke(*given, "--epochs", "1", "--seed", "3")
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert report["settings"]["learning_rate"] == 1e-3
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_bad_input_is_named_before_anything_runs(tmp_path: Path, data: Path) -> None:
    folder, other = tmp_path / "router", tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    for given, error, message in (
        (("--output", str(other)), FileExistsError, "whose config.json is not that of a router"),
        (("--threshold", "high"), ValueError, "threshold: got 'high', expected a number"),
        (("--threshold", "nan"), ValueError, "threshold: got nan"),
        (("--false-positive-rate", "2"), ValueError, "false_positive_rate: got 2"),
        (("--epochs", "0"), ValueError, "epochs: got 0"),
        (("--max-length", "1"), ValueError, "max_length: got 1"),
        (("--data", str(tmp_path / "x")), FileNotFoundError, "x is missing"),
        (("--model", str(tmp_path / "x")), FileNotFoundError, "model: got"),
    ):
        arguments = ["train-router", "--data", str(data), "--output", str(folder), *given]
        result = CliRunner().invoke(cli.app, arguments)
        assert isinstance(result.exception, error), result.output
        assert message in str(result.exception)
    assert not folder.exists()
