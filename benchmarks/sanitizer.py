"""NVIDIA's compute-sanitizer over the tests that run the CUDA kernels on a GPU."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import gpu_record
import measure

TOOLS = ("memcheck", "racecheck")
_ERROR_STATUS = 86


def find() -> str | None:
    """compute-sanitizer of CUDA_HOME, of the PATH, or of /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    within = (Path(home) / folder for folder in ("bin", "compute-sanitizer"))
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(map(str, within))
    )


def run(tool: str, timeout: float | None = None) -> dict[str, Any]:
    """One tool on our kernels alone, ended after `timeout` seconds.

    Returns:
        "ok": True only if tests ran, all passed and the tool reported nothing; None where there is
        no compute-sanitizer or it was ended. "said": why, its summary and that of the tests.
    """
    program = find()
    if program is None:
        return {"ok": None, "said": "compute-sanitizer not found (PATH, CUDA_HOME)"}
    command = [program, "--tool", tool, "--error-exitcode", str(_ERROR_STATUS)]
    command += ["--report-api-errors", "no", "--kernel-name", "kernel_substring=sapt_fast"]
    command += [*gpu_record.PYTEST, gpu_record.TESTS]
    environment = dict(os.environ)
    if tool == "memcheck":
        # Each tensor gets an allocation of its own, whose bounds are known; none may be made while
        # a graph is captured.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        command += ["-k", "not captured_graph"]
    status, printed = gpu_record.within(command, timeout, cwd=measure.ROOT, env=environment)
    if status is None:
        return {"ok": None, "said": f"not done after {timeout:.0f} s"}
    lines = printed.splitlines()
    found = [line.strip("= ") for line in lines if re.search("SUMMARY:", line)]
    tests = [line for line in lines if re.search(r"\d+ (passed|failed|skipped|error)", line)]
    clean = any(re.search(r"SUMMARY: 0 (errors|hazards)", line) for line in found)
    passed = any("passed" in line for line in tests)
    said = found + tests[-1:] or lines[-5:]
    return {"ok": status == 0 and clean and passed, "said": "; ".join(said)}
