"""The experiment on generated tasks, with a step of each."""

import json
from pathlib import Path

import generated_tasks
import pytest


@pytest.mark.thorough
def test_it_makes_pseudo_samples_tunes_compares_and_goes_on(tmp_path: Path) -> None:
    given = [
        "--rows", "sapt_pseudo_samples,l2p", "--tasks", "last_first,vowel_label", "--seeds", "0",
        "--steps", "1", "--generator-steps", "1", "--tuning-tasks", "1",
        "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    result = json.loads(generated_tasks.main(given).read_text())
    assert result["orders"] == ["last_first,vowel_label", "vowel_label,last_first"]
    assert list(result["rows"]) == ["sapt_pseudo_samples", "l2p"]
    tried = {name: set(row["dev_ap"]["learning_rate"]) for name, row in result["rows"].items()}
    assert tried["l2p"] == {"0.1", "0.3", "1.0", "3.0"}
    assert tried["sapt_pseudo_samples"] == {"0.001", "0.003", "0.01"}
    made = sorted((tmp_path / "work" / "pseudo_samples").rglob("train.json"))
    assert len(made) == 2
    times = [file.stat().st_mtime_ns for file in made]
    again = json.loads(generated_tasks.main(given).read_text())
    assert again["rows"] == result["rows"]
    assert [file.stat().st_mtime_ns for file in made] == times
