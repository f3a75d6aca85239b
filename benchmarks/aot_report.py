"""Compile every Triton kernel ahead of time, as it would be launched, and report its resources.

    python benchmarks/aot_report.py [--quick] [--capability N]... [--case NAME]... [--only PART]

Needs no GPU. The launchers run on tensors without memory; each launch is recorded with the exact
specialisation Triton would compile, and compiled for compute capabilities 8.0, 8.6, 8.9, 9.0, 10.0
and 12.0. The exit code is 1 if a kernel has a problem (`aot_checks`) that is not in the table of
known ones (`aot_known`), or if in a whole report a known problem no longer occurs.

What was compiled is kept in a folder, by a digest of all that it depends on. So a run that was
interrupted goes on where it was, and after a change only what it concerns is compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import inspect
import io
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # its default changes with Triton 3.10

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import aot_checks
import aot_known
import cases
from op_case import LaunchCase

from sapt_fast.triton_kernels.blocks import common

# A100, RTX 3090, L40S, H200, B200, RTX PRO 6000.
NUM_SMS = {80: 108, 86: 82, 89: 142, 90: 132, 100: 148, 120: 188}


@dataclass(frozen=True)
class Job:
    """One kernel as Triton would compile it for one launch."""

    case: LaunchCase
    capability: int
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[Any, Any]
    attrs: dict[Any, Any]
    options: dict[str, int | None]

    @property
    def name(self) -> str:
        """Of the kernel."""
        return self.kernel.fn.__name__.strip("_")

    @property
    def row(self) -> dict[str, Any]:
        """What the report says of it before it is compiled."""
        return {
            "kernel": self.name,
            "case": self.case.name,
            "capability": self.capability,
            "tile": _tile(self),
            **self.options,
        }

    def digest(self) -> str:
        """Of all that the result of `compile_job` depends on."""
        parts = (
            triton.__version__, *SOURCES,
            self.name in aot_known.STREAMS, self.kernel.cache_key,
            self.capability, self.signature, self.constexprs, self.attrs, self.options,
            self.case.aligned,
        )  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def record(case: LaunchCase, capability: int, jobs: dict[tuple[str, ...], Job]) -> None:
    """Run a case on tensors without memory and add what it would compile to `jobs`."""

    def on_compile(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        chosen = json.loads(compile["specialization_data"])["options"]
        options = {name: chosen[name] for name in ("num_warps", "num_stages", "maxnreg")}
        job = Job(
            case, capability, fn.jit_function,
            compile["signature"], compile["constants"], compile["configs"][0], options,
        )  # fmt: skip
        jobs.setdefault((str(capability), fn.name, key), job)
        return True  # handled: Triton neither compiles nor launches

    def tensor(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    target = GPUTarget("cuda", capability, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: capability,
            get_current_stream=lambda device: 0,
        )
    )
    shared = aot_checks.SHARED_LIMIT[capability]
    traits = common.DeviceTraits(capability, NUM_SMS[capability], shared=shared)
    triton.knobs.runtime.jit_cache_hook = on_compile
    common.device_traits, original = (lambda device: traits), common.device_traits
    try:
        case.launch(tensor)
    finally:
        common.device_traits = original
        triton.knobs.runtime.jit_cache_hook = None


def compile_job(job: Job) -> dict[str, Any]:
    """Compile one kernel and return what it uses, and under "problems" what is wrong with it."""
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    source = ASTSource(
        fn=job.kernel, signature=job.signature, constexprs=job.constexprs, attrs=job.attrs
    )
    target = GPUTarget("cuda", job.capability, 32)
    printed = io.StringIO()
    started = time.perf_counter()
    try:
        with contextlib.redirect_stdout(printed):
            compiled = triton.compile(source, target=target, options=job.options)
    except Exception as error:
        return {"problems": [f"does not compile: {str(error).strip()[-200:]}"]}
    log, ptx, ttir = printed.getvalue(), compiled.asm["ptx"], compiled.asm["ttir"]
    problems = [
        *aot_checks.spills(log),
        *aot_checks.serialised(log),
        *aot_checks.drained(ptx),
        *aot_checks.too_much_shared(compiled.metadata.shared, job.capability),
    ]
    if job.case.aligned:
        problems += aot_checks.off_the_matrix_unit(ttir, ptx, job.capability)
        problems += aot_checks.synchronous(ptx)
        problems += aot_checks.narrow(ptx, streams=job.name in aot_known.STREAMS)
    return {
        "registers": _number(r"Used (\d+) registers", log),
        "spill_bytes": _number(r"(\d+) bytes spill stores", log),
        "shared_bytes": compiled.metadata.shared,
        "matrix_instructions": ptx.count(aot_checks.MATRIX_UNIT[job.capability]),
        "async_copies": {
            "tma": ptx.count("cp.async.bulk.tensor"),
            "cp.async": len(re.findall(r"cp\.async\.c[ag]", ptx)),
        },
        "seconds": round(time.perf_counter() - started, 1),
        "problems": problems,
    }


SOURCES = (inspect.getsource(compile_job), inspect.getsource(aot_checks))


def kept_or_compiled(job: Job, folder: Path) -> dict[str, Any]:
    """`compile_job`, or what an earlier run has kept of it in the folder."""
    file = folder / f"{job.digest()}.json"
    if file.exists():
        result: dict[str, Any] = json.loads(file.read_text())
        return result | {"kept": True}
    result = compile_job(job)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(result))
    part.replace(file)
    return result


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match.group(1)) if match else 0


def _tile(job: Job) -> str:
    by_name = {job.kernel.arg_names[path[0]]: value for path, value in job.constexprs.items()}
    sides = [by_name.get(f"BLOCK_{side}") for side in "MNKRST"] + [by_name.get("KEPT")]
    tile = "x".join(str(side) for side in sides if side is not None)
    segments = by_name.get("SEGMENTS")
    return tile if segments is None else f"{tile} seg{segments}"


def _print_row(row: dict[str, Any], progress: str) -> None:
    used = "{registers:4d} regs {shared_bytes:7d} B shared".format_map(
        {"registers": 0, "shared_bytes": 0, **row}
    )
    known = [f"known: {problem}" for problem in row["known"]]
    print(
        f"{progress} sm_{row['capability']:<4}{row['kernel']:<20}{row['case']:<26}"
        f"{row['tile']:<20}w{row['num_warps']} s{row['num_stages']} {used} "
        f"{row.get('seconds', 0):5.1f} s  {'; '.join(row['problems'] + known) or 'ok'}",
        flush=True,
    )


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="main cases only, nothing written")
    parser.add_argument("--case", action="append", help="this case only; may be repeated")
    parser.add_argument("--only", help="only kernels whose name contains this")
    parser.add_argument("--capability", type=int, choices=NUM_SMS, action="append")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="[default: all cores]")
    parser.add_argument("--output", type=Path, help="default: results/aot/triton-<version>.json")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument(
        "--keep", type=Path, default=caches / "sapt_fast" / "aot", metavar="FOLDER",
        help="of what was compiled [default: in the user's cache]",
    )  # fmt: skip
    return parser.parse_args()


def _jobs(options: argparse.Namespace) -> list[Job]:
    """What the options choose, in a fixed order."""
    found: dict[tuple[str, ...], Job] = {}
    for case in cases.gathered("LAUNCHES"):
        for capability in options.capability or NUM_SMS:
            # float16 has the tiles and, but for their type, the instructions of bfloat16.
            twin = case.dtype == torch.float16 and capability != 90
            chosen = case.name in options.case if options.case else case.quick or not options.quick
            if chosen and not twin:
                record(case, capability, found)
    return [job for job in found.values() if (options.only or "") in job.name]


def _results(jobs: list[Job], folder: Path, workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and result of each job, in the order in which they are done."""
    global _JOBS
    _JOBS = jobs
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(max_workers=workers, mp_context=context) as pool:
        numbers = {pool.submit(_run_number, i, folder): i for i in range(len(jobs))}
        for done in as_completed(numbers):
            yield numbers[done], done.result()


