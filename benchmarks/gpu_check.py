"""Everything at once on a machine with an NVIDIA GPU: one JSON file and a short table.

Environment, correctness of every backend in every dtype, the layer and the router against every
provider, and whole training steps.
"""

import sys
from dataclasses import replace
from typing import Any

import checks
import measure
import torch
from checks import ratio, target
from providers import Layer
from training_step import Step

from sapt_fast.ops import QueryProjection, pool_tokens, route

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
    training, decode, steps = TRAINING, DECODE, [T5_LARGE, LLAMA_7B_4_LAYERS]
    repeats = 50
    if options.quick:
        training = [replace(row, batch=2, tokens=64, width=256, out=256) for row in TRAINING[:1]]
        decode = [replace(row, width=256, out=256) for row in DECODE[:1]]
        steps = [
            replace(s, width=64, hidden=128, layers=1, heads=2, vocabulary=500, source=16, target=8)
            for s in steps
        ]
        repeats = 5
    odd = (SMALL, replace(SMALL, batch=4, tokens=160, width=256, out=384))
    dtypes = (torch.float32, BF16, torch.float16)
    gate = checks.correctness(
        [
            *(replace(layer, dtype=dtype, device=DEVICE) for layer in odd for dtype in dtypes),
            *(replace(layer, device=DEVICE) for layer in training),
        ],
        [replace(layer, device=DEVICE) for layer in (*training, *decode)],
    )
    layers, targets = [], []
    for layer in training:
        layer = replace(layer, device=DEVICE)
        forward = checks.layer_times(layer, gate, repeats=repeats, training=False)
        both = checks.layer_times(layer, gate, repeats=repeats, training=True)
        layers += [forward, both]
        targets += _layer_targets(layer, forward["ms"], both["ms"])
    for layer in decode:
        layer = replace(layer, device=DEVICE)
        layers.append(checks.layer_times(layer, gate, repeats=4 * repeats, training=False))
    timed_steps = []
    for step in steps:
        step = replace(step, device=DEVICE)
        providers = ("ours", "released", "peft_one_lora")
        row = checks.step_times({p: (p, step) for p in providers}, repeats=max(5, repeats // 5))
        timed_steps.append(row)
        peak = row["peak_bytes"]
        targets += [
            target(
                f"{step.kind} step: released / ours",
                ratio(row["ms"], "released", "ours"),
                2.5,
                at_least=True,
            ),
            target(
                f"{step.kind} step peak memory: ours / released",
                peak["ours"] / peak["released"],
                0.5,
            ),
        ]
    first = replace(steps[0], device=DEVICE)
    pools = checks.step_times(
        {f"K{k}": ("ours", replace(first, adapters=k)) for k in (2, 64)},
        repeats=max(5, repeats // 5),
    )
    targets.append(target("T5 step: K 64 / K 2", ratio(pools["ms"], "K64", "K2"), 1.08))
    result = {
        "kind": "gpu_check",
        "quick": options.quick,
        "environment": measure.environment(DEVICE),
        "correctness": gate,
        "targets": targets,
        "layers": layers,
        "router": _router_times(repeats),
        "steps": [*timed_steps, pools],
    }
    return checks.finish(result, options.out)


def _layer_targets(
    layer: Layer, forward: dict[str, Any], both: dict[str, Any]
) -> list[dict[str, Any]]:
    size = f"d {layer.width}, R {layer.adapters * layer.rank}"
    rivals = [name for name in both if not name.startswith("ours_") and name != "base"]
    best = min(rivals, key=lambda name: both[name]["median"])
    small = layer.width <= 2048
    rows = [
        target(
            f"forward, {size}: ours / base",
            ratio(forward, "ours_triton", "base"),
            1.2 if small else 1.06,
        ),
        target(
            f"forward+backward, {size}: ours / best rival ({best})",
            ratio(both, "ours_triton", best),
            1.0,
        ),
        target(
            f"forward+backward, {size}: released / ours",
            ratio(both, "released", "ours_triton"),
            12 if small else 5,
            at_least=True,
        ),
    ]
    if small:
        rows.append(
            target(
                f"forward, {size}: ours / stacked", ratio(forward, "ours_triton", "stacked"), 0.85
            )
        )
    return rows


def _router_times(repeats: int) -> dict[str, Any]:
    """Token ids to weights, B 8, T 512, D 1024, K 15."""
    width, hidden = 1024, 100
    table = torch.randn(32128, width, device=DEVICE, dtype=BF16)
    ids = torch.randint(0, 32128, (8, 512), device=DEVICE)
    down, up = torch.randn(hidden, width, device=DEVICE), torch.randn(width, hidden, device=DEVICE)
    norm = torch.ones(width, device=DEVICE), torch.zeros(width, device=DEVICE)
    keys, projection = torch.rand(15, width, device=DEVICE), QueryProjection(down, up, *norm)

    def weights() -> None:
        with torch.no_grad():
            route(pool_tokens(ids, table), keys, projection)

    return measure.interleaved_ms({"route": weights}, DEVICE, repeats=repeats)


if __name__ == "__main__":
    sys.exit(main())
