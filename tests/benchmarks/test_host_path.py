"""host_path in small, in a process of its own: kernels of this one belong to the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def printed(*arguments: str) -> str:
    """The last line that Python prints on these arguments, with the benchmarks to import."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()[-1]


def test_it_prints_the_ratio_of_each_case():
    ratios = json.loads(printed(str(ROOT / "benchmarks" / "host_path.py"), "--rounds", "1"))
    assert list(ratios) == ["no_grad_one", "no_grad_qv", "train_one", "train_qv"]
    assert all(ratio > 0 for ratio in ratios.values())
