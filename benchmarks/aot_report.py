"""Compile every Triton kernel ahead of time, as it would be launched, and report its resources.

    python benchmarks/aot_report.py [--quick] [--output FILE]

Needs no GPU. The launchers run on tensors without memory; each launch is recorded with the exact
specialisation Triton would compile, and compiled for compute capabilities 8.0, 9.0 and 10.0. The
exit code is 1 if a kernel spills registers, has its matrix instructions serialised, needs more
shared memory than there is, misses the matrix unit of its GPU, or loads its main loop without
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
from typing import Any, Protocol

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # its default changes with Triton 3.10

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sapt_fast.ops.mix_experts import pair_groups
from sapt_fast.ops.projection import Projection
from sapt_fast.ops.route import QueryProjection
from sapt_fast.triton_kernels.blocks import common
from sapt_fast.triton_kernels.blocks import gemm_variants as routes
from sapt_fast.triton_kernels.mix_experts import mix_experts_bwd, mix_experts_fwd
from sapt_fast.triton_kernels.mix_prompts import mix_prompts_bwd, mix_prompts_fwd
from sapt_fast.triton_kernels.mixed_lora import mixed_lora_bwd, mixed_lora_fwd
from sapt_fast.triton_kernels.nearest_key import nearest_key_fwd
from sapt_fast.triton_kernels.pool_tokens import pool_tokens_bwd, pool_tokens_fwd
from sapt_fast.triton_kernels.route import route_fwd, route_scores_fwd
from sapt_fast.triton_kernels.topk_keys import topk_keys_fwd

SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
NUM_SMS = {80: 108, 90: 132, 100: 148}
MATRIX_UNIT = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


class NewTensor(Protocol):
    """Allocates an input of a case, of the case's dtype unless another is named."""

    def __call__(self, *shape: int, dtype: torch.dtype = ...) -> Tensor: ...


class LaunchCase(Protocol):
    """Calls that launch kernels."""

    name: str
    dtype: torch.dtype
    quick: bool
    aligned: bool  # sizes are multiples of 16

    def launch(self, tensor: NewTensor) -> None:
        """Make the calls, with inputs from `tensor`."""


@dataclass(frozen=True)
class Case:
    """Sizes and options of one forward and backward of `mixed_lora`."""

    name: str
    samples: int
    rows: int  # per sample
    i: int
    o: int
    ranks: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    lora_dtype: torch.dtype | None = None
    weight: str = "plain"  # plain, transposed, none
    bias: bool = False
    siblings: tuple[tuple[int, tuple[int, ...]], ...] = ()  # o and ranks of further projections
    quick: bool = False
    aligned: bool = True

    def launch(self, tensor: NewTensor) -> None:
        """By every route: forward, backward in both gradient modes and for the factors alone."""
        m = self.samples * self.rows
        x, mixture = tensor(m, self.i), tensor(self.samples, len(self.ranks), dtype=torch.float32)
        members = ((self.o, self.ranks), *self.siblings)
        projections = [self._projection(tensor, o, sum(ranks)) for o, ranks in members]
        dys = [tensor(m, o) for o, _ in members]
        newest = [[sum(ranks[:-1]), sum(ranks)] for _, ranks in members]
        for route in routes.ROUTES:
            with routes.forced(route):
                hs = [h for _, h in mixed_lora_fwd(x, mixture, projections)]
                given = dys, x, mixture, projections, hs, newest
                for through_frozen in (True, False):
                    mixed_lora_bwd(*given, True, True, through_frozen)
                mixed_lora_bwd(*given, False, False, False)

    def _projection(self, tensor: NewTensor, o: int, r: int) -> Projection:
        weight = None if self.weight == "none" else tensor(o, self.i)
        if self.weight == "transposed":
            weight = tensor(self.i, o).t()
        lora_dtype = self.lora_dtype or self.dtype
        return Projection(
            weight,
            tensor(o) if self.bias else None,
            tensor(r, self.i, dtype=lora_dtype),
            tensor(r, o, dtype=lora_dtype),
            tensor(r, dtype=torch.int32),
            tensor(r, dtype=torch.float32),
        )


