"""Everything at once on a machine with an NVIDIA GPU: one JSON file and a short table.

Environment, correctness of every backend and every op in every dtype, decoding steps, ops and
layers against what else computes them, by themselves and as CUDA graphs, and whole training steps.
The file is written as it grows. docs/results/gpu.md says how to run it on a borrowed machine.
"""

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import checks
import decode_pair
import gpu_record
import gpu_targets
import measure
import op_checks
import sanitizer
import torch
from checks import ratio, target
from providers import Layer
from training_step import Step

from sapt_fast import dispatch

Result = dict[str, Any]

DEVICE = "cuda"
STATUS = "0 all right, 1 wrong or failed, 2 no GPU, 3 right but not all was reached"
SANITIZER_SECONDS, GPU_TESTS_SECONDS = 1800.0, 900.0  # where there is no budget
BF16 = torch.bfloat16
# (width, adapters, rank): total ranks 60, 60, 240 and 1024; 8192 rows each.
TRAINING = [
    Layer(16, 512, 1024, 1024, 15, 4, BF16),
    Layer(16, 512, 4096, 4096, 15, 4, BF16),
    Layer(16, 512, 4096, 4096, 60, 4, BF16),
    Layer(16, 512, 8192, 8192, 64, 16, BF16),
]
DECODE = [Layer(batch, 1, 4096, 4096, 15, 4, BF16) for batch in (1, 16)]
PAIRS = [Layer(batch, 1, 4096, 4096, 15, 4, BF16) for batch in (1, 2, 4, 8, 16)]
# Of many adapters a few carry weight; then these few are all there are.
FEW_OF_MANY = [
    (replace(row, adapters=64), replace(row, adapters=4)) for row in (PAIRS[0], PAIRS[-1])
]
T5_LARGE = Step("t5", 1024, 2816, 24, 16, 32128, 8, 512, 50, adapters=15, dtype="bfloat16")
LLAMA_7B_4_LAYERS = Step(
    "llama", 4096, 11008, 4, 32, 32000, 2, 974, 50, adapters=15, dtype="bfloat16"
)
SMALL = Layer(3, 33, 96, 80, 15, 4, torch.float32)


def main() -> int:
    options = _arguments()
    if options.record_from:
        return _record_from(options.record_from)
    if options.rehearse and not _rehearses():
        print("--rehearse needs TRITON_INTERPRET=1: without a GPU the kernels are interpreted")
        return 2
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("gpu_check needs an NVIDIA GPU that torch can use; cpu_check runs anywhere")
        return 2
    gc.freeze()  # the libraries' objects stay: a collection between two parts takes no second
    clock = Clock(options.budget)
    result = collect(
        options.quick or options.rehearse,
        options.only,
        _Keeper(options.out),
        clock=clock,
        compiled=options.compiled,
        record=options.record,
    )
    gc.unfreeze()
    if options.sanitize:
        result["sanitizer"] = {}
        for tool in sanitizer.TOOLS:
            result["sanitizer"][tool] = sanitizer.run(tool, clock.left(SANITIZER_SECONDS))
    wrong = bool(checks.finish(result, options.out))
    for tool, row in (result["sanitizer"] or {}).items():
        print(f"{tool}: {row['said']}")
        wrong = wrong or row["ok"] is False
    if options.record:
        wrong = wrong or not result["cuda tests"]["ok"]
        print(f"GPU tests of the CUDA kernels:\n{result['cuda tests']['said']}")
        lines = [] if result["quick"] else gpu_record.merge(result["recorded"])
        print("\n".join(["recorded as right on a GPU:", *(lines or ["nothing"])]))
    for failure in result["failures"]:
        print(f"{failure['section']} raised {failure['raised']}")
    print(f"status: {result['status']}")
    if wrong or result["failures"]:
        return 1
    return 3 if result["not_reached"] else 0


