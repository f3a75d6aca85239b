"""What scripts/peft_suite makes of the outcomes of two runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "scripts" / "peft_suite"


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A suite without files, and its module."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    spec = importlib.util.spec_from_file_location("peft_suite", FOLDER / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = object.__new__(module.Suite)
    made.source, made.started = Path("/"), 0.0
    return made, module


def outcomes(patched_models: int, **passed: bool) -> dict[str, dict]:
    counts = {"reason": "boom", "patched": patched_models, "refused": {}}
    return {name: {"passed": value, **counts} for name, value in passed.items()}


def compare(
    suite: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, runs: list[dict]
) -> tuple[int, dict]:
    made, _ = suite
    answers = iter(runs)
    monkeypatch.setattr(made, "run", lambda *args, **kwargs: next(answers), raising=False)
    code = made.compare(["."])
    return code, json.loads(capsys.readouterr().out)


def test_a_test_that_fails_patched_alone_is_a_failure(
    suite: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    plain = outcomes(0, good=True, bad=True, flaky=True, offline=False)
    patched = outcomes(1, good=True, bad=False, flaky=False)
    again = outcomes(1, bad=False, flaky=True)
    runs = [plain, patched, again, outcomes(0, bad=True)]
    code, summary = compare(suite, monkeypatch, capsys, runs)
    assert code == 1
    assert summary["newly_failing"] == {"bad": "boom"}
    assert (summary["passed_plain"], summary["passed_patched"]) == (3, 1)
    monkeypatch.setitem(suite[1].KNOWN, "bad", "it should")
    code, summary = compare(suite, monkeypatch, capsys, runs)
    assert code == 0
    assert summary["known_differences"] == {"bad": "it should"}


def test_a_run_that_patches_nothing_or_loses_tests_fails(
    suite: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    both = outcomes(0, good=True)
    code, summary = compare(suite, monkeypatch, capsys, [both, both, {}, {}])
    assert (code, summary["models_patched"]) == (1, 0)
    lost = [outcomes(0, a=True, b=True), outcomes(2, a=True), {}, outcomes(0, b=True)]
    code, summary = compare(suite, monkeypatch, capsys, lost)
    assert (code, summary["newly_failing"]) == (1, {"b": ""})