@dataclass(frozen=True)
class SearchCase:
    """Sizes of one search for the nearest key and for the k best keys."""

    name: str
    m: int
    n: int
    d: int
    k: int
    metrics: tuple[str, ...] = ("dot",)
    dtype: torch.dtype = torch.bfloat16
    quick: bool = False
    aligned: bool = True

    def launch(self, tensor: NewTensor) -> None:
        """Both searches."""
        query, keys = tensor(self.m, self.d), tensor(self.n, self.d)
        nearest_key_fwd(query, keys, tensor(self.n, dtype=torch.float32))
        for metric in self.metrics:
            topk_keys_fwd(query, keys, self.k, metric)


@dataclass(frozen=True)
class ExpertsCase:
    """Sizes of one sparse mixture of experts."""

    name: str
    m: int
    d: int
    rank: int
    k: int
    experts: int = 100_000
    dtype: torch.dtype = torch.bfloat16
    bank_dtype: torch.dtype | None = None
    quick: bool = False
    aligned: bool = True

    def launch(self, tensor: NewTensor) -> None:
        """Forward and backward to everything."""
        x, bank_dtype = tensor(self.m, self.d), self.bank_dtype or self.dtype
        bank = tensor(self.experts, self.rank, self.d, dtype=bank_dtype)
        index = tensor(self.m, self.k, dtype=torch.int64)
        weights = tensor(self.m, self.k, dtype=torch.float32)
        y, h = mix_experts_fwd(x, bank, bank, index, weights, 2.0)
        groups = pair_groups(index, self.experts, False)
        mix_experts_bwd(y, x, bank, bank, index, weights, h, 2.0, groups, True, True)


@dataclass(frozen=True)
class PromptCase:
    """Sizes of one mixture of prompts, in front of embeddings and of tokens."""

    name: str
    batch: int
    tokens: int
    d: int
    count: int
    length: int
    dtype: torch.dtype = torch.bfloat16
    prompt_dtype: torch.dtype | None = None
    quick: bool = False
    aligned: bool = True

    def launch(self, tensor: NewTensor) -> None:
        """Both forwards and the backward."""
        prompt_dtype = self.prompt_dtype or self.dtype
        prompts = tensor(self.count, self.length, self.d, dtype=prompt_dtype)
        mixture = tensor(self.batch, self.count, dtype=torch.float32)
        embeds = tensor(self.batch, self.tokens, self.d)
        ids = tensor(self.batch, self.tokens, dtype=torch.int64)
        y = mix_prompts_fwd(prompts, mixture, embeds, None)
        mix_prompts_fwd(prompts, mixture, tensor(32128, self.d), ids)
        mix_prompts_bwd(y, prompts, mixture, True, True)


@dataclass(frozen=True)
class RouterCase:
    """Sizes of one routed batch, from token ids to weights."""

    name: str
    batch: int
    tokens: int
    d: int
    hidden: int
    count: int
    dtype: torch.dtype = torch.bfloat16
    quick: bool = False
    aligned: bool = True

    def launch(self, tensor: NewTensor) -> None:
        """Both poolings with and without a mask, their backward, the scores and the weights."""
        ids, mask = (tensor(self.batch, self.tokens, dtype=torch.int64) for _ in range(2))
        table, d = tensor(32128, self.d), self.d
        for given in (None, mask):
            for pooling in ("max", "mean"):
                pool_tokens_fwd(ids, table, given, pooling)
            pooled, winner = pool_tokens_fwd(ids, table, given, "max", keep_winner=True)
        for pooling in ("max", "mean"):
            pool_tokens_bwd(pooled, ids, mask, winner, 32128, pooling)
        projection = QueryProjection(
            tensor(self.hidden, d), tensor(d, self.hidden), tensor(d), tensor(d)
        )
        keys = tensor(self.count, d)
        for query in (projection, None):
            route_scores_fwd(pooled, keys, query, 32.0)
            for top_k, threshold in ((None, None), (None, 0.1), (2, 0.1)):
                route_fwd(pooled, keys, query, 32.0, top_k, threshold)


