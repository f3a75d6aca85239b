"""The real experiment's script, on a tiny encoder and a few rows."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import real_encoder
import torch
from tiny_tasks import make_encoder, word_tokenizer

from sapt_fast.continual.compare.cells import Cell
from sapt_fast.continual.data.sources import Source

DATA = Path(__file__).parents[1] / "data" / "CL_Benchmark"


@pytest.mark.thorough
def test_it_tunes_on_dev_compares_and_goes_on(tmp_path: Path) -> None:
    model = tmp_path / "model"
    make_encoder().save_pretrained(model)
    word_tokenizer().save_pretrained(model)
    given = [
        "--data", str(DATA), "--model", str(model), "--tasks", "copa,qqp", "--seeds", "0",
        "--strategies", "sapt,seqlora", "--rates", "1e-3,1e-2", "--steps", "1", "--rows", "8",
        "--eval-rows", "4", "--tuning-tasks", "1", "--ablation-orders", "1",
        "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    path = real_encoder.main(given)
    result = json.loads(path.read_text())
    assert path.name.endswith("-real-encoder.json")
    assert result["source"]["model"] == "model"
    assert result["orders"] == ["copa,qqp", "qqp,copa"]
    for name in ("sapt", "seqlora"):
        row = result["rows"][name]
        assert row["runs"] == 2
        assert [cell["order"] for cell in row["cells"]] == ["order1", "order2"]
        best = max(row["dev_ap"]["learning_rate"].values())
        rate = row["settings"].get("learning_rate", real_encoder.BASE.learning_rate)
        assert row["dev_ap"]["learning_rate"][str(rate)] == best
        assert set(row["dev_ap"]["learning_rate"]) == {"0.001", "0.01"}
    assert set(result["rows"]["sapt"]["dev_ap"]["kl_ratio"]) == {"0.1", "0.5"}
    changed = [name for name in real_encoder.ABLATIONS if name.startswith("sapt")]
    assert set(result["ablations"]) == {"sapt", *changed}
    [answered] = result["other_weights"]
    assert {"uniform", "hardest_wrong", "order", "seed"} == set(answered)
    states = sorted((tmp_path / "work").rglob("state.json"))
    tuned, learned = 2 + 1 + 2, 2 * 2
    assert len(states) == tuned + learned + len(changed)
    times = [state.stat().st_mtime_ns for state in states]
    assert json.loads(real_encoder.main(given).read_text())["rows"] == result["rows"]
    assert [state.stat().st_mtime_ns for state in states] == times


def test_ablations_are_of_the_rows_that_are_there() -> None:
    rows = {name: real_encoder.BASE.but(strategy=name) for name in ("sapt", "seqlora")}
    rows["sapt"] = real_encoder.at_rate(rows["sapt"], 1e-3)
    made = real_encoder.ablations(rows, "made")
    assert made["sapt_tau_1"].sapt.temperature == 1
    assert made["sapt_tau_1"].query_learning_rate == pytest.approx(2e-3)
    assert made["sapt_pseudo_samples"].replay == "made"
    changed = {name for name in real_encoder.ABLATIONS if name.startswith("sapt")}
    assert set(made) == changed | {"sapt_pseudo_samples"}
    assert set(real_encoder.ablations(rows, None)) == changed


def test_hardest_wrong_weights_never_give_the_own_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, torch.Tensor] = {}

    def evaluated(model: Any, tokenizer: Any, tasks: Any, folder: Any, settings: Any, mixture: Any):
        model.sapt = SimpleNamespace(tasks=names, route=lambda ids, mask: routed)
        for name in names:
            given[name] = mixture(name)(torch.zeros(2, 3), torch.ones(2, 3))
        return SimpleNamespace(metrics=SimpleNamespace(ap=1.0, forgetting=2.0))

    names, routed = ["copa", "qqp", "wic"], torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]])
    monkeypatch.setattr(real_encoder, "evaluate_run", evaluated)
    monkeypatch.setattr(real_encoder, "unpatch", lambda model: None)
    monkeypatch.setattr(Source, "load_model", lambda self: (SimpleNamespace(), None))
    monkeypatch.setattr(Source, "load_tasks", lambda self: [])
    source = Source("model", "Long_Sequence", data=str(DATA))
    cell = Cell("sapt", "order1", 0, tmp_path, {"tasks": names})
    found = real_encoder.other_weights(source, real_encoder.BASE, cell)
    assert found["uniform"] == {"AP": 1.0, "F.Ra": 2.0}
    chosen = {name: weights.argmax(1).tolist() for name, weights in given.items()}
    assert chosen == {"copa": [1, 2], "qqp": [0, 2], "wic": [0, 1]}
