"""What cpu_check and gpu_check share: the correctness gate and the sections of the report."""

import argparse
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import measure
import torch
from providers import Layer, Providers
from rich.console import Console
from rich.table import Table
from training_step import PROVIDERS, Step, provider

# Root-mean-square error against float64, relative; twice what plain torch makes is allowed too.
# A float32 sum of 4096 terms, one after the other, is off by 2^-24 sqrt(4096 / 6) = 1.6e-6.
FLOOR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def arguments(description: str | None) -> argparse.Namespace:
    """The options of every check."""
    return parser(description).parse_args()


def parser(description: str | None) -> argparse.ArgumentParser:
    """Of the options of every check, to which others may be added."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--out",
        type=Path,
        default=measure.RESULTS,
        help="folder for <machine>/<date>-<commit>.json",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run at all?")
    return parser


@contextmanager
def without_tf32() -> Iterator[None]:
    """float32 products in full, whatever the machine's image sets."""
    libraries = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [library.allow_tf32 for library in libraries]
    try:
        for library in libraries:
            library.allow_tf32 = False
        yield
    finally:
        for library, allowed in zip(libraries, before, strict=True):
            library.allow_tf32 = allowed


@without_tf32()
def correctness(
    trained: Iterable[Layer], decoded: Iterable[Layer] = ()
) -> dict[str, dict[str, Any]]:
    """Per backend of ours the errors against float64 and the verdict.

    Args:
        trained: checked in y and in every gradient.
        decoded: checked in y without a graph, which may run other kernels.

    A backend that raises is wrong and its error reported: the others are checked all the same.
    """
    report: dict[str, dict[str, Any]] = {}
    for training, layer in [*((True, row) for row in trained), *((False, row) for row in decoded)]:
        exact = _values(replace(layer, dtype=torch.float64), "stacked", training)
        plain = _values(layer, "stacked", training)
        names = Providers(layer, training=training).forward()
        for name in (n for n in names if n.startswith("ours_")):
            row = report.setdefault(name, {"ok": True, "cases": []})
            bounds = {k: max(2 * _error(plain[k], exact[k]), FLOOR[layer.dtype]) for k in exact}
            try:
                values = _values(layer, name, training)
                errors = {k: _error(values[k], exact[k]) for k in exact}
                verdict = {"ok": all(errors[k] <= bounds[k] for k in exact), "errors": errors}
            except Exception as error:
                traceback.print_exc()
                verdict = {"ok": False, "raised": f"{type(error).__name__}: {error}"}
            case = "forward+backward" if training else "forward"
            row["cases"].append({"layer": str(layer), "pass": case, **verdict})
            row["ok"] = row["ok"] and verdict["ok"]
    return report


def join(report: dict[str, dict[str, Any]], more: dict[str, dict[str, Any]]) -> None:
    """Adds verdicts of further cases to a report of `correctness`."""
    for name, new in more.items():
        row = report.setdefault(name, {"ok": True, "cases": []})
        row["cases"] += new["cases"]
        row["ok"] = row["ok"] and new["ok"]


def _values(layer: Layer, name: str, training: bool) -> dict[str, torch.Tensor]:
    providers = Providers(layer, training=training)
    function = providers.stacked if name == "stacked" else providers.forward()[name]
    with torch.set_grad_enabled(training):
        y = function()
    if not training:
        return {"y": y}
    y.backward(providers.grad)
    pool = providers._pool
    a, b = (
        (pool.a.trainable.grad, pool.b.trainable.grad)
        if name.startswith("ours_")
        else (providers.lora_a[-1].grad, providers.lora_b[-1].grad)
    )
    grads = {"x": providers.x.grad, "mixture": providers.mixture.grad, "a": a, "b": b}
    return {"y": y.detach(), **grads}


def _error(result: torch.Tensor, exact: torch.Tensor) -> float:
    difference = (result.double() - exact.double()).pow(2).mean().sqrt()
    return (difference / exact.double().pow(2).mean().sqrt().clamp(min=1e-30)).item()


def layer_times(
    layer: Layer,
    gate: dict[str, dict[str, Any]],
    *,
    repeats: int,
    training: bool,
    compiled: bool = True,
) -> dict[str, Any]:
    """Times of all providers on one layer; none is reported for a backend that failed the gate.

    A rival that raises (a compiler that gives up, memory that runs out) is left out and named.

    Args:
        compiled: with the rivals that are compiled for the layer, which takes long on a GPU.
    """
    providers = Providers(layer, training=training)
    functions = {
        name: function
        for name, function in providers.forward().items()
        if (compiled or not name.endswith("_compiled"))
        and (not name.startswith("ours_") or gate[name]["ok"])
    }
    steps = {n: providers.step(f) if training else f for n, f in functions.items()}
    failed: dict[str, str] = {}
    with torch.set_grad_enabled(training):
        for name in [n for n in steps if not n.startswith("ours_")]:
            try:
                steps[name]()
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"
                del steps[name]
        times = measure.interleaved_ms(steps, layer.device, repeats=repeats)
        # A process's own high-water mark says nothing once other providers ran in it.
        on_gpu = layer.device.startswith("cuda")
        peaks = {n: measure.peak_bytes(run, layer.device) for n, run in steps.items() if on_gpu}
    pass_name = "forward+backward" if training else "forward"
    return {
        "layer": str(layer),
        "pass": pass_name,
        "ms": times,
        "peak_bytes": peaks,
        "failed": failed,
    }


