"""`sapt-fast answer`, and how it shows an answer that grows."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from tiny_models import tiny
from tiny_tasks import word_tokenizer
from typer.testing import CliRunner
from written_answers import Written, tokenizer

from sapt_fast import cli
from sapt_fast.commands import answer as command
from sapt_fast.commands.answer_view import AnswerView, event_line
from sapt_fast.generation import (
    PlainToken,
    PointDone,
    PointFailed,
    PointRestarted,
    PointToken,
    ServerModel,
    SkeletonDone,
    SkeletonSettings,
    SkeletonToken,
    skeleton_of_thought,
)
from sapt_fast.generation.router.classifier import ClassifierRouter
from sapt_fast.generation.router.prompt import PromptRouter

SKELETON = " Red\n2. A big tree"


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    tiny("llama", max_position_embeddings=1024).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def run(*arguments: str, code: int = 0, **given):
    result = CliRunner().invoke(
        cli.app, ["answer", *arguments], catch_exceptions=code != 0, **given
    )
    assert result.exit_code == code, result.output
    return result


def writes_a_skeleton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model writes `SKELETON`, as an untrained one writes none."""
    stream = command.stream_skeleton_of_thought

    def forced(*given, settings, **options):
        values = {**vars(settings), "skeleton_processors": [Written(SKELETON)]}
        return stream(*given, settings=SkeletonSettings(**values), **options)

    monkeypatch.setattr(command, "stream_skeleton_of_thought", forced)


def test_points_are_printed_and_what_happens_goes_to_the_standard_error(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes_a_skeleton(monkeypatch)
    given = ("--model", model, "--device", "cpu", "--sot", "always", "--point-tokens", "3")
    result = run(*given, "Why?")
    assert result.stdout.startswith("1. Red:")
    assert "\n\n2. A big tree:" in result.stdout
    lines = result.stderr.splitlines()
    assert "points: --sot always" in lines
    assert "skeleton: 2 points" in lines
    assert sum(line.startswith("2/2 point") for line in lines) == 1
    content = json.loads(run(*given, "--json", "--no-progress", input="Why?\n").stdout)
    assert content["text"] == result.stdout.rstrip("\n")
    assert content["question"] == "Why?"
    assert [title for title, _ in content["points"]] == ["Red", "A big tree"]
    assert content["decision"] == {"skeleton": True, "score": None, "reason": "--sot always"}


def test_a_router_decides(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes_a_skeleton(monkeypatch)
    given = ("--model", model, "--device", "cpu", "--point-tokens", "2", "--max-tokens", "3")
    asked = json.loads(run(*given, "Why?", "--json").stdout)
    assert asked["mode"] == "plain"
    assert asked["decision"]["reason"].startswith("the model's reply is not A, B or C")
    assert asked["reason"] == asked["decision"]["reason"]
    classifier = tiny("bert", vocab_size=16, num_labels=2)
    for threshold, mode in ((0.0, "skeleton"), (1.0, "plain")):
        folder = tmp_path / str(threshold)
        ClassifierRouter(classifier, word_tokenizer(), threshold).save_pretrained(folder)
        found = json.loads(run(*given, "--router", str(folder), "red", "--json").stdout)
        assert found["mode"] == mode
        assert 0 < found["decision"]["score"] < 1


def test_a_model_is_asked_by_greedy_search() -> None:
    llama, words = tiny("llama", max_position_embeddings=1024), tokenizer()
    asked = PromptRouter.of_model(llama, words).ask("Which?")
    short = SkeletonSettings(max_plain_tokens=8)
    assert asked == skeleton_of_thought(llama, words, "Which?", settings=short, mode="plain").text


def served(reply: str, fails_at: str | None = None) -> SimpleNamespace:
    """A client of a server that gives this reply to each request without a certain text."""

    def create(**request) -> Iterator[SimpleNamespace]:
        if fails_at is not None and fails_at in request["messages"][-1]["content"]:
            raise ConnectionResetError("gone")
        delta = SimpleNamespace(content=reply)
        yield SimpleNamespace(choices=[SimpleNamespace(delta=delta, finish_reason="stop")])

    return SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))


