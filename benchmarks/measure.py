"""Timing, memory and the description of the machine, shared by all benchmarks."""

import hashlib
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_TURN_MS = 2.0
_LEAD_CYCLES = 2_000_000  # of the GPU's clock: about a millisecond
COMMIT_VARIABLE = "SAPT_FAST_COMMIT"  # of a tree without .git
_TF32_VARIABLES = ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE")
_PACKAGES = ("torch", "triton", "transformers", "peft", "numpy")


def interleaved_ms(
    functions: dict[str, Callable[[], object]], device: str, *, repeats: int, warmup: int = 2
) -> dict[str, dict[str, float]]:
    """Quantiles 0.2, 0.5 and 0.8 of each function's time in milliseconds.

    On the CPU the functions take turns, so that a disturbance meets all of them; a turn is one
    call, or as many as fill two milliseconds, after an untimed call of the same function. On a GPU
    each is timed by events with a cold L2 cache, and the GPU waits for about a millisecond before
    each call: the time is that of the kernels, as long as the host issues them in less, which a
    training step lets it do ahead.
    """
    if device.startswith("cuda"):
        return {name: _cuda_ms(function, repeats) for name, function in functions.items()}
    calls = {}
    for name, function in functions.items():
        for _ in range(warmup):
            once = _turn_ms(function, 1)
        calls[name] = max(1, round(_TURN_MS / once))
    times: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    for _ in range(repeats):
        shuffle(order)  # none always follows the one that leaves the memory in disorder
        for name in order:
            functions[name]()  # untimed: the one before leaves caches cold and the heap in disorder
            times[name].append(_turn_ms(functions[name], calls[name]))
    return {name: _quantiles(values) for name, values in times.items()}


def _turn_ms(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) * 1e3 / calls


def _cuda_ms(function: Callable[[], object], repeats: int) -> dict[str, float]:
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    for _ in range(3):
        function()
    values = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(_LEAD_CYCLES)
        start.record()
        function()
        end.record()
        end.synchronize()
        values.append(start.elapsed_time(end))
    return _quantiles(values)


def _quantiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return {"p20": cuts[0], "median": statistics.median(values), "p80": cuts[3]}


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """Memory that one call needs at its peak beyond what is held before it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = restart_peak()
    function()
    return resident("VmHWM") - before


def restart_peak() -> int:
    """Lets the high-water mark of this process, "VmHWM", start afresh; returns where it starts."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> int:
    """Bytes of a line of /proc/self/status, as "VmRSS"."""
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"{field}:\s+(\d+) kB", status)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(match.group(1)) * 1024


def import_seconds(module: str, *, after: str, repeats: int = 3) -> float:
    """Median over fresh processes of the time to import a module once `after` is imported."""
    code = (
        f"import {after}, time; start = time.perf_counter(); import {module}; "
        "print(time.perf_counter() - start)"
    )
    command = [sys.executable, "-c", code]
    return statistics.median(
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(repeats)
    )


def environment(device: str) -> dict[str, Any]:
    """What the numbers depend on: machine, versions, commit."""
    description: dict[str, Any] = {
        "machine": machine_name(device),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        **_source(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu": _cpu_model(),
    }
    for package in _PACKAGES:
        try:
            description[package] = version(package)
        except PackageNotFoundError:
            description[package] = None
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        description["gpu"] = properties.name
        description["gpu_memory_bytes"] = properties.total_memory
        description["multiprocessors"] = properties.multi_processor_count
        description["cuda"] = torch.version.cuda
        description["driver"] = _driver()
        description["tf32"] = tf32()
    return description


def tf32() -> dict[str, Any]:
    """Whether float32 products of cuBLAS and cuDNN are cut to TF32, and who says so."""
    return {
        **{name: os.environ.get(name) for name in _TF32_VARIABLES},
        "cuda.matmul.allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def _source() -> dict[str, Any]:
    """The commit, and a digest of the Python package by which it is known without .git.

    Whether there are changes is None where git cannot tell.
    """
    changes = _git("status", "--porcelain", "--untracked-files=no")
    package = sorted((ROOT / "sapt_fast").rglob("*.py"))
    text = b"".join(path.read_bytes() for path in package)
    return {
        "commit": os.environ.get(COMMIT_VARIABLE) or _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": None if changes == "unknown" else bool(changes),
        "package": hashlib.sha256(text).hexdigest()[:16],
    }


def machine_name(device: str) -> str:
    """A folder name for the machine: the GPU, or the CPU and its cores."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_model()} {torch.get_num_threads()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def save(result: dict[str, Any], out: Path) -> Path:
    """Writes `<out>/<machine>/<date>-<commit>.json`, `...-<only>.json` for one part of it."""
    about = result["environment"]
    name = "-".join(filter(None, (about["date"], about["commit"], result.get("only"))))
    path = out / about["machine"] / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(result, indent=1) + "\n")
    return path


def write(path: Path, text: str) -> None:
    """Replaces a file as a whole: whoever is ended meanwhile leaves the old one or the new one."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(text)
    draft.replace(path)


def _cpu_model() -> str:
    match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return match.group(1).strip() if match else platform.machine()


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return run.stdout.strip() if run.returncode == 0 else "unknown"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].strip()
    except FileNotFoundError:
        return "unknown"
