"""The experiment on generated tasks, with a step of each."""

import json
from pathlib import Path

import generated_tasks
import pytest
from continual_protocol import Grid, known_rows, with_value

from sapt_fast.commands.demo import demo_settings


@pytest.mark.thorough
def test_it_makes_pseudo_samples_tunes_compares_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = Grid("learning_rate", (0.01, 0.1), (0.01, 0.1))
    grids = dict.fromkeys(("sapt_pseudo_samples", "l2p", "lfpt5_generates"), (rate,))
    monkeypatch.setattr(generated_tasks, "GRIDS", grids)
    given = [
        "--rows", ",".join(grids), "--tasks", "last_first,vowel_label", "--seeds", "0",
        "--steps", "1", "--prompt-steps", "2", "--generator-steps", "1", "--tuning-tasks", "1",
        "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    result = json.loads(generated_tasks.main(given).read_text())
    assert result["orders"] == ["last_first,vowel_label", "vowel_label,last_first"]
    assert list(result["rows"]) == list(grids)
    assert result["rows"]["l2p"]["settings"]["steps"] == 2
    assert set(result["constant"]["tasks"]) == {"last_first", "vowel_label"}
    made = sorted((tmp_path / "work" / "pseudo_samples").rglob("train.json"))
    assert len(made) == 2
    times = [file.stat().st_mtime_ns for file in made]
    again = json.loads(generated_tasks.main(given).read_text())
    assert again["rows"] == result["rows"]
    assert [file.stat().st_mtime_ns for file in made] == times


def test_rows_start_from_their_settings() -> None:
    names = known_rows(generated_tasks.ROWS, None)
    rows = generated_tasks.settings_of(names, demo_settings(), Path("made"), 99)
    steps = {name: settings.steps for name, settings in rows.items()}
    assert {name for name in steps if steps[name] == 99} == set(generated_tasks.PROMPTS)
    assert rows["lfpt5_generates"].replay == "none"
    assert rows["lfpt5_kl_sum"].replay == "made"
    assert rows["replay"].replay == "real"
    for name, settings in rows.items():
        for grid in generated_tasks.GRIDS[name]:
            with_value(settings, grid.name, grid.first[0])