FOUR_MORE = (
    (1024, (4,) * 15), (1024, (8,) * 15), (11008, (1,) * 14 + (3,)), (11008, (16,) * 15),
)  # fmt: skip

CASES: tuple[LaunchCase, ...] = (
    Case("d1024", 16, 512, 1024, 1024, (4,) * 15, quick=True),
    Case("d4096", 8, 1024, 4096, 4096, (16,) * 15, quick=True),
    Case("short rows", 64, 48, 1024, 1024, (4,) * 15),
    Case("short rows, many", 512, 48, 1024, 1024, (4,) * 15),
    Case("unequal tiles", 200, 100, 1024, 1024, (4,) * 15),
    Case("long", 32, 1024, 4096, 4096, (4,) * 15),
    Case("long, R 240", 32, 1024, 4096, 4096, (16,) * 15),
    Case("one adapter", 16, 512, 1024, 1024, (4,)),
    Case("one adapter, rank 32", 16, 512, 1024, 1024, (32,)),
    Case("one adapter, rank 64", 16, 512, 1024, 1024, (64,)),
    Case("one adapter, rank 256", 16, 512, 1024, 1024, (256,)),
    Case("per token", 8192, 1, 4096, 4096, (16,) * 15, quick=True),
    Case("decode", 4, 1, 4096, 4096, (4,) * 15, quick=True),
    Case("decode, batch 32", 32, 1, 4096, 4096, (4,) * 15),
    Case("no weight", 16, 512, 4096, 4096, (4,) * 15, weight="none"),
    Case("no weight, decode", 4, 1, 4096, 4096, (4,) * 15, weight="none"),
    Case("Conv1D", 16, 512, 768, 2304, (8,) * 5, weight="transposed", bias=True),
    Case("float32 factors", 16, 512, 1024, 1024, (4,) * 15, lora_dtype=torch.float32),
    Case("float32 factors, d4096", 8, 1024, 4096, 4096, (16,) * 15, lora_dtype=torch.float32),
    Case("float32 factors, decode", 4, 1, 4096, 4096, (4,) * 15, lora_dtype=torch.float32),
    Case("float16", 16, 512, 1024, 1024, (4,) * 15, dtype=torch.float16),
    Case("float32", 16, 512, 1024, 1024, (4,) * 15, dtype=torch.float32),
    Case("odd width", 4, 50, 100, 100, (4,) * 3, aligned=False),
    Case("two", 16, 512, 1024, 1024, (4,) * 15, siblings=((1024, (4,) * 15),), quick=True),
    Case("five", 8, 1024, 4096, 4096, (16,) * 15, siblings=FOUR_MORE, quick=True),
    Case("five, decode", 4, 1, 4096, 4096, (16,) * 15, siblings=FOUR_MORE),
    Case("five, short rows", 64, 48, 1024, 1024, (4,) * 15, siblings=FOUR_MORE),
    Case("five, per token", 8192, 1, 4096, 4096, (16,) * 15, siblings=FOUR_MORE),
    Case("two, no weight", 16, 512, 1024, 1024, (4,) * 15, siblings=FOUR_MORE[:1], weight="none"),
    Case(
        "two, float32 factors",
        16,
        512,
        1024,
        1024,
        (4,) * 15,
        siblings=FOUR_MORE[:1],
        lora_dtype=torch.float32,
    ),
    Case(
        "two, float32",
        16,
        512,
        1024,
        1024,
        (4,) * 15,
        siblings=FOUR_MORE[:1],
        dtype=torch.float32,
    ),
    Case("two, odd width", 4, 50, 100, 100, (4,) * 3, siblings=((52, (1,) * 3),), aligned=False),
    SearchCase("keys, M 16", 16, 1_000_000, 512, 32, ("dot", "cosine", "l2"), quick=True),
    SearchCase("keys, M 64", 64, 1_000_000, 512, 32, ("dot", "cosine", "l2"), quick=True),
    SearchCase("keys, k 200", 64, 1_000_000, 512, 200, ("dot", "l2")),
    SearchCase("keys, float16", 64, 1_000_000, 512, 32, dtype=torch.float16),
    SearchCase("keys, float32", 64, 1_000_000, 512, 64, ("dot", "l2"), torch.float32),
    SearchCase(
        "keys, float32, k 32", 64, 1_000_000, 512, 32, ("dot", "cosine", "l2"), torch.float32
    ),
    SearchCase("keys, odd width", 64, 1_000_000, 100, 64, ("l2",), aligned=False),
    SearchCase("keys, odd width, k 32", 64, 1_000_000, 100, 32, ("dot", "l2"), aligned=False),
    ExpertsCase("experts", 512, 1024, 4, 32, quick=True),
    ExpertsCase("experts, rank 1", 512, 1024, 1, 32),
    ExpertsCase("experts, rank 32", 64, 4096, 32, 8),
    ExpertsCase("experts, rank 100", 64, 4096, 100, 8),
    ExpertsCase("experts, float32 bank", 512, 1024, 8, 32, bank_dtype=torch.float32),
    ExpertsCase("experts, float16", 512, 1024, 8, 32, dtype=torch.float16),
    ExpertsCase("experts, float32", 512, 1024, 8, 32, dtype=torch.float32),
    ExpertsCase("experts, odd width", 30, 100, 3, 5, aligned=False),
    ExpertsCase("crowded experts", 8192, 1024, 16, 8, 1000, quick=True),
    ExpertsCase("crowded experts, rank 4", 8192, 4096, 4, 8, 1000),
    ExpertsCase("crowded experts, rank 64", 8192, 4096, 64, 2, 64),
    ExpertsCase("crowded, float32 bank", 8192, 1024, 16, 8, 1000, bank_dtype=torch.float32),
    ExpertsCase("crowded, float16", 8192, 1024, 16, 8, 1000, dtype=torch.float16),
    ExpertsCase("crowded, float32", 8192, 1024, 16, 8, 1000, dtype=torch.float32),
    ExpertsCase("crowded, odd width", 8192, 100, 5, 8, 1000, aligned=False),
    PromptCase("prompts", 8, 512, 1024, 15, 10, quick=True),
    PromptCase("prompts, one sample", 1, 64, 4096, 15, 10),
    PromptCase("prompts, many samples", 512, 64, 1024, 15, 10),
    PromptCase("prompts, float32 pool", 8, 512, 1024, 15, 10, prompt_dtype=torch.float32),
    PromptCase("prompts, float16", 8, 512, 1024, 15, 10, dtype=torch.float16),
    PromptCase("prompts, float32", 8, 512, 1024, 15, 10, dtype=torch.float32),
    PromptCase("prompts, odd width", 8, 50, 100, 3, 7, aligned=False),
    RouterCase("router", 8, 512, 1024, 100, 15, quick=True),
    RouterCase("router, d4096", 8, 1024, 4096, 100, 15),
    RouterCase("router, short", 64, 16, 1024, 100, 15),
    RouterCase("router, wide bottleneck", 8, 512, 1024, 1024, 1000),
    RouterCase("router, float16", 8, 512, 1024, 100, 15, dtype=torch.float16),
    RouterCase("router, float32", 8, 512, 1024, 100, 15, dtype=torch.float32),
    RouterCase("router, odd width", 3, 50, 100, 7, 5, aligned=False),
)


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
    traits = common.DeviceTraits(capability, NUM_SMS[capability])
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
    for case in CASES:
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