def paired_times(
    layer: Layer,
    gate: dict[str, dict[str, Any]],
    *,
    repeats: int,
    training: bool,
    rivals: Sequence[str] | None = None,
    variables: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Times of each rival and of ours beside it, every pair in a process of its own.

    In one process for all of them, the state in which a rival leaves the heap decides what the
    calls after it pay for their memory.

    Args:
        rivals: their names; None for all.
        variables: of the processes' environment, beside this one's.
    """
    ours = "ours_cpu"
    if rivals is None:
        rivals = [name for name in Providers(layer, training=training).forward() if name != ours]
    environment = {**os.environ, **(variables or {})}
    script = Path(__file__).with_name("layer_pair.py")
    pairs = {}
    for rival in rivals if gate[ours]["ok"] else []:
        given = json.dumps({**asdict(layer), "dtype": str(layer.dtype).removeprefix("torch.")})
        command = [sys.executable, str(script), rival, ours, given, str(repeats), str(training)]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        times = json.loads(run.stdout.splitlines()[-1])
        pairs[rival] = {"rival": times[rival], "ours": times[ours]}
    pass_name = "forward+backward" if training else "forward"
    row = {"layer": str(layer), "pass": pass_name, "pairs": pairs}
    return row if variables is None else {**row, "variables": dict(variables)}


def over(row: dict[str, Any], rival: str) -> float | None:
    """The rival's median over ours beside it, None where they were not measured."""
    pair = row["pairs"].get(rival)
    return None if pair is None else pair["rival"]["median"] / pair["ours"]["median"]


def under(row: dict[str, Any], rival: str) -> float | None:
    """Our median over the rival's beside it."""
    value = over(row, rival)
    return None if value is None else 1 / value


def saved_for_backward(layer: Layer) -> dict[str, int]:
    """Elements that our op keeps for the backward beyond its inputs, and M * R."""
    providers = Providers(layer, training=True)
    inputs = {t.data_ptr() for t in (providers.x, providers.weight, providers.mixture)}
    inputs |= {p.data_ptr() for p in providers._pool.parameters()}
    inputs |= {s.rows().data_ptr() for s in (providers._pool.a, providers._pool.b)}
    kept: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() not in inputs and t.is_floating_point():
            kept[t.data_ptr()] = t.numel()
        return t

    name = next(n for n in providers.forward() if n.startswith("ours_"))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        providers.forward()[name]()
    rows = layer.batch * layer.tokens
    return {"elements": sum(kept.values()), "rows_times_rank": rows * layer.adapters * layer.rank}


def step_times(steps: dict[str, tuple[str, Step]], *, repeats: int) -> dict[str, Any]:
    """Times of named (provider, step) pairs of one device, and their peak memory.

    A rival that raises is left out and named; what ours raises is passed on.
    """
    device = next(iter(steps.values()))[1].device
    functions, failed = {}, {}
    for name, (kind, step) in steps.items():
        try:
            functions[name] = _ready(kind, step)
        except Exception as error:
            if kind == "ours":
                raise
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
    times = measure.interleaved_ms(functions, device, repeats=repeats)
    if device.startswith("cuda"):
        peaks = {name: measure.peak_bytes(run, device) for name, run in functions.items()}
    else:  # a process's own high-water mark says nothing once other providers ran in it
        peaks = {name: _peak_in_a_process(*steps[name]) for name in functions}
    del functions
    described = {
        name: {"provider": kind, "step": str(step)} for name, (kind, step) in steps.items()
    }
    return {"what": described, "ms": times, "peak_bytes": peaks, "failed": failed}


def _ready(kind: str, step: Step) -> Callable[[], None]:
    """A provider whose first step is done."""
    run = provider(kind, step)
    run()
    return run


def _peak_in_a_process(kind: str, step: Step) -> int:
    assert kind in PROVIDERS
    script = Path(__file__).with_name("training_step.py")
    command = [sys.executable, str(script), kind, json.dumps(asdict(step))]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])["peak_bytes"]


def ratio(times: dict[str, Any], numerator: str, denominator: str) -> float | None:
    """Median over median, None where one of them was not measured."""
    if numerator not in times or denominator not in times:
        return None
    return times[numerator]["median"] / times[denominator]["median"]


def target(
    what: str, value: float | None, bound: float, *, at_least: bool = False
) -> dict[str, Any]:
    """One row of the table of targets."""
    met = None if value is None else (value >= bound if at_least else value <= bound)
    return {"what": what, "value": value, "target": bound, "at_least": at_least, "met": met}


def finish(result: dict[str, Any], out: Path) -> int:
    """Prints the table, writes the file; the exit status is 1 if a correctness check failed."""
    if result["quick"]:
        for row in result["targets"]:
            row["met"] = None  # the targets are for the full sizes
    table = Table("what", "measured", "target", "met")
    for row in result["targets"]:
        value = "not measured" if row["value"] is None else f"{row['value']:.3g}"
        sign = ">=" if row["at_least"] else "<="
        met = {True: "yes", False: "no", None: "-"}[row["met"]]
        table.add_row(row["what"], value, f"{sign} {row['target']:g}", met)
    console = Console()
    console.print(table)
    gate = result["correctness"]
    for name, row in gate.items():
        console.print(f"{name}: {'correct' if row['ok'] else 'WRONG, no speed reported'}")
    console.print(f"written to {measure.save(result, out)}")
    return 0 if all(row["ok"] for row in gate.values()) else 1
