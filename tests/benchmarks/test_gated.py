"""The benchmark of gated experts: what it times is correct, and a wrong kind is found."""

import gated
import pytest
import torch

SIZES = gated.Sizes(rows=67, width=24, experts=12, rank=2)


@pytest.mark.parametrize("kind", ["gated", "all", "shared", "own"])
def test_each_kind_of_ours_is_correct(kind):
    assert gated.correctness([(kind, SIZES)])[f"{kind}, {SIZES}"]["ok"]


def test_a_wrong_kind_is_found(monkeypatch):
    right = gated.GatedPool._of_chosen
    monkeypatch.setattr(gated.GatedPool, "_of_chosen", lambda *args: 1.001 * right(*args))
    report = gated.correctness([("gated", SIZES)])
    assert not report[f"gated, {SIZES}"]["ok"]


def test_the_loops_agree():
    loop, of_all = (gated.Layer(kind, SIZES, torch.float64).step() for kind in ("loop", "loop_all"))
    for name, value in loop.items():
        torch.testing.assert_close(value, of_all[name])
