"""Which calls of the CUDA kernels ran correctly on a GPU: `sapt_fast/cuda_kernels/recorded.json`.

Evidence are the tests of `tests/cuda_kernels/test_gpu.py` that are marked with `kernels`. This file
is also the pytest plugin that notes how they end, after each of them: a process that is killed
leaves what it did.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure
import pytest

from sapt_fast.cuda_kernels import common

TESTS = "tests/cuda_kernels/test_gpu.py"
# Without the options of plugins that a borrowed machine need not have.
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
PYTEST += ["-o", "addopts=--strict-markers"]
_VARIABLE = "SAPT_FAST_GPU_OUTCOMES"
_DTYPES = {str(dtype): str(dtype).removeprefix("torch.") for dtype in common.DTYPES}

Case = dict[str, Any]
Record = dict[str, dict[str, Any]]


# --- the plugin --------------------------------------------------------------------------------


class Outcomes:
    """Notes of each marked test what it runs and how it ends: "not run", "passed", "failed"...

    Attributes:
        cases: by the test's id; of each "op", "dtype", "rows" (None: counts for all) and "outcome".
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.cases: dict[str, Case] = {}

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        mark = item.get_closest_marker("kernels")
        if mark is not None:
            given = item.callspec.params if hasattr(item, "callspec") else {}
            [op] = mark.args or [given["op"]]
            rows = mark.kwargs.get("rows")
            self.cases[item.nodeid] = {
                "op": op,
                "dtype": _DTYPES[str(given["dtype"])] if "dtype" in given else None,
                "rows": given[rows] if rows else None,
                "outcome": "not run",
            }

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        case = self.cases.get(report.nodeid)
        if case is None:
            return
        ends = report.when == "call" or report.outcome != "passed"  # before or behind it too
        if ends and case["outcome"] in ("not run", "passed"):
            case["outcome"] = report.outcome
        if report.when == "teardown":
            self.write()

    def pytest_sessionfinish(self) -> None:
        self.write()

    def write(self) -> None:
        measure.write(self.file, json.dumps(self.cases))


def pytest_configure(config: pytest.Config) -> None:
    """Takes part where `run` asks for it."""
    if _VARIABLE in os.environ:
        config.pluginmanager.register(Outcomes(Path(os.environ[_VARIABLE])))


# --- running and recording ---------------------------------------------------------------------


def run(timeout: float | None = None) -> dict[str, Any]:
    """The GPU tests of the CUDA kernels, in a process of their own.

    Returns:
        "ok": whether tests ran and all of them passed; "said": pytest's last lines; "cases".
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes.json"
        path = [str(measure.ROOT / "benchmarks"), str(measure.ROOT), os.environ.get("PYTHONPATH")]
        environment = {
            **os.environ,
            _VARIABLE: str(file),
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
        }
        command = [*PYTEST, "-p", "gpu_record", TESTS]
        status, printed = within(command, timeout, cwd=measure.ROOT, env=environment)
        cases = json.loads(file.read_text()) if file.exists() else {}
    passed = bool(cases) and all(case["outcome"] == "passed" for case in cases.values())
    said = "\n".join(printed.splitlines()[-15:])
    if status is None:
        said += f"\nnot done after {timeout:.0f} s"
    return {"ok": status == 0 and passed, "said": said, "cases": cases}


def within(command: list[str], timeout: float | None, **options: Any) -> tuple[int | None, str]:
    """Status and output of a command; the status is None if it was ended with all its children."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    ) as process:
        try:
            printed, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]
    return process.returncode, printed


def sources() -> dict[str, str]:
    """The digest of each op's CUDA sources in this build; empty without CUDA."""
    try:
        return {str(op): str(d) for op, d in common.native().cuda_runtime()["sources"].items()}
    except ImportError:
        return {}


def of(result: dict[str, Any]) -> Record:
    """What a report of gpu_check is evidence for: an entry of recorded.json by op.

    Of an op, a dtype and a class of rows every case must have run and passed, and so must the
    op's cases without them. An op that another check of the report found wrong has no entry.
    """
    cases = list((result["cuda tests"] or {"cases": {}})["cases"].values())
    record: Record = {}
    for op, source in result["cuda sources"].items():
        of_op = [case for case in cases if case["op"] == op]
        general = [case for case in of_op if None in (case["dtype"], case["rows"])]
        if op in _found_wrong(result) or not all(c["outcome"] == "passed" for c in general):
            continue
        ran = {dtype: _classes(of_op, dtype) for dtype in _DTYPES.values()}
        if any(ran.values()):
            record[op] = {"source": source, "ran": {d: rows for d, rows in ran.items() if rows}}
    return record


def _classes(cases: list[Case], dtype: str) -> list[int]:
    passed: dict[int, bool] = {}
    for case in cases:
        rows = None if case["rows"] is None else common.row_class(case["rows"])
        if case["dtype"] == dtype and rows is not None:
            passed[rows] = passed.get(rows, True) and case["outcome"] == "passed"
    return sorted(rows for rows, right in passed.items() if right)


def _found_wrong(result: dict[str, Any]) -> set[str]:
    gate = result["correctness"]
    found = {name for name, row in gate.items() if name.endswith("_cuda") and not row["ok"]}
    wrong = {"mixed_lora" if n == "ours_cuda" else n.removesuffix("_cuda") for n in found}
    pairs = gate.get("pairs of mixed_lora", {"cases": []})["cases"]
    if any("ours_cuda" in case["wrong"] for case in pairs):
        wrong.add("mixed_lora")
    return wrong


def merge(record: Record) -> list[str]:
    """Adds a record to recorded.json, where it replaces what is known of other sources.

    Returns:
        Lines that say what is recorded now.
    """
    recorded = json.loads(common.RECORDED.read_text())
    lines = []
    for op, new in record.items():
        old = recorded.get(op, {})
        ran = dict(old["ran"]) if old.get("source") == new["source"] else {}
        for dtype, rows in new["ran"].items():
            ran[dtype] = sorted({*rows, *ran.get(dtype, ())})
        recorded[op] = {"source": new["source"], "ran": ran}
        lines.append(f"{op}: " + "; ".join(f"{d} {rows}" for d, rows in ran.items()))
    measure.write(common.RECORDED, json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    return lines


def merge_file(file: Path) -> list[str]:
    """`merge` of the record within a file of gpu_check.

    Raises:
        ValueError: it is no such file, or one of small sizes.
    """
    result = json.loads(file.read_text())
    if not isinstance(result, dict) or result.get("kind") != "gpu_check":
        raise ValueError(f"--record-from: got {file}, expected a file written by gpu_check")
    if result["quick"]:
        raise ValueError(f"--record-from: got {file} of small sizes, expected a full run")
    return merge(of(result))
