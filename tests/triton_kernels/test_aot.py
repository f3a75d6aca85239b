"""The kernels compile for six kinds of GPU, without spills and on the matrix unit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "capability",
    [
        "90",
        *(pytest.param(c, marks=pytest.mark.thorough) for c in ("80", "86", "89", "100", "120")),
    ],
)
def test_kernels_compile_soundly(capability: str) -> None:
    """In a process of its own: kernels of this one may belong to the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    report = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "aot_report.py"), "--quick"),
            *("--capability", capability),
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=1500,
        check=False,
    )
    assert report.returncode == 0, report.stdout[-6000:] + report.stderr[-2000:]


GROWING_POOL = """
import aot_report
from cases.mixed_lora import Launch
jobs, counts = {}, []
for adapters in (13, 14, 15, 16):  # 52 to 64 ranks, and 13 to 16
    case = Launch(
        "grows", 16, 512, 1024, 1024, (4,) * adapters, siblings=((512, (1,) * adapters),)
    )
    aot_report.record(case, 90, jobs)
    counts.append(len(jobs))
print(*counts)
"""


def test_a_growing_pool_compiles_nothing_new() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    report = subprocess.run(
        [sys.executable, "-c", GROWING_POOL],
        capture_output=True,
        text=True,
        env=environment,
        timeout=1500,
        check=False,
    )
    assert report.returncode == 0, report.stderr[-2000:]
    first, *others = report.stdout.split()
    assert int(first) > 5
    assert others == [first] * 3
