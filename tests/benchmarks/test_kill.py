"""Slices of benchmarks/kill.py and benchmarks/hostile.py, and that both can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def runs_of(script: str, *arguments: str) -> dict[str, Any]:
    """What a script of tests/ prints; its child imports torch and transformers once."""
    process = subprocess.run(
        [sys.executable, str(ROOT / "tests" / script), *arguments],
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
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return found


def test_slices_pass_and_faults_are_noticed(tmp_path: Path) -> None:
    """In one test, for the sake of the imports."""
    ended = runs_of("kill_slices.py", str(tmp_path))
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


@pytest.mark.thorough
def test_memorise_comes_to_the_same_bits_after_kills() -> None:
    ended = runs_of("kill_memorise_slices.py")
    assert ended["exact"][1]["failed"] == []
    assert ended["exact"][1]["by_kind"] == {"memorise": 9}
    code, summary = ended["rounded"]
    assert code == 1
    assert {"another", "other"} & set(summary["failed"][0]["wrong"].split())
