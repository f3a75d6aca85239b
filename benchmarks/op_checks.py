"""Correctness and speed of the ops beside `mixed_lora`; sizes and device are arguments."""

import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import cases
import checks
import measure
import torch
from cases import mix_experts as experts
from op_case import Extra, Inputs, OpCase, Timed
from providers import Layer, Providers
from torch import Tensor

from sapt_fast import dispatch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COPIED_BYTES, COPIED_BYTES_QUICK = 2**30, 2**16  # by the copy that bandwidth is measured on


def checked(quick: bool, backend: str) -> list[OpCase]:
    """The cases of `correctness` that a backend has kernels for."""
    given = cases.gathered("CHECKED_QUICK" if quick else "CHECKED")
    return [c for c in given if backend in dispatch.backends(c.op) and c.fits(backend)]


@checks.without_tf32()
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
    floor = max(checks.FLOOR[dtype], case.floor)
    errors = {name: _error(ours[name], exact[name]) for name in exact}
    bounds = {name: max(2 * _error(plain[name], exact[name]), floor) for name in exact}
    return {"ok": all(errors[n] <= bounds[n] for n in exact), "errors": errors, "bounds": bounds}


def _values(case: OpCase, inputs: Inputs, backend: str) -> dict[str, Tensor]:
    leaves = {n: t.detach().requires_grad_(n in case.trains) for n, t in inputs.items()}
    outputs = case.run(leaves, backend)
    if case.trains:
        first = next(iter(outputs.values()))
        first.backward(case.incoming(first).to(first))
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
    quick: bool,
    gate: dict[str, dict[str, Any]],
    *,
    repeats: int,
    backend: str = "triton",
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Times of every op whose correctness held, and its rows of the table of targets.

    Both grow by an op and are given again.

    Each op is timed by itself and as a CUDA graph, in bytes against a copy in the same run; where
    `gate` has a verdict of its CUDA kernels ("<op>_cuda") and it is good, by these too.
    """
    size = COPIED_BYTES_QUICK if quick else COPIED_BYTES
    copied = copy_bytes_per_second(device, size, repeats)
    result: dict[str, Any] = {"copy_bytes_per_second": copied, "rows": []}
    targets: list[dict[str, Any]] = []
    for timed in cases.gathered("TIMED"):
        case = timed.quick if quick else timed.full
        row: dict[str, Any] = {"op": case.op, "case": str(case), "dtype": str(dtype)}
        if gate.get(case.op, {}).get("ok"):
            backends = {"ours": backend}
            if gate.get(f"{case.op}_cuda", {}).get("ok"):
                backends["cuda"] = "cuda"
            row |= _guarded(_op_times, case, dtype, device, backends, repeats, copied)
        else:
            row["not_measured"] = "its correctness check failed"
        result["rows"].append(row)
        targets += _targets(timed, row)
        if timed.extra:
            held: dict[str, Any] = {}
            if "ms" in row:
                held = _guarded(_extra_memory, case, timed.extra, device, backend, dtype)
            row |= held
            value = held.get("extra_memory")
            targets.append(checks.target(timed.extra.what, value, timed.extra.most))
        yield result, targets


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
        functions[name] = case.bare(inputs, backend)
        functions[f"{name}_graph"] = replayed(functions[name], device)
    failed: dict[str, str] = {}
    for name, rival in case.rivals(inputs).items():
        try:
            rival()
            functions[name] = rival
        except Exception as error:
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
    times = measure.interleaved_ms(functions, device, repeats=repeats)
    least_seconds = case.moved_bytes(dtype) / copied
    return {
        "ms": times,
        "failed": failed,
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


def _targets(timed: Timed, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table of targets that one measurement fills."""
    targets, times = [], row.get("ms", {})
    if timed.graph_milliseconds is not None:
        milliseconds = times.get("ours_graph", {}).get("median")
        what = f"{timed.name} under a graph: milliseconds"
        targets.append(checks.target(what, milliseconds, timed.graph_milliseconds))
    if timed.over_torch is not None:
        over = checks.ratio(times, "ours", "torch")
        targets.append(checks.target(f"{timed.name}: ours / torch", over, timed.over_torch))
    for by, least in timed.share.items():
        what = f"{timed.name}{'' if by == 'ours' else f' ({by})'}: share of copy bandwidth"
        share = row.get("share_of_copy", {}).get(by)
        targets.append(checks.target(what, share, least, at_least=True))
    return targets


@torch.no_grad()
def _extra_memory(
    case: OpCase, extra: Extra, device: str, backend: str, dtype: torch.dtype
) -> dict[str, float]:
    """Peak memory of a call beside its inputs, over the bytes it is compared with."""
    if not device.startswith("cuda"):
        return {}  # a process's high-water mark is no measure of one call's tensors
    run = case.bare(case.inputs(dtype, device), backend)
    run()
    return {"extra_memory": measure.peak_bytes(run, device) / extra.of(case)}


def expert_ways(
    device: str, quick: bool, gate: dict[str, dict[str, Any]], *, repeats: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Both ways of the Triton kernels of `mix_experts` on each size, and which one they choose."""
    if gate.get("mix_experts", {}).get("ok"):
        for case in experts.WAYS_QUICK if quick else experts.WAYS:
            yield {"case": str(case)} | _guarded(_both_ways, case, dtype, device, repeats)


@torch.no_grad()
def _both_ways(
    case: experts.ExpertsCase, dtype: torch.dtype, device: str, repeats: int
) -> dict[str, Any]:
    from sapt_fast.triton_kernels import mix_experts as kernels

    inputs = case.inputs(dtype, device)
    pairs = case.rows * case.k
    size = (pairs, case.experts, case.rank, 2 * case.width, dtype.itemsize)
    chosen, choose = kernels.grouping_pays(*size), kernels.grouping_pays
    row: dict[str, Any] = {"pairs_per_expert": pairs / case.experts, "grouped": chosen}
    try:
        for name, grouped in (("gathered_ms", False), ("grouped_ms", True)):
            kernels.grouping_pays = lambda *_, grouped=grouped: grouped
            run = case.bare(inputs, "triton")
            row[name] = measure.interleaved_ms({"ours": run}, device, repeats=repeats)["ours"]
    finally:
        kernels.grouping_pays = choose
    return row


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
