"""Everything at once on a machine with an NVIDIA GPU: one JSON file and a short table.

Environment, correctness of every backend and every op in every dtype, layers and ops against what
else computes them, by themselves and as CUDA graphs, decoding steps, and whole training steps.
"""

import gc
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import checks
import decode_pair
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
    options = checks.arguments(__doc__, tuple(SECTIONS))
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("gpu_check needs an NVIDIA GPU that torch can use; cpu_check runs anywhere")
        return 2
    result = collect(options.quick, options.only, lambda part: measure.save(part, options.out))
    if options.sanitize:
        result["sanitizer"] = {tool: sanitizer.run(tool) for tool in sanitizer.TOOLS}
    status = checks.finish(result, options.out)
    for tool, row in (result["sanitizer"] or {}).items():
        print(f"{tool}: {row['said']}")
        status = status or int(row["ok"] is False)
    if options.record:
        print(f"recorded as right on a GPU: {', '.join(_record(result)) or 'none'}")
    for failure in result["failures"]:
        print(f"{failure['section']} raised {failure['raised']}")
    return 1 if result["failures"] else status


def collect(
    quick: bool, only: str | None = None, keep: Callable[[Result], object] = lambda _: None
) -> Result:
    """Everything that is reported, or one of `SECTIONS`; `keep` gets it whenever it has grown.

    A part that raises is noted, and the others go on.
    """
    guard = _Guard()
    result: Result = {
        "kind": "gpu_check",
        "quick": quick,
        "only": only,
        "environment": measure.environment(DEVICE),
        "correctness": {},
        "failures": guard.failures,
        "targets": [],
        "layers": [],
        "ops": {},
        "ways of mix_experts": None,
        "decode": [],
        "steps": [],
        "sanitizer": None,
    }
    for name, section in SECTIONS.items():
        if only in (None, name):
            for _ in section(quick, guard, result):
                keep(result)
    return result


def _layers(quick: bool, guard: "_Guard", result: Result) -> Iterator[None]:
    training, decode, repeats = TRAINING, DECODE, 5 if quick else 50
    if quick:
        training = [replace(row, batch=2, tokens=64, width=256, out=256) for row in TRAINING[:1]]
        decode = [replace(row, width=256, out=256) for row in DECODE[:1]]
    training = [replace(layer, device=DEVICE) for layer in training]
    decode = [replace(layer, device=DEVICE) for layer in decode]
    gate = _layer_gate(guard, [*_odd_layers(), *training], training + decode)
    result["correctness"] |= gate
    yield
    for layer in training if gate else ():
        times = [
            guard(str(layer), checks.layer_times, layer, gate, repeats=repeats, training=trained)
            for trained in (False, True)
        ]
        result["layers"] += [row for row in times if row]
        if all(times):
            result["targets"] += _layer_targets(layer, *(row["ms"] for row in times))
        yield
    many = {"repeats": 4 * repeats, "training": False}
    for layer in decode if gate else ():
        row = guard(str(layer), checks.layer_times, layer, gate, **many)
        result["layers"] += [row] if row else []
        yield
    for layer in (*training, *decode) if gate else ():
        name = f"CUDA graph of {layer}"
        row = guard(name, op_checks.graph_times, layer, gate, repeats=repeats)
        result["layers"] += [row] if row else []
        yield


def _odd_layers() -> list[Layer]:
    layers = (SMALL, replace(SMALL, batch=4, tokens=160, width=256, out=384))
    return [
        replace(layer, dtype=dtype, device=DEVICE) for layer in layers for dtype in op_checks.DTYPES
    ]


def _layer_gate(
    guard: "_Guard", trained: list[Layer], decoded: Sequence[Layer] = ()
) -> dict[str, dict[str, Any]]:
    return guard("correctness of mixed_lora", checks.correctness, trained, decoded) or {}


def _ops(quick: bool, guard: "_Guard", result: Result) -> Iterator[None]:
    repeats, cases = 5 if quick else 50, op_checks.checked(quick, "triton")
    gate = guard("correctness of the ops", op_checks.correctness, DEVICE, cases) or {}
    result["correctness"] |= gate
    yield
    result["correctness"] |= _cuda_gate(guard, quick)
    yield
    measured = guard(
        "speed of the ops", op_checks.speed, DEVICE, quick, result["correctness"], repeats=repeats
    )
    result["ops"], targets = measured or ({}, [])
    result["targets"] += targets
    yield
    result["ways of mix_experts"] = guard(
        "ways of mix_experts",
        op_checks.expert_ways,
        DEVICE,
        quick,
        gate,
        repeats=repeats,
    )
    yield