def _arguments() -> argparse.Namespace:
    parser = checks.parser(f"{__doc__}\nExit status: {STATUS}.")
    parser.add_argument("--only", choices=SECTIONS, help="one section, in a file of its own")
    parser.add_argument(
        "--rehearse", action="store_true", help="small sizes on the CPU, kernels interpreted"
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="begin nothing after so long; what is left is named in the file",
    )
    parser.add_argument(
        "--compiled", action="store_true", help="rivals compiled for each layer too: minutes each"
    )
    parser.add_argument(
        "--record",
        action="store_true",
        help="first the CUDA kernels' GPU tests; what they pass is chosen unasked from now on",
    )
    parser.add_argument(
        "--record-from",
        type=Path,
        metavar="FILE",
        help="only take over the record in a file that --record wrote elsewhere; needs no GPU",
    )
    parser.add_argument(
        "--sanitize",
        action="store_true",
        help="the CUDA kernels' GPU tests under compute-sanitizer at last, which takes long",
    )
    options = parser.parse_args()
    if options.budget is not None and not options.budget > 0:
        parser.error(f"--budget: got {options.budget:g}, expected more than 0 seconds")
    return options


def _rehearses() -> bool:
    """Moves all to the CPU, if kernels are interpreted there."""
    global DEVICE
    if dispatch.triton_interpreted():
        DEVICE = "cpu"
    return DEVICE == "cpu"


def _record_from(file: Path) -> int:
    try:
        lines = gpu_record.merge_file(file)
    except (OSError, ValueError) as error:
        print(error)
        return 1
    print("\n".join(["recorded as right on a GPU:", *(lines or ["nothing"])]))
    return 0 if lines else 1


class Clock:
    """Seconds since its making, of those there are."""

    def __init__(self, budget: float | None = None) -> None:
        self.budget = budget
        self.start = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def left(self, most: float) -> float:
        """Seconds until the end of the budget, at least one; `most` without a budget."""
        return most if self.budget is None else max(1.0, self.budget - self.seconds())

    def is_over(self) -> bool:
        return self.budget is not None and self.seconds() >= self.budget


