"""search_check in small: it runs, it finds errors, and it reports no speed where there are any."""

import cases
import op_checks
import pytest
import search_check
import torch
from cases.pool_tokens import PoolCase

pytest.importorskip("sapt_fast._C", reason="built without native kernels")
pytestmark = pytest.mark.usefixtures("clock")
OPS = {case.op for case in cases.gathered("CPU_CHECKED")}


def test_every_kernel_is_checked_and_timed(monkeypatch):
    gathered = cases.gathered
    small = [case for case in gathered("CHECKED_QUICK") if case.op in OPS]
    monkeypatch.setattr(
        cases, "gathered", lambda name: small if name == "CPU_CHECKED" else gathered(name)
    )
    result = search_check.run(quick=True, repeats=2)
    assert {op: row["ok"] for op, row in result["correctness"].items()} == dict.fromkeys(OPS, True)
    assert {row["op"] for row in result["rows"]} == OPS
    for row in result["rows"]:
        assert list(row["ms"])[:3] == ["ours", "reference", "torch"]
    values = {row["what"]: row["value"] for row in result["targets"]}
    assert values["topk_keys: torch product and topk / ours"] == 3
    for op in OPS:
        assert values[f"{op}: reference / ours, least case"] == 2


def test_no_speed_where_correctness_failed(monkeypatch):
    passed = {op: {"ok": op != "topk_keys"} for op in OPS}
    monkeypatch.setattr(op_checks, "correctness", lambda *_: passed)
    result = search_check.run(quick=True, repeats=2)
    assert [row["op"] for row in result["rows"] if "ms" not in row] == ["topk_keys"]
    unmet = {row["what"] for row in result["targets"] if row["value"] is None}
    assert unmet == {row["what"] for row in result["targets"] if "topk_keys" in row["what"]}


def test_the_pooling_case_has_no_ties():
    table = PoolCase(2, 3, 5, 250).inputs(torch.bfloat16, "cpu")["table"]
    assert all(len(column.unique()) == 250 for column in table.t())
