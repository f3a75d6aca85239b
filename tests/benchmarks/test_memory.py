"""memory.py in small: it runs, and it reports no time of what is wrong."""

import json

import memory
import memory_figures
import memory_step
import pytest
import torch
from memory_step import KINDS, Sizes

from sapt_fast.pools.key_index import KINDS as INDEXES

SIZES = Sizes(width=16, hidden=8, key_width=4, k=3, sequences=2, tokens=3)
EXPERTS = (64, 100)


@pytest.fixture
def result(clock):
    pytest.importorskip("faiss")
    found = memory.measured(EXPERTS, SIZES, repeats=1)
    found["steps"] = [
        {
            "kind": kind,
            "experts": count,
            "ms": {"median": 2.0},
            "peak_bytes": 3 * count,
            "optimizer_bytes": 4 * count + 1000,
            "touched": 10,
        }
        for kind in KINDS
        for count in EXPERTS
    ]
    return {**found, "experts": EXPERTS, "quick": False}


def test_all_is_right_and_timed(result):
    assert all(row["ok"] for row in result["correctness"].values())
    for kind in INDEXES:
        for count in EXPERTS:
            assert {f"search {kind} {count}", f"token {kind} {count}"} <= result["decode_ms"].keys()
    exact = [row for row in result["recall"] if row["kind"] in ("exact", "product")]
    assert {(row["near"], row["random"]) for row in exact} == {(1.0, 1.0)}
    place = {name: index + 1 for index, name in enumerate(result["decode_ms"])}
    assert memory.summary(result) == {
        "decode_product_1e6_over_1e3": place["token product 100"] / place["token product 64"],
        "decode_exact_1e6_over_copy": 2 * place["search exact 100"] / place["copy of the keys"],
        "state_bytes_per_touched": 140.0,
        "step_peak_1e6_over_1e3": 100 / 64,
    }


def test_no_time_of_what_is_wrong(clock):
    pytest.importorskip("faiss")
    with torch.inference_mode():
        made = memory.Memory(64, SIZES)
        made.index("exact").search = lambda query, k: (
            query.new_zeros(len(query), k),
            torch.arange(k).expand(len(query), k),
        )
        gate = memory.correctness(made, SIZES)
        assert [name for name, row in gate.items() if not row["ok"]] == ["exact, N 64"]
        times = memory.decoding([made], gate, 1)
    assert not [name for name in times if "exact" in name]
    assert "token product 64" in times


def test_every_kind_of_step_is_adam(monkeypatch):
    assert all(row["ok"] for row in memory_step.correctness(SIZES).values())
    sums = memory_step.segment_sums
    monkeypatch.setattr(memory_step, "segment_sums", lambda *given: 1.01 * sums(*given))
    wrong = [name for name, row in memory_step.correctness(SIZES).items() if not row["ok"]]
    assert wrong == ["step, reverse_index"]


def test_a_step_is_measured_in_its_process(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["", *memory_step.command("ours", 256, SIZES, 2)])
    memory_step.main()
    row = json.loads(capsys.readouterr().out)
    assert (row["kind"], row["experts"], row["touched"]) == ("ours", 256, 24)


@pytest.mark.thorough
def test_tables_and_plot(result, tmp_path):
    result |= {
        "environment": {"cpu": "C", "threads": 1, "torch": "T", "date": "D", "commit": "X"},
        "targets": memory.targets(memory.summary(result), SIZES),
    }
    result["steps"][-1] = {"kind": "dense", "experts": 100, "not_measured": "too large"}
    text = "\n".join(memory_figures.block(result))
    assert "| product keys | 100 | " in text
    assert "| nn.Embedding, AdamW | 100 | not measured: too large | | |" in text
    memory_figures.draw(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
