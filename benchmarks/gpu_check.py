"""Everything at once on a machine with an NVIDIA GPU: one JSON file and a short table.

Environment, correctness of every backend and every op in every dtype, layers and ops against what
else computes them, by themselves and as CUDA graphs, and whole training steps.
"""

import gc
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import checks
import measure
import op_checks
import torch
from checks import ratio, target
from providers import Layer
from training_step import Step

from sapt_fast import dispatch

DEVICE = "cuda"
BF16 = torch.bfloat16
# (width, adapters, rank): total ranks 60, 60, 240 and 1024; 8192 rows each.
TRAINING = [
    Layer(16, 512, 1024, 1024, 15, 4, BF16),
    Layer(16, 512, 4096, 4096, 15, 4, BF16),
    Layer(16, 512, 4096, 4096, 60, 4, BF16),
    Layer(16, 512, 8192, 8192, 64, 16, BF16),
]
DECODE = [Layer(batch, 1, 4096, 4096, 15, 4, BF16) for batch in (1, 16)]
T5_LARGE = Step("t5", 1024, 2816, 24, 16, 32128, 8, 512, 50, adapters=15, dtype="bfloat16")
LLAMA_7B_4_LAYERS = Step(
    "llama", 4096, 11008, 4, 32, 32000, 2, 974, 50, adapters=15, dtype="bfloat16"
)
SMALL = Layer(3, 33, 96, 80, 15, 4, torch.float32)


def main() -> int:
    options = checks.arguments(__doc__)
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("gpu_check needs an NVIDIA GPU that torch can use; cpu_check runs anywhere")
        return 2
    result = collect(options.quick)
    status = checks.finish(result, options.out)
    for failure in result["failures"]:
        print(f"{failure['section']} raised {failure['raised']}")
    return 1 if result["failures"] else status


def collect(quick: bool) -> dict[str, Any]:
    """Everything that is reported. A section that raises is noted, and the others go on."""
    training, decode, steps, repeats = TRAINING, DECODE, [T5_LARGE, LLAMA_7B_4_LAYERS], 50
    sizes = op_checks.QUICK if quick else op_checks.FULL
    if quick:
        training = [replace(row, batch=2, tokens=64, width=256, out=256) for row in TRAINING[:1]]
        decode = [replace(row, width=256, out=256) for row in DECODE[:1]]
        steps = [
            replace(s, width=64, hidden=128, layers=1, heads=2, vocabulary=500, source=16, target=8)
            for s in steps
        ]
        repeats = 5
    training = [replace(layer, device=DEVICE) for layer in training]
    decode = [replace(layer, device=DEVICE) for layer in decode]
    steps = [replace(step, device=DEVICE) for step in steps]
    guard = _Guard()
    odd = (SMALL, replace(SMALL, batch=4, tokens=160, width=256, out=384))
    checked = [
        *(replace(layer, dtype=d, device=DEVICE) for layer in odd for d in op_checks.DTYPES),
        *training,
    ]
    nothing: dict[str, dict[str, Any]] = {}
    layer_gate = guard("correctness of mixed_lora", checks.correctness, checked, training + decode)
    op_gate = guard("correctness of the ops", op_checks.correctness, DEVICE, sizes.checked)
    gate = (layer_gate or nothing) | (op_gate or nothing)
    layers, targets = [], []
    for layer in training if layer_gate else ():
        times = [
            guard(str(layer), checks.layer_times, layer, gate, repeats=repeats, training=trained)
            for trained in (False, True)
        ]
        layers += [row for row in times if row]
        if all(times):
            targets += _layer_targets(layer, *(row["ms"] for row in times))
    for layer in decode if layer_gate else ():
        many = {"repeats": 4 * repeats, "training": False}
        layers.append(guard(str(layer), checks.layer_times, layer, gate, **many))
    for layer in (*training, *decode) if layer_gate else ():
        name = f"CUDA graph of {layer}"
        layers.append(guard(name, op_checks.graph_times, layer, gate, repeats=repeats))
    measured = guard("speed of the ops", op_checks.speed, DEVICE, sizes, gate, repeats=repeats)
    ops, op_targets = measured or ({}, [])
    ways = guard(
        "ways of mix_experts",
        op_checks.expert_ways,
        DEVICE,
        sizes.ways,
        gate,
        repeats=repeats,
    )
    targets += op_targets
    timed_steps = []
    for step in steps:
        row = guard(f"{step.kind} step", _step_row, step, max(5, repeats // 5))
        if row:
            timed_steps.append(row)
            targets += _step_targets(step, row)
    pools = guard("K 2 and K 64", _pool_row, steps[0], max(5, repeats // 5))
    if pools:
        timed_steps.append(pools)
        targets.append(target("T5 step: K 64 / K 2", ratio(pools["ms"], "K64", "K2"), 1.08))
    return {
        "kind": "gpu_check",
        "quick": quick,
        "environment": measure.environment(DEVICE),
        "correctness": gate,
        "failures": guard.failures,
        "targets": targets,
        "layers": [row for row in layers if row],
        "ops": ops,
        "ways of mix_experts": ways,
        "steps": timed_steps,
    }


class _Guard:
    """Calls sections of the report; what one raises is noted in `failures`, and gives None."""

    def __init__(self) -> None:
        self.failures: list[dict[str, str]] = []

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
            gc.collect()
            if DEVICE == "cuda":
                torch.cuda.empty_cache()


def _step_row(step: Step, repeats: int) -> dict[str, Any]:
    providers = ("ours", "released", "peft_one_lora")
    return checks.step_times({name: (name, step) for name in providers}, repeats=repeats)


def _step_targets(step: Step, row: dict[str, Any]) -> list[dict[str, Any]]:
    times, peak = ratio(row["ms"], "released", "ours"), row["peak_bytes"]
    memory = peak["ours"] / peak["released"]
    return [
        target(f"{step.kind} step: released / ours", times, 2.5, at_least=True),
        target(f"{step.kind} step peak memory: ours / released", memory, 0.5),
    ]


def _pool_row(step: Step, repeats: int) -> dict[str, Any]:
    pools = {f"K{count}": ("ours", replace(step, adapters=count)) for count in (2, 64)}
    return checks.step_times(pools, repeats=repeats)


def _layer_targets(
    layer: Layer, forward: dict[str, Any], both: dict[str, Any]
) -> list[dict[str, Any]]:
    size = f"d {layer.width}, R {layer.adapters * layer.rank}"
    ours = f"ours_{dispatch.resolve('mixed_lora', torch.device(layer.device), dtype=layer.dtype)}"
    rivals = [name for name in both if not name.startswith("ours_") and name != "base"]
    best = min(rivals, key=lambda name: both[name]["median"])
    small = layer.width <= 2048
    rows = [
        target(
            f"forward, {size}: ours / base",
            ratio(forward, ours, "base"),
            1.2 if small else 1.06,
        ),
        target(
            f"forward+backward, {size}: ours / best rival ({best})",
            ratio(both, ours, best),
            1.0,
        ),
        target(
            f"forward+backward, {size}: released / ours",
            ratio(both, "released", ours),
            12 if small else 5,
            at_least=True,
        ),
    ]
    if small:
        rows.append(
            target(f"forward, {size}: ours / stacked", ratio(forward, ours, "stacked"), 0.85)
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
