"""Every strategy in the loop: it runs, resumes with what it remembers, and names bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_tasks import make_model, make_settings, make_tasks, with_pseudo_samples

from sapt_fast.continual.run.loop import evaluate_run, run_continual
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.strategies import STRATEGIES
from sapt_fast.demo.tasks import CharTokenizer

SEQUENTIAL = [n for n, kind in STRATEGIES.items() if "text" in kind.data and not kind.alone]
# By default every strategy on one kind of model, in turns.
RUNS = [
    pytest.param(strategy, kind, marks=[pytest.mark.thorough] * ((number + place) % 2))
    for number, strategy in enumerate(SEQUENTIAL)
    for place, kind in enumerate(("t5", "llama"))
]


RESUMED = ("ewc", "epi", "lfpt5", "l2p", "inflora", "gainlora", "sd_lora")


def settings_of(strategy: str, folder: Path, **options: Any) -> ContinualSettings:
    replay = str(folder) if strategy in ("generative_replay", "lfpt5") else "real"
    defaults: dict[str, Any] = {"steps": 3, "metric": "exact_match", "batch_size": 4}
    return make_settings(strategy=strategy, replay=replay, **{**defaults, **options})


@pytest.mark.parametrize(("strategy", "kind"), RUNS)
def test_runs_and_is_evaluated_again_from_its_checkpoints(
    strategy: str, kind: str, tmp_path: Path
) -> None:
    tasks = with_pseudo_samples(tmp_path / "pseudo", make_tasks(3, train=8, held_out=3))
    settings = settings_of(strategy, tmp_path / "pseudo")
    results = run_continual(make_model(kind), CharTokenizer(), tasks, tmp_path / "run", settings)
    assert not np.isnan(np.tril(results.scores)).any()
    assert results.trained_parameters > 0
    assert results.peak_memory is not None
    assert results.peak_memory > 10**7
    assert not results.resumed
    again = evaluate_run(make_model(kind), CharTokenizer(), tasks, tmp_path / "run", settings)
    np.testing.assert_array_equal(again.scores, results.scores)
    if results.testing_attention is not None:
        np.testing.assert_allclose(again.testing_attention, results.testing_attention, atol=1e-6)
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    assert again.deviation(stored) == 0
    assert stored["trained_parameters"] == results.trained_parameters


@pytest.mark.thorough
def test_resuming_after_sigkill_gives_the_same_weights(tmp_path: Path) -> None:
    names = [f"t5-{strategy}" for strategy in RESUMED]
    tests = Path(__file__).parents[2]
    process = subprocess.run(
        [sys.executable, str(tests / "killed_run.py"), str(tmp_path), ",".join(names), "step"],
        capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), *sys.path])},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout.splitlines()[-1])
    last = f"checkpoints/3-{make_tasks()[2].name}/strategy.safetensors"
    for name in names:
        killed = [-signal.SIGKILL, ["checkpoint-2"], 0]
        assert report[name] == {"uninterrupted": 0, "step": killed}, process.stderr
        whole, resumed = (tmp_path / name / place for place in ("uninterrupted", "step"))
        expected, found = (load_file(p / "weights.safetensors") for p in (whole, resumed))
        assert found.keys() == expected.keys()
        for parameter, value in expected.items():
            assert torch.equal(found[parameter], value), (name, parameter)
        results = [json.loads((p / "results.json").read_text()) for p in (whole, resumed)]
        assert [run["resumed"] for run in results] == [False, True]
        for field in ("scores", "trained_parameters"):
            assert results[0][field] == results[1][field]
        if name != "t5-lfpt5":
            assert (resumed / last).read_bytes() == (whole / last).read_bytes()


def test_the_guides_own_method_runs(tmp_path: Path) -> None:
    guide = Path(__file__).parents[3] / "docs" / "train" / "strategies.md"
    (code,) = re.findall(r"``` \{ \.python \}\n(.*?)```", guide.read_text(), re.DOTALL)
    names = set(STRATEGIES)
    try:
        exec(code, {})
        (own,) = set(STRATEGIES) - names
        tasks = make_tasks(2, train=4, held_out=1)
        settings = make_settings(strategy=own, steps=2)
        results = run_continual(make_model("t5"), CharTokenizer(), tasks, tmp_path, settings)
        assert results.scores.shape == (2, 2)
    finally:
        for name in set(STRATEGIES) - names:
            del STRATEGIES[name]


def test_the_guide_names_every_strategy_and_option() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "train" / "strategies.md").read_text()
    for name, kind in STRATEGIES.items():
        (line,) = [line for line in guide.splitlines() if line.startswith(f"| `{name}` |")]
        for field in fields(kind.Options):
            assert f"`{field.name}`" in line, (name, field.name)
