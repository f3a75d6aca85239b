"""The demo: it runs, goes on, and shows what it is there to show."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sapt_fast.commands import demo as run
from sapt_fast.continual.data.sources import demo_tasks
from sapt_fast.continual.run.loop import run_continual
from sapt_fast.demo.backbone import load_backbone
from sapt_fast.demo.tasks import CharTokenizer


def test_demo_compares_the_strategies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = run.demo_settings

    def short(*arguments: Any, **options: Any) -> Any:
        return replace(recipe(*arguments, **options), steps=2, max_target_length=2)

    monkeypatch.setattr(run, "demo_settings", short)
    monkeypatch.setattr(run, "demo_tasks", lambda seed: demo_tasks(seed)[:2])
    threads = torch.get_num_threads()
    results = run.run_demo(tmp_path)
    assert torch.get_num_threads() == threads
    assert list(results) == ["sapt", "seqlora"]
    assert (tmp_path / "sapt" / "attention.png").is_file()
    summary = json.loads((tmp_path / "demo.json").read_text())
    assert summary["metrics"]["sapt"]["AP"] == results["sapt"].metrics.ap
    assert summary["metrics"]["sapt"]["FWT"] is not None
    console = Console(width=80, file=io.StringIO())
    for table in run.demo_tables(results):
        console.print(table)
    assert "reverse_drop_first" in console.file.getvalue()
    assert run.run_demo(tmp_path)["sapt"].metrics == results["sapt"].metrics


@pytest.mark.slow
@pytest.mark.thorough
def test_sapt_keeps_what_seqlora_forgets(tmp_path: Path) -> None:
    tasks = [task for task in demo_tasks() if task.name in ("last_first", "vowel_label")]
    kept = {}
    for strategy in ("sapt", "seqlora"):
        settings = run.demo_settings(strategy)
        results = run_continual(
            load_backbone(), CharTokenizer(), tasks, tmp_path / strategy, settings
        )
        assert results.scores.diagonal().min() > 75
        kept[strategy] = results.scores[1, 0]
    assert kept["sapt"] > 90
    assert kept["seqlora"] < 60
