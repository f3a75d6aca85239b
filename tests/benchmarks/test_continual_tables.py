"""The tables of the experiments' page: what they say of a result, and that the page is drawn."""

import json
from pathlib import Path
from typing import Any

import continual_tables
import figures
import pytest

ENVIRONMENT = {"cpu": "a CPU", "torch": "2.13.0", "date": "2026-01-01", "commit": "abc"}


def metric(mean: float | None, deviation: float | None = 1.0) -> dict[str, Any]:
    return {"mean": mean, "deviation": deviation}


def row(ap: float, forgetting: float | None) -> dict[str, Any]:
    cells = [
        {
            "tasks": ["a", "b"],
            "scores": [[ap, None], [ap - 1, ap + 1]],
            "strategy": "sapt",
            "alone": [60.0, 62.0],
            "metrics": {"AP": ap},
            "training_attention": [[1.0, None], [0.75, 0.25]],
            "testing_attention": [[0.9, 0.1], [0.8, 0.2]],
        }
    ]
    metrics = {"AP": metric(ap), "F.Ra": metric(forgetting), "FWT": metric(None), "BWT": metric(0)}
    return {
        "metrics": metrics,
        "runs": 1,
        "trained_parameters": 1234,
        "cells": cells,
        "dev_ap": {"learning_rate": {"0.001": ap, "0.003": ap - 2}},
    }


def result() -> dict[str, Any]:
    rows = {
        "seqlora": row(10.0, 50.0), "sapt": row(60.0, 2.0), "replay": row(58.0, 3.0),
        "ewc": row(40.0, 9.0), "lwf": row(30.0, 9.0), "olora": row(20.0, 9.0),
        "joint": row(61.0, None),
    }  # fmt: skip
    return {
        "only": "real-encoder",
        "environment": ENVIRONMENT,
        "orders": ["a,b"],
        "rows": rows,
        "constant": {"metrics": {"AP": metric(35.0)}, "tasks": {"a": 30.0, "b": 40.0}},
        "ablations": {"sapt": rows["sapt"], "sapt_without_reflection": row(20.0, 40.0)},
        "other_weights": [
            {name: {"AP": 30.0, "F.Ra": 1.0} for name in ("uniform", "hardest_wrong")}
        ],
    }


def test_targets_are_differences_of_means() -> None:
    lines = continual_tables.targets(result())[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")][1] for line in lines]
    assert cells == ["2.00", "0.04", "50.00", "20.00", "2.00 (missed)", "1.00", "40.00"]
    assert "(ewc)" in lines[3]


def test_block_has_every_row_by_falling_average() -> None:
    lines = continual_tables.block(result()).splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    constant = "constant answer (majority label of each task)"
    first = ["joint", "sapt", "replay", "ewc", constant, "lwf", "olora", "seqlora"]
    assert names[1:9] == first
    assert "| joint | 61.0 ± 1.0 | - | - | 0.0 ± 1.0 | 1,234 | 1 |" in lines
    assert f"| {constant} | 35.0 ± 1.0 | - | - | - | 0 | - |" in lines
    assert f"| {constant} | 30 | 40 |" in lines
    assert "| sapt, after the last task | 0.90 | 0.20 |" in lines
    assert "| sapt_without_reflection | 20.0 ± 1.0 | 40.0 ± 1.0 | -40.0 |" in lines
    assert "| sapt, uniform weights | 30.0 | 1.0 | -30.0 |" in lines
    assert "| sapt | 59 | 61 |" in lines


def test_findings_follow_from_the_file() -> None:
    lines = "\n".join(continual_tables.findings(result()))
    assert "has AP 35.0. Above it: joint +26.0, sapt +25.0, replay +23.0, ewc +5.0." in lines
    assert "Not above it: lwf, olora, seqlora." in lines
    assert "replay is 3.0 below the tasks learned alone." in lines
    assert "sapt: the own adapter has less than half of the weight in 1 of 2 cells" in lines
    assert "lowest or the highest: seqlora (learning_rate), sapt" in lines
    assert not continual_tables.is_at_an_end({"0.1": 1.0, "1": 3.0, "10": 2.0})
    assert continual_tables.is_at_an_end({"0.1": 3.0, "1": 3.0, "10": 2.0})


def test_a_given_file_takes_the_place_of_its_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continual_tables, "ROOT", tmp_path)
    (tmp_path / "old.json").write_text(json.dumps(result()))
    other = result()
    other["rows"]["sapt"] = row(70.0, 1.0)
    (tmp_path / "new.json").write_text(json.dumps(other))
    page = "before\n<!-- results: old.json -->\n<!-- end of results -->\nafter\n"
    drawn = continual_tables.rendered(page, {"real-encoder": Path("new.json")})
    assert drawn.startswith("before\n<!-- results: new.json -->\n")
    assert "| sapt | 70.0" in drawn
    assert continual_tables.rendered(drawn) == drawn


def test_the_page_is_that_of_its_files() -> None:
    page = continual_tables.PAGE.read_text()
    assert figures.BLOCK.search(page)
    assert continual_tables.rendered(page) == page
