"""The kernels compile for six GPU generations without a problem that is not known."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases.mixed_lora import H200
from uninterpreted import printed

pytest.importorskip("triton")

REPORT = str(Path(__file__).resolve().parents[2] / "benchmarks" / "aot_report.py")


def test_a_few_kernels_compile_soundly(tmp_path: Path) -> None:
    """Of the newest generation with wgmma and of one with little shared memory."""
    cases = ("--case", "d1024", "--case", "float32 factors, decode", "--only", "shrink_fwd")
    chosen = ("--capability", "86", "--capability", "90", "--keep", str(tmp_path))
    told = printed(REPORT, *cases, *chosen)
    assert "4 kernels, 0 with problems" in told, told


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("capability", ["80", "86", "89", "90", "100", "120"])
def test_kernels_compile_soundly(capability: str, tmp_path: Path) -> None:
    printed(
        REPORT, "--quick", "--capability", capability, "--keep", str(tmp_path), timeout=1500
    )  # fmt: skip


GROWING_POOL = """
import aot_report
from cases.mixed_lora import Launch
jobs, counts = {}, []
for adapters in (13, 14, 15, 16):  # 52 to 64 ranks, and 13 to 16
    case = Launch(
        "grows", 16, 512, 1024, 1024, (4,) * adapters, siblings=((512, (1,) * adapters),)
    )
    aot_report.record(case, 90, jobs)
    counts.append(len(jobs))
print(*counts)
alone = {}
aot_report.record(Launch("alone", 16, 512, 1024, 1024, (4,) * 15), 90, alone)
for job in alone.values():
    print(job.name, aot_report._tile(job))
"""


def test_a_growing_pool_compiles_nothing_new() -> None:
    """And the tiles are those of which the roofline counts the reads."""
    counts, *kernels = printed("-c", GROWING_POOL).splitlines()
    first, *others = counts.split()
    assert int(first) > 5
    assert others == [first] * 3
    for kernel, tile in zip(
        ("gemm_tma", "shrink_fwd", "shrink_bwd", "factor_grad"), H200, strict=True
    ):
        name = "{}_kernel {}x{}x".format(kernel, *tile)
        assert any(line.startswith(name) for line in kernels), (name, kernels)


INTERRUPTED = """
import sys
from dataclasses import replace
from pathlib import Path
import aot_report
from cases.mixed_lora import Launch
found, compiled, folder = {}, [], Path(sys.argv[1])
case = Launch("small", 1, 8, 32, 32, (4,))
aot_report.record(case, 90, found)
aot_report.compile_job = lambda job: compiled.append(job) or {"problems": []}
jobs = list(found.values())
for chosen in (jobs[:2], jobs, jobs):  # interrupted, the rest, and nothing
    for job in chosen:
        aot_report.kept_or_compiled(job, folder)
    print(len(compiled), len(jobs))
other = replace(jobs[0], capability=80)
aot_report.kept_or_compiled(other, folder)
print(len(compiled), len(jobs) + 1)
"""


def test_what_was_compiled_is_kept(tmp_path: Path) -> None:
    two, *others = (map(int, line.split()) for line in printed(
        "-c", INTERRUPTED, str(tmp_path)
    ).splitlines())  # fmt: skip
    assert next(two) == 2
    assert all(compiled == wanted for compiled, wanted in others)
