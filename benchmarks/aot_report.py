"""Compile every Triton kernel ahead of time, as it would be launched, and report its resources.

    python benchmarks/aot_report.py [--quick] [--output FILE]

Needs no GPU. The launchers run on tensors without memory; each launch is recorded with the exact
specialisation Triton would compile, and compiled for compute capabilities 8.0 to 12.0. The exit
code is 1 if a kernel spills registers, has its matrix instructions serialised, needs more shared
memory than there is, misses the matrix unit of its GPU, or loads its main loop without
asynchronous copies.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
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

import cases
from op_case import LaunchCase

from sapt_fast.triton_kernels.blocks import common

NUM_SMS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
MATRIX_UNIT = dict.fromkeys(NUM_SMS, "mma.sync") | {90: "wgmma.mma_async", 100: "tcgen05.mma"}


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
    traits = common.DeviceTraits(capability, NUM_SMS[capability], shared=SHARED_LIMIT[capability])
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
    log = io.StringIO()
    started = time.perf_counter()
    row: dict[str, Any] = {
        "kernel": job.kernel.fn.__name__.strip("_"),
        "case": job.case.name,
        "capability": job.capability,
        "tile": _tile(job),
        **job.options,
    }
    try:
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source, target=target, options=job.options)
    except Exception as error:
        return {**row, "problems": [f"does not compile: {str(error).strip()[-200:]}"]}
    text, ptx = log.getvalue(), compiled.asm["ptx"]
    multiplies = "tt.dot" in compiled.asm["ttir"]
    copies = {
        "tma": ptx.count("cp.async.bulk.tensor"),
        "cp.async": len(re.findall(r"cp\.async\.c[ag]", ptx)),
    }
    row |= {
        "registers": _number(r"Used (\d+) registers", text),
        "spill_bytes": _number(r"(\d+) bytes spill stores", text),
        "shared_bytes": compiled.metadata.shared,
        "matrix_instructions": ptx.count(MATRIX_UNIT[job.capability]),
        "async_copies": copies,
        "seconds": round(time.perf_counter() - started, 1),
    }
    problems = []
    if row["spill_bytes"]:
        problems.append(f"spills {row['spill_bytes']} bytes")
    if "serialized" in text:
        problems.append("serialised matrix instructions")
    if compiled.metadata.shared > SHARED_LIMIT[job.capability]:
        problems.append("too much shared memory")
    if multiplies and job.case.dtype != torch.float32 and job.case.aligned:
        if not row["matrix_instructions"]:
            problems.append(f"no {MATRIX_UNIT[job.capability]}")
        if not any(copies.values()):
            problems.append("no asynchronous copy in the main loop")
    return {**row, "problems": problems}


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match.group(1)) if match else 0


def _tile(job: Job) -> str:
    by_name = {job.kernel.arg_names[path[0]]: value for path, value in job.constexprs.items()}
    sides = [by_name.get(f"BLOCK_{side}") for side in "MNKRST"] + [by_name.get("KEPT")]
    tile = "x".join(str(side) for side in sides if side is not None)
    segments = by_name.get("SEGMENTS")
    return tile if segments is None else f"{tile} seg{segments}"


def _print_row(row: dict[str, Any]) -> None:
    used = "{registers:4d} regs {shared_bytes:7d} B shared".format_map(
        {"registers": 0, "shared_bytes": 0, **row}
    )
    print(
        f"sm_{row['capability']:<4}{row['kernel']:<20}{row['case']:<26}{row['tile']:<20}"
        f"w{row['num_warps']} s{row['num_stages']} {used} "
        f"{row.get('seconds', 0):5.1f} s  {'; '.join(row['problems']) or 'ok'}",
        flush=True,
    )


def main() -> int:
    """Run the report; the exit code tells whether every kernel is sound."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="main cases only, nothing written")
    parser.add_argument("--only", help="only kernels whose name contains this")
    parser.add_argument("--capability", type=int, choices=SHARED_LIMIT, action="append")
    parser.add_argument("--output", type=Path, help="default: results/aot/triton-<version>.json")
    options = parser.parse_args()
    found: dict[tuple[str, ...], Job] = {}
    for case in cases.gathered("LAUNCHES"):
        for capability in options.capability or SHARED_LIMIT:
            # float16 has the tiles and, but for their type, the instructions of bfloat16.
            twin = case.dtype == torch.float16 and capability != 90
            if (case.quick or not options.quick) and not twin:
                record(case, capability, found)
    jobs = [job for job in found.values() if (options.only or "") in job.kernel.fn.__name__]
    rows = []
    context = multiprocessing.get_context("fork")
    global _JOBS
    _JOBS = jobs
    with ProcessPoolExecutor(max_workers=2, mp_context=context) as workers:
        for row in workers.map(_compile_index, range(len(jobs))):
            _print_row(row)
            rows.append(row)
    bad = [row for row in rows if row["problems"]]
    print(f"triton {triton.__version__}: {len(rows)} kernels, {len(bad)} with problems")
    output = options.output
    if output is None and not (options.quick or options.only or options.capability):
        output = Path(__file__).parent / "results" / "aot" / f"triton-{triton.__version__}.json"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        report = {"triton": triton.__version__, "kernels": rows}
        output.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if bad else 0


_JOBS: list[Job] = []


def _compile_index(index: int) -> dict[str, Any]:
    """`compile_job` of a job that the worker inherited when it was forked."""
    return compile_job(_JOBS[index])


if __name__ == "__main__":
    sys.exit(main())
