"""The real experiment's script, on a tiny encoder and a few rows."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import continual_protocol
import pytest
import real_encoder
import torch
from cached_encoder import CachedEncoder
from tiny_tasks import make_encoder, word_tokenizer

from sapt_fast.continual.compare.cells import Cell
from sapt_fast.continual.data.sources import Source

DATA = Path(__file__).parents[1] / "data" / "CL_Benchmark"
RATE = continual_protocol.Grid("learning_rate", (1e-3, 1e-2), (1e-3, 1e-2))


@pytest.mark.thorough
def test_it_tunes_on_dev_compares_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    make_encoder().save_pretrained(model)
    word_tokenizer().save_pretrained(model)
    monkeypatch.setattr(real_encoder, "GRIDS", {"sapt": (RATE,), "seqlora": (RATE,)})
    given = [
        "--data", str(DATA), "--model", str(model), "--tasks", "copa,qqp", "--seeds", "0,1",
        "--rows", "sapt,seqlora", "--steps", "1", "--train-rows", "8", "--eval-rows", "4",
        "--tuning-tasks", "1", "--ablation-orders", "1", "--first", "1", "--orders", "1",
        "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    path = real_encoder.main(given)
    result = json.loads(path.read_text())
    assert path.name.endswith("-real-encoder.json")
    assert result["source"]["model"] == "model"
    assert result["orders"] == ["copa,qqp"]
    assert set(result["constant"]["tasks"]) == {"copa", "qqp"}
    for name in ("sapt", "seqlora"):
        row = result["rows"][name]
        assert [cell["seed"] for cell in row["cells"]] == [0, 1]
        best = max(row["dev_ap"]["learning_rate"].values())
        rate = row["settings"].get("learning_rate", real_encoder.BASE.learning_rate)
        assert row["dev_ap"]["learning_rate"][str(rate)] == best
    changed = [name for name in real_encoder.ABLATIONS if name.startswith("sapt")]
    assert set(result["ablations"]) == {"sapt", *changed}
    answered = result["other_weights"][0]
    assert {"uniform", "hardest_wrong", "order", "seed"} == set(answered)
    states = sorted((tmp_path / "work").rglob("state.json"))
    times = [state.stat().st_mtime_ns for state in states]
    assert json.loads(real_encoder.main(given).read_text())["rows"] == result["rows"]
    assert [state.stat().st_mtime_ns for state in states] == times


def test_rows_start_from_their_settings() -> None:
    names = continual_protocol.known_rows(real_encoder.ROWS, None)
    rows = real_encoder.settings_of(names, real_encoder.BASE, "made")
    assert rows["generative_replay"].replay == "made"
    assert rows["lwf_old_classes"].strategy_options["old_classes"]
    assert set(real_encoder.GRIDS) == set(real_encoder.ROWS)
    assert "generative_replay" not in real_encoder.settings_of(names, real_encoder.BASE, None)
    for name, settings in rows.items():
        for grid in real_encoder.GRIDS[name]:
            real_encoder.at(settings, grid.name, grid.first[0])
            assert "".join(map(str, grid.first)) in "".join(map(str, grid.values))
    with pytest.raises(SystemExit, match="unknown rows"):
        continual_protocol.known_rows(real_encoder.ROWS, "sapt,none")


@pytest.mark.parametrize(
    ("peak", "tried"), [(3.0, [3, 4, 5]), (1.0, [1, 2, 3, 4, 5]), (6.5, [3, 4, 5, 6, 7])]
)
def test_grids_grow_until_the_best_value_is_inside(
    peak: float, tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compared(source: Any, rows: Any, folder: Path) -> Any:
        [settings] = rows.values()
        ap = -abs(settings.sapt.kl_ratio - peak)
        return SimpleNamespace(cells=[SimpleNamespace(results={"metrics": {"AP": ap}})])

    monkeypatch.setattr(continual_protocol, "compare", compared)
    grid = continual_protocol.Grid("kl_ratio", tuple(range(1, 8)), (3, 4, 5))
    rows = {"sapt": real_encoder.BASE}
    source: Any = None
    best, found = continual_protocol.tune(source, rows, {"sapt": [grid]}, Path("work"))
    extended = sorted({*tried, 2} if peak == 3 else set(tried))
    assert sorted(found["sapt"]["kl_ratio"]) == extended
    assert best["sapt"].sapt.kl_ratio == {3.0: 3, 1.0: 1, 6.5: 6}[peak]


def test_states_below_the_adapters_are_those_of_the_whole_encoder() -> None:
    whole, model = make_encoder().eval(), make_encoder().eval()
    model.load_state_dict(whole.state_dict())
    cached = CachedEncoder.of(model, 1)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    for _ in range(2):  # computed, and looked up
        found = cached(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
        expected = whole(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)
        assert len(cached.lower) == 3


def test_ablations_are_of_the_rows_that_are_there() -> None:
    rows = {name: real_encoder.BASE.but(strategy=name) for name in ("sapt", "seqlora")}
    rows["sapt"] = real_encoder.at(rows["sapt"], "learning_rate", 1e-3)
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
