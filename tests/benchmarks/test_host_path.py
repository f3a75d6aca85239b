"""host_path in small."""

import json

import pytest
from uninterpreted import ROOT, printed

pytest.importorskip("triton")


def test_it_prints_the_ratio_of_each_case():
    lines = printed(str(ROOT / "benchmarks" / "host_path.py"), "--rounds", "1").splitlines()
    ratios = json.loads(lines[-1])
    assert list(ratios) == ["no_grad_one", "no_grad_qv", "train_one", "train_qv"]
    assert all(ratio > 0 for ratio in ratios.values())
