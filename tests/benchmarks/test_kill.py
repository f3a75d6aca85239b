"""A slice of benchmarks/kill.py and benchmarks/hostile.py, and that both can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# A save that is not atomic, and a reader that trusts what it reads.
BROKEN_SAVE = """
import shutil, kill
def save(saves, number, folder):
    for path in folder.iterdir():
        if path.name != "notes.txt":
            path.unlink() if path.is_file() else shutil.rmtree(path)
    shutil.copytree(saves.work / f"version{number}", folder, dirs_exist_ok=True)
kill.Saves.save = save
raise SystemExit(kill.main(["--only", "save", "--kills", "8"]))
"""
TRUSTING = """
import sys, hostile
from pathlib import Path
from functools import partial
whole = Path(sys.argv[1]) / "whole"
whole.mkdir()
(whole / "options.yaml").write_text("a: 1\\n")
import yaml
target = hostile.Target(whole, ("options.yaml",), lambda folder: yaml.unsafe_load(
    (folder / "options.yaml").read_text()))
hostile.targets = lambda work: {"config": target}
raise SystemExit(hostile.main(["--files", "30", "--only", "config"]))
"""


def run(*arguments: str) -> tuple[int, dict]:
    process = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")]),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert process.stdout, process.stderr
    return process.returncode, json.loads(process.stdout.splitlines()[-1])


def test_saves_races_and_full_disks() -> None:
    kinds = ("save", "race", "disk")
    code, summary = run(
        str(ROOT / "benchmarks" / "kill.py"), "--only", *kinds, "--kills", "8", "--races", "3"
    )
    assert summary["failed"] == []
    assert code == 0
    assert summary["by_kind"] == {"save": 8, "race": 3, "disk": 8}


def test_a_broken_save_is_noticed() -> None:
    code, summary = run("-c", BROKEN_SAVE)
    assert code == 1
    assert any("does not load" in failure["wrong"] for failure in summary["failed"])


def test_hostile_checkpoints_are_refused_in_words() -> None:
    code, summary = run(str(ROOT / "benchmarks" / "hostile.py"), "--files", "40", "--seed", "1")
    assert summary["failed"] == []
    assert code == 0


def test_a_reader_that_runs_code_is_noticed(tmp_path: Path) -> None:
    code, summary = run("-c", TRUSTING, str(tmp_path))
    assert code == 1
    wrong = [words for failure in summary["failed"] for words in failure["wrong"]]
    assert "executed" in wrong
