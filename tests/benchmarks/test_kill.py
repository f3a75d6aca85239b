"""Slices of benchmarks/kill.py and benchmarks/hostile.py, and that both can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_slices_pass_and_faults_are_noticed(tmp_path: Path) -> None:
    """In one test: its child imports torch and transformers once for all of them."""
    process = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kill_slices.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")]),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert process.returncode == 0, process.stderr
    ended = json.loads(process.stdout.splitlines()[-1])

    code, summary = ended["kill"]
    assert summary["failed"] == []
    assert (code, summary["by_kind"]) == (0, {"save": 3, "race": 1, "disk": 3})
    code, summary = ended["a save that is not atomic"]
    assert code == 1
    assert any("does not load" in failure["wrong"] for failure in summary["failed"])

    code, summary = ended["hostile"]
    assert summary["failed"] == []
    assert (code, summary["files"]) == (0, 8)
    code, summary = ended["a reader that runs code"]
    assert code == 1
    assert "executed" in [words for failure in summary["failed"] for words in failure["wrong"]]