def _cuda_gate(guard: "_Guard", quick: bool) -> dict[str, dict[str, Any]]:
    """`correctness` of the CUDA kernels, by the ops' names with `_cuda` behind them."""
    within = [
        case
        for case in op_checks.checked(quick, "cuda")
        if dispatch.unavailable(case.op, "cuda", DEVICE) is None
    ]
    if not within:
        return {}
    gate = guard("correctness of the CUDA kernels", op_checks.correctness, DEVICE, within, "cuda")
    return {f"{op}_cuda": row for op, row in (gate or {}).items()}


def _record(result: Result) -> list[str]:
    """Notes the sources of the CUDA kernels that were right, so that they are chosen unasked."""
    from sapt_fast.cuda_kernels import common

    names = {"ours_cuda": "mixed_lora"}
    right = [
        names.get(name, name.removesuffix("_cuda"))
        for name, row in result["correctness"].items()
        if name.endswith("_cuda") and row["ok"]
    ]
    recorded = json.loads(common.RECORDED.read_text())
    recorded |= {op: common.source_digest(op) for op in right}
    common.RECORDED.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    return right


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
        checked["cases"].append({k: row[k] for k in ("layer", "carrying", "errors", "failed")})
        checked["ok"] = checked["ok"] and row["ok"]
        result["correctness"]["pairs of mixed_lora"] = checked
        return row

    for layer in pairs:
        if row := measured(layer):
            result["targets"] += _pair_targets(layer, row)
        yield
    for layer, few in many:
        rows = [measured(layer, carrying=few.adapters), measured(few)]
        if all(rows):
            result["targets"].append(_few_of_many_target(layer, few, *rows))
        yield


def _pair_targets(layer: Layer, row: dict[str, Any]) -> list[dict[str, Any]]:
    ours = decode_pair.chosen(row) or "ours"
    what = f"decode of a pair, graph, B {layer.batch}"
    over = ratio(row["ms"], "peft", ours)
    return [
        target(f"{what}: {ours} / base linears", ratio(row["ms"], ours, "base"), 1.15),
        target(f"{what}: PEFT loop / {ours}", over, 8, at_least=True),
    ]


def _few_of_many_target(
    layer: Layer, few: Layer, of_many: dict[str, Any], alone: dict[str, Any]
) -> dict[str, Any]:
    ours = decode_pair.chosen(of_many) or "ours"
    both = {n: r["ms"][ours] for n, r in (("many", of_many), ("few", alone)) if ours in r["ms"]}
    what = f"{few.adapters} of {layer.adapters} adapters carry weight / {few.adapters} adapters"
    return target(f"decode, B {layer.batch}, {ours}: {what}", ratio(both, "many", "few"), 1.15)


def _steps(quick: bool, guard: "_Guard", result: Result) -> Iterator[None]:
    steps, repeats = [T5_LARGE, LLAMA_7B_4_LAYERS], 5 if quick else 10
    if quick:
        steps = [
            replace(s, width=64, hidden=128, layers=1, heads=2, vocabulary=500, source=16, target=8)
            for s in steps
        ]
    steps = [replace(step, device=DEVICE) for step in steps]
    ours = f"ours_{dispatch.resolve('mixed_lora', torch.device(DEVICE))}"
    if ours not in result["correctness"]:
        result["correctness"] |= _layer_gate(guard, _odd_layers())
    if not result["correctness"].get(ours, {}).get("ok"):
        return
    for step in steps:
        row = guard(f"{step.kind} step", _step_row, step, repeats)
        if row:
            result["steps"].append(row)
            result["targets"] += _step_targets(step, row)
        yield
    pools = guard("K 2 and K 64", _pool_row, steps[0], repeats)
    if pools:
        result["steps"].append(pools)
        value = ratio(pools["ms"], "K64", "K2")
        result["targets"].append(target("T5 step: K 64 / K 2", value, 1.08))
    yield


SECTIONS = {"layers": _layers, "ops": _ops, "decode": _decode, "steps": _steps}


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
