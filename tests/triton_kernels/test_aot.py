"""The kernels compile for three GPU generations, without spills and on the matrix unit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_kernels_compile_soundly() -> None:
    """In a process of its own: kernels of this one may belong to the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    report = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "aot_report.py"), "--quick"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    assert report.returncode == 0, report.stdout[-6000:] + report.stderr[-2000:]