def main() -> int:
    """Run the report; the exit code tells whether every kernel is sound."""
    options = _parsed()
    jobs = _jobs(options)
    rows: dict[int, dict[str, Any]] = {}
    started, compiled = time.monotonic(), 0
    for number, result in _results(jobs, options.keep, options.jobs):
        rows[number] = jobs[number].row | result
        compiled += not result.get("kept")
        each = (time.monotonic() - started) / max(compiled, 1)
        left = f"{each * (len(jobs) - len(rows)) / 60:.0f} min left" if compiled else ""
        [shown], _ = aot_checks.judge([rows[number]], aot_known.KNOWN)
        _print_row(shown, f"[{len(rows)}/{len(jobs)} {left:>12}]")
    judged, stale = aot_checks.judge([rows[i] for i in sorted(rows)], aot_known.KNOWN)
    bad = [row for row in judged if row["problems"]]
    excused = sum(bool(row["known"]) for row in judged)
    print(
        f"triton {triton.__version__}: {len(judged)} kernels, {len(bad)} with problems, "
        f"{excused} with known ones"
    )
    output = options.output
    chosen = options.quick or options.case or options.only or options.capability
    for entry in stale if not chosen else ():
        print(f"no longer so, to be removed from aot_known.py: {entry}")
    if output is None and not chosen:
        output = Path(__file__).parent / "results" / "aot" / f"triton-{triton.__version__}.json"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        report = {"triton": triton.__version__, "kernels": judged}
        output.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if bad or (stale and not chosen) else 0


_JOBS: list[Job] = []


def _run_number(number: int, folder: Path) -> dict[str, Any]:
    """`kept_or_compiled` of a job that the worker inherited when it was forked."""
    return kept_or_compiled(_JOBS[number], folder)


if __name__ == "__main__":
    sys.exit(main())
