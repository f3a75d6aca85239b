"""Correctness and speed of the ops beside `mixed_lora`; sizes and device are arguments."""

import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import checks
import measure
import torch
from op_cases import (
    ExpertsCase,
    Inputs,
    NearestKeyCase,
    OpCase,
    PromptCase,
    RouterCase,
    TopKeysCase,
)
from providers import Layer, Providers
from torch import Tensor

from sapt_fast.ops import topk_keys

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# An l2 score is a difference of squares.
_SEARCH_FLOOR = 1e-5
_SEARCHES = ("topk_keys", "nearest_key")
CUDA_TOPK = 32  # the CUDA kernels of topk_keys take no larger k


@dataclass(frozen=True)
class Sizes:
    """Cases by what they are for, and the elements of the copy that bandwidth is measured on."""

    checked: tuple[OpCase, ...]
    router: RouterCase
    prompts: PromptCase
    top_keys: TopKeysCase
    nearest: NearestKeyCase
    experts: tuple[ExpertsCase, ...]  # scattered, then crowded
    ways: tuple[ExpertsCase, ...]  # timed by both ways of mix_experts
    copied_bytes: int


FULL = Sizes(
    checked=(
        RouterCase(8, 512, 1024, 15),
        RouterCase(3, 77, 100, 7, hidden=13),
        PromptCase(8, 512, 1024, 15, 10),
        PromptCase(8, 512, 1024, 15, 10, from_ids=True),
        PromptCase(3, 33, 100, 7, 5),
        TopKeysCase(64, 100_000, 512, 32),
        TopKeysCase(64, 100_000, 512, 32, "cosine"),
        TopKeysCase(17, 100_000, 512, 100, "l2"),
        TopKeysCase(5, 1003, 100, 32),
        NearestKeyCase(16, 100_000, 1024),
        NearestKeyCase(200, 1003, 100),
        ExpertsCase(256, 8, 20_000, 4, 1024),
        ExpertsCase(2048, 8, 500, 16, 1024),
        ExpertsCase(1001, 3, 50, 5, 100),
    ),
    router=RouterCase(8, 512, 1024, 15),
    prompts=PromptCase(64, 512, 1024, 15, 10),
    top_keys=TopKeysCase(64, 1_000_000, 512, 32),
    nearest=NearestKeyCase(16, 100_000, 1024),
    experts=(ExpertsCase(512, 32, 100_000, 4, 1024), ExpertsCase(8192, 8, 1000, 16, 1024)),
    ways=tuple(
        ExpertsCase(4096, 8, 32768 // per_expert, rank, 1024)
        for rank in (4, 16, 64)
        for per_expert in (2, 4, 8, 16, 64)
    ),
    copied_bytes=2**30,
)
QUICK = Sizes(
    checked=(
        RouterCase(2, 9, 48, 5, hidden=16),
        PromptCase(2, 9, 64, 3, 4),
        PromptCase(2, 9, 64, 3, 4, from_ids=True),
        *(TopKeysCase(3, 70, 16, 5, metric) for metric in ("dot", "cosine", "l2")),
        NearestKeyCase(4, 50, 32),
        ExpertsCase(6, 3, 50, 4, 32),
        ExpertsCase(128, 8, 32, 4, 32),
    ),
    router=RouterCase(2, 9, 48, 5, hidden=16),
    prompts=PromptCase(2, 9, 64, 3, 4),
    top_keys=TopKeysCase(3, 130, 16, 5),
    nearest=NearestKeyCase(4, 50, 32),
    experts=(ExpertsCase(6, 3, 50, 4, 32), ExpertsCase(128, 8, 32, 4, 32)),
    ways=(ExpertsCase(64, 8, 16, 4, 32),),
    copied_bytes=2**16,
)


def correctness(
    device: str, cases: Iterable[OpCase], backend: str = "triton", dtypes: Any = DTYPES
) -> dict[str, dict[str, Any]]:
    """Per op the errors against float64 in outputs and every gradient, and the verdict.

    An op that raises is wrong and its error reported: the others are checked all the same.
    """
    report: dict[str, dict[str, Any]] = {}
    for case in cases:
        row = report.setdefault(case.op, {"ok": True, "cases": []})
        for dtype in dtypes:
            try:
                verdict = _compare(case, dtype, device, backend)
            except Exception as error:
                traceback.print_exc()
                verdict = {"ok": False, "raised": f"{type(error).__name__}: {error}"}
            row["cases"].append({"case": str(case), "dtype": str(dtype), **verdict})
            row["ok"] = row["ok"] and verdict["ok"]
    return report


def _compare(case: OpCase, dtype: torch.dtype, device: str, backend: str) -> dict[str, Any]:
    inputs = case.inputs(dtype, device)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    exact = _values(case, wide, "reference")
    plain = _values(case, inputs, "reference")
    ours = _values(case, inputs, backend)
    floor = max(checks.FLOOR[dtype], _SEARCH_FLOOR if case.op in _SEARCHES else 0.0)
    errors = {name: _error(ours[name], exact[name]) for name in exact}
    bounds = {name: max(2 * _error(plain[name], exact[name]), floor) for name in exact}
    return {"ok": all(errors[n] <= bounds[n] for n in exact), "errors": errors, "bounds": bounds}


def _values(case: OpCase, inputs: Inputs, backend: str) -> dict[str, Tensor]:
    leaves = {n: t.detach().requires_grad_(n in case.trains) for n, t in inputs.items()}
    outputs = case.run(leaves, backend)
    first = next(iter(outputs.values()))
    if case.op in _SEARCHES:
        # Keys whose scores rounding cannot tell apart may change places, and the last its place
        # with the best that is left out: what a key receives depends on its score alone and
        # vanishes at the last place.
        incoming = first.detach()
        if isinstance(case, TopKeysCase):
            incoming = incoming - incoming[:, -1:]
    else:
        generator = torch.Generator(first.device).manual_seed(1)
        incoming = torch.randn(first.shape, generator=generator, device=first.device)
    first.backward(incoming.to(first))
    values = {name: t.detach() for name, t in outputs.items()}
    return values | {f"d_{name}": leaves[name].grad for name in case.trains}


def _error(result: Tensor, exact: Tensor) -> float:
    """Relative root-mean-square error; infinite for NaN, and for integers that differ."""
    if not exact.is_floating_point():
        return 0.0 if torch.equal(result, exact) else float("inf")
    difference = (result.double() - exact).square().mean().sqrt()
    error = (difference / exact.square().mean().sqrt().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


# --- speed -------------------------------------------------------------------------------------


def replayed(function: Callable[[], object], device: str) -> Callable[[], object]:
    """A call that replays the function's CUDA graph; on the CPU the function itself."""
    if not device.startswith("cuda"):
        return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def copy_bytes_per_second(device: str, size: int, repeats: int) -> float:
    """Bytes read and written per second by a copy of `size` bytes."""
    source, target = (torch.ones(size, dtype=torch.int8, device=device) for _ in range(2))
    times = measure.interleaved_ms({"copy": lambda: target.copy_(source)}, device, repeats=repeats)
    return 2 * size / (times["copy"]["median"] * 1e-3)


def speed(
    device: str,
    sizes: Sizes,
    gate: dict[str, dict[str, Any]],
    *,
    repeats: int,
    backend: str = "triton",
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Times of every op whose correctness held, and its rows of the table of targets.

    Each op is timed by itself and as a CUDA graph, in bytes against a copy in the same run; where
    `gate` has a verdict of its CUDA kernels ("<op>_cuda") and it is good, by these too.
    """
    copied = copy_bytes_per_second(device, sizes.copied_bytes, repeats)
    rows = []
    for case in (sizes.router, sizes.prompts, sizes.top_keys, sizes.nearest, *sizes.experts):
        row: dict[str, Any] = {"op": case.op, "case": str(case), "dtype": str(dtype)}
        if gate.get(case.op, {}).get("ok"):
            backends = {"ours": backend}
            if gate.get(f"{case.op}_cuda", {}).get("ok"):
                backends["cuda"] = "cuda"
            row |= _guarded(_op_times, case, dtype, device, backends, repeats, copied)
        else:
            row["not_measured"] = "its correctness check failed"
        rows.append(row)
    result = {"copy_bytes_per_second": copied, "rows": rows}
    return result, _targets(sizes, rows, device, backend, dtype)


def _guarded(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    try:
        return function(*arguments)
    except Exception as error:
        traceback.print_exc()
        return {"raised": f"{type(error).__name__}: {error}"}


@torch.no_grad()
def _op_times(
    case: OpCase,
    dtype: torch.dtype,
    device: str,
    backends: dict[str, str],
    repeats: int,
    copied: float,
) -> dict[str, Any]:
    inputs = case.inputs(dtype, device)
    functions: dict[str, Callable[[], object]] = {}
    for name, backend in backends.items():
        functions[name] = bare(case, inputs, backend)
        functions[f"{name}_graph"] = replayed(functions[name], device)
    functions |= case.rivals(inputs)
    times = measure.interleaved_ms(functions, device, repeats=repeats)
    least_seconds = case.moved_bytes(dtype) / copied
    return {
        "ms": times,
        "moved_bytes": case.moved_bytes(dtype),
        "share_of_copy": {
            name: least_seconds / (times[f"{name}_graph"]["median"] * 1e-3) for name in backends
        },
        "peak_bytes": {
            name: measure.peak_bytes(function, device)
            for name, function in functions.items()
            if not name.endswith("_graph")
        },
    }


def bare(case: OpCase, inputs: Inputs, backend: str) -> Callable[[], object]:
    """Our op alone, without what `run` adds to check an index."""
    if isinstance(case, TopKeysCase):
        query, keys = inputs.values()
        return lambda: topk_keys(query, keys, case.k, metric=case.metric, backend=backend)
    return lambda: case.run(inputs, backend)


def _targets(
    sizes: Sizes, rows: list[dict[str, Any]], device: str, backend: str, dtype: torch.dtype
) -> list[dict[str, Any]]:
    router, prompts, top_keys, nearest, scattered, crowded = rows

    def share(row: dict[str, Any], bound: float, by: str = "ours") -> dict[str, Any]:
        what = f"{row['op']}{'' if by == 'ours' else f' ({by})'}: share of copy bandwidth"
        return checks.target(what, row.get("share_of_copy", {}).get(by), bound, at_least=True)

    def against_torch(row: dict[str, Any], name: str) -> dict[str, Any]:
        return checks.target(
            f"{name}: ours / torch", checks.ratio(row.get("ms", {}), "ours", "torch"), 1.0
        )

    milliseconds = router.get("ms", {}).get("ours_graph", {}).get("median")
    growth = None
    if "ms" in top_keys:
        growth = _memory_growth(sizes.top_keys, device, backend, dtype)
    return [
        checks.target("router under a graph: milliseconds", milliseconds, 0.012),
        share(prompts, 0.8),
        share(top_keys, 0.7),
        checks.target("topk_keys: peak memory, all / a quarter of the keys", growth, 1.1),
        against_torch(nearest, "nearest_key"),
        share(nearest, 0.6),
        share(nearest, 0.6, by="cuda"),
        against_torch(scattered, "mix_experts, scattered"),
        against_torch(crowded, "mix_experts, crowded"),
    ]


@torch.no_grad()
def _memory_growth(
    case: TopKeysCase, device: str, backend: str, dtype: torch.dtype
) -> float | None:
    """Peak memory of a search over all keys, over that of a search through a quarter of them."""
    if not device.startswith("cuda"):
        return None  # a process's high-water mark is no measure of one call's tensors
    peaks = []
    for keys in (case.keys, case.keys // 4):
        smaller = replace(case, keys=keys)
        search = bare(smaller, smaller.inputs(dtype, device), backend)
        search()
        peaks.append(measure.peak_bytes(search, device))
    return peaks[0] / max(1, peaks[1])


@torch.no_grad()
def expert_ways(
    device: str, cases: Iterable[ExpertsCase], gate: dict[str, dict[str, Any]], *, repeats: int,
    dtype: torch.dtype = torch.bfloat16,
) -> list[dict[str, Any]]:  # fmt: skip
    """Both ways of the Triton kernels of `mix_experts` on each size, and which one they choose."""
    from sapt_fast.triton_kernels import mix_experts as kernels

    rows = []
    for case in cases if gate.get("mix_experts", {}).get("ok") else ():
        inputs = case.inputs(dtype, device)
        pairs = case.rows * case.k
        size = (pairs, case.experts, case.rank, 2 * case.width, dtype.itemsize)
        chosen, choose = kernels.grouping_pays(*size), kernels.grouping_pays
        row = {"case": str(case), "pairs_per_expert": pairs / case.experts, "grouped": chosen}
        try:
            for name, grouped in (("gathered_ms", False), ("grouped_ms", True)):
                kernels.grouping_pays = lambda *_, grouped=grouped: grouped
                run = bare(case, inputs, "triton")
                row[name] = measure.interleaved_ms({"ours": run}, device, repeats=repeats)["ours"]
        finally:
            kernels.grouping_pays = choose
        rows.append(row)
    return rows


def graph_times(layer: Layer, gate: dict[str, dict[str, Any]], *, repeats: int) -> dict[str, Any]:
    """Times of the replay of a layer's forward: alone, stacked, and ours."""
    with torch.no_grad():
        functions = {
            name: replayed(function, layer.device)
            for name, function in Providers(layer, training=False).forward().items()
            if name in ("base", "stacked") or (name.startswith("ours_") and gate[name]["ok"])
        }
        times = measure.interleaved_ms(functions, layer.device, repeats=repeats)
    return {"layer": str(layer), "pass": "forward, CUDA graph", "ms": times}
