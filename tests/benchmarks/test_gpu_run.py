"""gpu_run.sh with a stand-in for Python: which sections run, what is resumed, and the status."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_run.sh"
PLAN = ["check", "build", "kernels", "decode", "ops", "layers", "steps", "tests"]


@pytest.fixture
def call(tmp_path):
    """Runs the script; `fails` maps parts of a command to its status. Gives status and output."""
    python = tmp_path / "python"

    def run(*sections, fails=None, **variables):
        cases = [f'*"{part}"*) exit {status} ;;' for part, status in (fails or {}).items()]
        lines = ["#!/bin/sh", f'echo "$*" >> {tmp_path}/calls', 'case "$*" in', *cases, "esac"]
        python.write_text("\n".join(lines) + "\n")
        python.chmod(0o755)
        (tmp_path / "calls").write_text("")
        named = {"PYTHON": python, "OUT": tmp_path / "out", "REHEARSE": 1, **variables}
        environment = {**os.environ, **{name: str(value) for name, value in named.items()}}
        done = subprocess.run([SCRIPT, *sections], env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def calls():
        return (tmp_path / "calls").read_text().splitlines()

    run.calls = calls
    return run


def _sections(printed):
    return [line.removeprefix("== ") for line in printed.splitlines() if line.startswith("== ")]


def test_all_in_order_and_once(call):
    status, printed = call()
    assert (status, _sections(printed)) == (0, PLAN)
    commands = [line for line in call.calls() if "gpu_check.py" in line]
    assert [line.partition("--only ")[2].split()[0] for line in commands] == [
        "correctness",
        *("decode", "ops", "layers", "steps"),
    ]
    assert all("--rehearse" in line and "--budget 5" in line for line in commands)
    status, printed = call()
    assert (status, _sections(printed), call.calls()) == (0, [], [])


def test_a_failure_is_named_and_the_others_run(call):
    status, printed = call(fails={"--only decode": 1, "tests/gpu": 1})
    assert (status, _sections(printed)) == (1, PLAN)
    assert printed.splitlines()[-2:] == ["FAILED: decode", "FAILED: tests"]
    assert call()[0] == 1  # it has not been mended
    assert call("decode")[0] == 1
    assert call("tests")[0] == 0


def test_a_section_that_hangs_is_ended_and_named(call):
    status, printed = call("ops", fails={"--only ops": "$(sleep 60)"}, CALL_SECONDS=1)
    assert status == 1
    assert "FAILED: ops (ended after its time)" in printed


def test_nothing_begins_without_time(call):
    status, printed = call(CALL_SECONDS=100)
    assert (status, _sections(printed)) == (3, PLAN[:1])
    assert f"to do: {' '.join(PLAN[1:])}" in printed
    status, printed = call()
    assert (status, _sections(printed)) == (0, PLAN[1:])


def test_a_section_whose_budget_ended_is_right(call):
    status, printed = call(fails={"--only layers": 3})
    assert status == 0
    assert "layers: right, but the time ended" in printed


def test_named_sections(call, tmp_path):
    status, printed = call("ops", "sanitize")
    assert (status, _sections(printed)) == (3, ["ops", "sanitize"])
    assert "--only decode" in call.calls()[-1]
    assert f"--sanitize --out {tmp_path}/out/sanitizer" in call.calls()[-1]
    status, printed = call("ops", "opps")
    assert status == 2
    assert "got section 'opps', expected one of check build" in printed
    assert call.calls() == []