def test_a_server_answers_or_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(reply: str, fails_at: str | None = None) -> None:
        server = ServerModel(served(reply, fails_at), "m", retries=0)
        monkeypatch.setattr(command, "ServerModel", lambda url, name: server)

    given = ("--server", "http://nowhere/v1", "--model", "m", "Why?")
    connect("A")
    result = run(*given)
    assert result.stdout == "A\n"  # a skeleton without points
    assert "points: the model says: independent points" in result.stderr
    connect("1. Red\n2. Sun", fails_at='Begin with "2.')
    partial = run(*given, "--sot", "always", code=1)
    assert "error: point 2 has no answer: ConnectionResetError: gone" in partial.stderr
    assert partial.stdout.startswith("1. Red:")
    connect("A", fails_at="")
    failed = run(*given, code=1)
    assert isinstance(failed.exception, ConnectionError)
    assert "http://nowhere/v1 gave no answer" in str(failed.exception)


def test_an_interrupt_ends_without_a_traceback(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    closed = []

    def interrupted(*given, **options):
        try:
            yield SkeletonToken("1.")
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    monkeypatch.setattr(command, "stream_skeleton_of_thought", interrupted)
    given = ["sapt-fast", "answer", "--model", model, "--device", "cpu", "--sot", "always", "Why?"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code in (1, 130)  # by the version of typer
    assert closed == [True]
    out, error = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in error


def test_bad_input_is_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    for given, message in (
        (("--sot", "maybe", "Why?"), "sot: got 'maybe', expected one of auto, always, never"),
        ((" ",), "question: got ' '"),
        ((), "question: got ''"),
        (("--max-points", "0", "Why?"), "max_points: got 0"),
        (("--batch", "0", "Why?"), "batch: got 0"),
        (("--temperature", "0.5", "Why?"), "temperature: got 0.5, but greedy search"),
        (("--sample", "--top-p", "nan", "Why?"), "top_p: got nan"),
        (("--seed", "-1", "Why?"), "seed: got -1"),
        (("--dtype", "int8", "Why?"), "dtype: got 'int8'"),
        (("--router", str(tmp_path), "Why?"), "it has no skeleton_router.json"),
        (("--router", str(tmp_path), "--sot", "never", "Why?"), "but --sot is 'never'"),
        (("--server", "u", "--adapters", "a", "Why?"), "adapters: got 'a'"),
        (("--server", "u", "--dtype", "float16", "Why?"), "dtype: got 'float16', but the model"),
        (("Why?",), "which does not exist"),
    ):
        result = run("--model", str(tmp_path / "missing"), *given, code=1)
        assert message in str(result.exception), result.exception


# --- the view ---


def rendered(view: AnswerView, width: int = 80, height: int = 12) -> str:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(view)
    return console.file.getvalue()


def test_points_grow_side_by_side() -> None:
    view = AnswerView()
    view.add(SkeletonToken("1. Sun\n2. Rain"))
    assert "2. Rain" in rendered(view)
    view.add(SkeletonDone(("Sun", "Rain [b]", "Wind")))
    view.add(PointToken(1, "wet\x1b[2J "))
    view.add(PointToken(0, "warm " * 200 + "last"))
    text = rendered(view)
    first = text.splitlines()[0]
    assert "1. Sun" in first
    assert "2. Rain [b]" in first
    assert "3. Wind" not in first
    assert "\x1b" not in text
    assert "last" in text
    assert len(text.splitlines()) <= 12
    view.add(PointRestarted(1, "timeout"))
    assert "wet" not in rendered(view)
    view.add(PointDone(0, "warm"))
    assert event_line(PointDone(0, "warm"), view) == "1/3 point 1, Sun"
    view.add(PointFailed(1, "gone"))
    assert event_line(PointFailed(1, "gone"), view) == "2/3 point 2, Rain [b] failed: gone"
    assert "gone" in rendered(view)


def test_points_that_do_not_fit_follow_when_others_end() -> None:
    view = AnswerView()
    view.add(SkeletonDone(tuple("abcdefgh")))
    text = rendered(view, width=40, height=9)
    assert "1. a" in text
    assert "3. c" not in text
    assert "and 6 more points" in text
    view.add(PointDone(0, "x"))
    view.add(PointDone(1, "y"))
    assert "3. c" in rendered(view, width=40, height=9)
    for width in (1, 5, 200):
        rendered(view, width=width, height=2)


def test_an_answer_without_points_is_shown_as_text() -> None:
    view = AnswerView()
    view.add(SkeletonDone(("one",)))
    view.add(PlainToken("Because."))
    assert "Because." in rendered(view)
