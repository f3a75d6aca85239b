"""The real experiment's script, on a tiny encoder and a few rows."""

import json
from pathlib import Path

import pytest
import real_encoder
from tiny_tasks import make_encoder, word_tokenizer

DATA = Path(__file__).parents[1] / "data" / "CL_Benchmark"


def test_it_tunes_on_dev_compares_and_goes_on(tmp_path: Path) -> None:
    model = tmp_path / "model"
    make_encoder().save_pretrained(model)
    word_tokenizer().save_pretrained(model)
    given = [
        "--data", str(DATA), "--model", str(model), "--tasks", "copa,qqp", "--seeds", "0",
        "--strategies", "sapt,seqlora", "--rates", "1e-3,1e-2", "--steps", "1", "--rows", "8",
        "--eval-rows", "4", "--no-ablations", "--work", str(tmp_path / "work"),
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    path = real_encoder.main(given)
    result = json.loads(path.read_text())
    assert path.name.endswith("-real-encoder.json")
    assert result["source"]["model"] == "model"
    assert result["orders"] == [["copa", "qqp"], ["qqp", "copa"]]
    for name in ("sapt", "seqlora"):
        row = result["rows"][name]
        assert row["runs"] == 2
        assert [cell["order"] for cell in row["cells"]] == ["order1", "order2"]
        best = max(row["dev_ap"].values())
        assert row["dev_ap"][str(row["learning_rate"])] == best
    states = sorted((tmp_path / "work").rglob("state.json"))
    assert len(states) == 2 * 2 + 2 * 2 + 1
    times = [state.stat().st_mtime_ns for state in states]
    assert json.loads(real_encoder.main(given).read_text())["rows"] == result["rows"]
    assert [state.stat().st_mtime_ns for state in states] == times


def test_ablations_are_of_the_rows_that_are_there() -> None:
    rows = {name: real_encoder.BASE.but(strategy=name) for name in ("sapt", "seqlora")}
    made = real_encoder.with_ablations({"sapt": real_encoder.at_rate(rows["sapt"], 1e-3)})
    assert "replay_5_percent" not in made
    assert made["sapt_tau_1"].sapt.temperature == 1
    assert made["sapt_tau_1"].query_learning_rate == pytest.approx(2e-3)
    assert set(made) == {"sapt", *(n for n in real_encoder.ABLATIONS if n.startswith("sapt"))}