class _Keeper:
    """Writes the report whenever it has grown, and prints what is new in its table."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.printed = 0

    def __call__(self, result: Result) -> None:
        measure.save(result, self.out)
        for row in result["targets"][self.printed :]:
            value = "not measured" if row["value"] is None else f"{row['value']:.3g}"
            sign = ">=" if row["at_least"] else "<="
            print(f"{row['what']}: {value} ({sign} {row['target']:g})", flush=True)
        self.printed = len(result["targets"])


def collect(
    quick: bool,
    only: str | None = None,
    keep: Callable[[Result], object] = lambda _: None,
    *,
    clock: Clock | None = None,
    compiled: bool = False,
    record: bool = False,
) -> Result:
    """Everything that is reported, or one of `SECTIONS`; `keep` gets it whenever it has grown.

    A part that raises is noted, and the others go on. When the clock is over, no further part
    begins. With `record` the CUDA kernels' GPU tests come first.
    """
    clock, guard = clock or Clock(), _Guard()
    wanted = [name for name in SECTIONS if only in (None, name)]
    result: Result = {
        "kind": "gpu_check",
        "quick": quick,
        "only": only,
        "status": "running",
        "not_reached": [],
        "seconds": {},
        "environment": measure.environment(DEVICE),
        "cuda sources": gpu_record.sources(),
        "cuda tests": None,
        "recorded": {},
        "correctness": {},
        "failures": guard.failures,
        "targets": [],
        "compiled": compiled,
        "layers": [],
        "ops": {},
        "ways of mix_experts": None,
        "decode": [],
        "steps": [],
        "sanitizer": None,
    }
    keep(result)
    if record:
        result["cuda tests"] = gpu_record.run(clock.left(GPU_TESTS_SECONDS))
        result["recorded"] = gpu_record.of(result)
        keep(result)
    for place, name in enumerate(wanted):
        began = clock.seconds()
        for _ in SECTIONS[name](quick, guard, result):
            result["seconds"][name] = round(clock.seconds() - began, 1)
            result["recorded"] = gpu_record.of(result)
            keep(result)
            if clock.is_over():
                result["not_reached"] = wanted[place:]
                result["status"] = f"time was up after {clock.seconds():.0f} s, in {name}"
                keep(result)
                return result
    result["status"] = "complete"
    keep(result)
    return result


# --- sections ----------------------------------------------------------------------------------


def _correctness(quick: bool, guard: "_Guard", result: Result) -> Iterator[None]:
    """The small and odd sizes first: they find most that is wrong, in the least time."""
    yield from _check_layers(guard, result, _odd_layers())
    yield from _check_ops(quick, guard, result)
    training, decode = _layer_sizes(quick)
    yield from _check_layers(guard, result, training, training + decode)


def _check_layers(
    guard: "_Guard", result: Result, trained: Sequence[Layer], decoded: Sequence[Layer] = ()
) -> Iterator[None]:
    """Verdicts on backends of `mixed_lora`, of the layers that this report has none of."""
    known = _checked_layers(result)
    for layer in dict.fromkeys((*trained, *decoded)):
        if str(layer) not in known:
            given = [layer] if layer in trained else [], [layer] if layer in decoded else []
            gate = guard(f"correctness of {layer}", checks.correctness, *given)
            checks.join(result["correctness"], gate or {})
            yield


def _checked_layers(result: Result) -> set[str]:
    gate = result["correctness"]
    cases = [case for name in gate if name.startswith("ours_") for case in gate[name]["cases"]]
    return {case["layer"] for case in cases}


def _check_ops(quick: bool, guard: "_Guard", result: Result) -> Iterator[None]:
    """Verdicts on the Triton kernels by op, and on the CUDA kernels by "<op>_cuda"."""
    known = set(result["correctness"])
    for backend, suffix in (("triton", ""), ("cuda", "_cuda")):
        for case in op_checks.checked(quick, backend):
            name = f"{case.op}{suffix}"
            if name in known or (suffix and dispatch.unavailable(case.op, backend, DEVICE)):
                continue
            given = (op_checks.correctness, DEVICE, [case], backend)
            gate = guard(f"correctness of {name}", *given) or {}
            checks.join(result["correctness"], {f"{op}{suffix}": row for op, row in gate.items()})
            yield


def _layer_sizes(quick: bool) -> tuple[list[Layer], list[Layer]]:
    """Layers in training, and of one token per sample."""
    training, decode = TRAINING, DECODE
    if quick:
        training = [replace(row, batch=2, tokens=64, width=256, out=256) for row in TRAINING[:1]]
        decode = [replace(row, width=256, out=256) for row in DECODE[:1]]
    return [replace(r, device=DEVICE) for r in training], [
        replace(r, device=DEVICE) for r in decode
    ]


def _odd_layers() -> list[Layer]:
    layers = (SMALL, replace(SMALL, batch=4, tokens=160, width=256, out=384))
    return [
        replace(layer, dtype=dtype, device=DEVICE) for layer in layers for dtype in op_checks.DTYPES
    ]


def _layers(quick: bool, guard: "_Guard", result: Result) -> Iterator[None]:
    repeats, gate = 5 if quick else 50, result["correctness"]
    training, decode = _layer_sizes(quick)
    yield from _check_layers(guard, result, training, training + decode)
    checked = _checked_layers(result)
    for layer in (row for row in training if str(row) in checked):
        named = {"repeats": repeats, "compiled": result["compiled"]}
        times = [
            guard(str(layer), checks.layer_times, layer, gate, training=trained, **named)
            for trained in (False, True)
        ]
        result["layers"] += [row for row in times if row]
        if all(times):
            result["targets"] += gpu_targets.layer_targets(layer, *(row["ms"] for row in times))
        yield
    many = {"repeats": 4 * repeats, "training": False, "compiled": result["compiled"]}
    for layer in (row for row in decode if str(row) in checked):
        row = guard(str(layer), checks.layer_times, layer, gate, **many)
        result["layers"] += [row] if row else []
        yield
    for layer in (row for row in (*training, *decode) if str(row) in checked):
        name = f"CUDA graph of {layer}"
        row = guard(name, op_checks.graph_times, layer, gate, repeats=repeats)
        result["layers"] += [row] if row else []
        yield


def _ops(quick: bool, guard: "_Guard", result: Result) -> Iterator[None]:
    repeats, gate = 5 if quick else 50, result["correctness"]
    yield from _check_ops(quick, guard, result)
    begun, targets = len(result["targets"]), result["targets"]
    speeds = op_checks.speed(DEVICE, quick, gate, repeats=repeats)
    while (measured := guard("speed of the ops", next, speeds, None)) is not None:
        result["ops"], targets[begun:] = measured
        guard.note(measured[0]["rows"][-1])
        yield
    result["ways of mix_experts"] = []
    ways = op_checks.expert_ways(DEVICE, quick, gate, repeats=repeats)
    while (row := guard("ways of mix_experts", next, ways, None)) is not None:
        result["ways of mix_experts"].append(row)
        guard.note(row)
        yield


def _decode(quick: bool, guard: "_Guard", result: Result) -> Iterator[None]:
    pairs, many, repeats = PAIRS, FEW_OF_MANY, 5 if quick else 200
    if quick:
        pairs = [replace(row, width=256, out=256) for row in pairs[:1]]
        many = [tuple(replace(r, width=256, out=256) for r in rows) for rows in many[:1]]
    checked: dict[str, Any] = {"ok": True, "cases": []}

    def measured(layer: Layer, carrying: int | None = None) -> dict[str, Any] | None:
        layer = replace(layer, device=DEVICE)
        row = guard(f"pair of {layer}", decode_pair.times, layer, carrying, repeats=repeats)
        if row is None:
            return None
        result["decode"].append(row)
        said = ("layer", "carrying", "errors", "failed", "wrong")
        checked["cases"].append({name: row[name] for name in said})
        checked["ok"] = checked["ok"] and row["ok"]
        result["correctness"]["pairs of mixed_lora"] = checked
        return row

    for layer in pairs:
        if row := measured(layer):
            result["targets"] += gpu_targets.pair_targets(layer, row)
        yield
    for layer, few in many:
        rows = [measured(layer, carrying=few.adapters), measured(few)]
        if all(rows):
            result["targets"].append(gpu_targets.few_of_many_target(layer, few, *rows))
        yield


def _steps(quick: bool, guard: "_Guard", result: Result) -> Iterator[None]:
    steps, repeats = [T5_LARGE, LLAMA_7B_4_LAYERS], 5 if quick else 10
    if quick:
        steps = [
            replace(s, width=64, hidden=128, layers=1, heads=2, vocabulary=500, source=16, target=8)
            for s in steps
        ]
    steps = [replace(step, device=DEVICE) for step in steps]
    ours = f"ours_{dispatch.resolve('mixed_lora', torch.device(DEVICE))}"
    yield from _check_layers(guard, result, _odd_layers())
    if not result["correctness"].get(ours, {}).get("ok"):
        return
    for step in steps:
        row = guard(f"{step.kind} step", _step_row, step, repeats)
        if row:
            result["steps"].append(row)
            result["targets"] += gpu_targets.step_targets(step, row)
        yield
    pools = guard("K 2 and K 64", _pool_row, steps[0], repeats)
    if pools:
        result["steps"].append(pools)
        value = ratio(pools["ms"], "K64", "K2")
        result["targets"].append(target("T5 step: K 64 / K 2", value, 1.08))
    yield


# In this order: what is worth most for its time comes first.
SECTIONS = {
    "correctness": _correctness,
    "decode": _decode,
    "ops": _ops,
    "layers": _layers,
    "steps": _steps,
}


class _Guard:
    """Calls sections of the report; what one raises is noted in `failures`, and gives None."""

    def __init__(self) -> None:
        self.failures: list[dict[str, str]] = []

    def note(self, row: Result) -> None:
        """A row that says itself what was raised while it was measured."""
        if "raised" in row:
            self.failures.append({"section": row["case"], "raised": row["raised"]})

    def __call__(
        self, section: str, function: Callable[..., Any], *given: Any, **named: Any
    ) -> Any:
        try:
            return function(*given, **named)
        except Exception as error:
            traceback.print_exc()
            raised = f"{type(error).__name__}: {error}"
            self.failures.append({"section": section, "raised": raised})
            return None
        finally:
            if DEVICE == "cuda":
                gc.collect()
                torch.cuda.empty_cache()


def _step_row(step: Step, repeats: int) -> dict[str, Any]:
    providers = ("ours", "released", "peft_one_lora")
    return checks.step_times({name: (name, step) for name in providers}, repeats=repeats)


def _pool_row(step: Step, repeats: int) -> dict[str, Any]:
    pools = {f"K{count}": ("ours", replace(step, adapters=count)) for count in (2, 64)}
    return checks.step_times(pools, repeats=repeats)


if __name__ == "__main__":
    sys.exit(main())
