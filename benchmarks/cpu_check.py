"""Correctness and speed on a CPU against every provider: one JSON file and a short table."""

import sys
from dataclasses import replace
from typing import Any, NamedTuple

import checks
import measure
import search_check
import torch
from checks import over, ratio, target, under
from providers import Layer
from training_step import Step

LAYER = Layer(8, 512, 1024, 1024, 15, 4, torch.float32)
DECODE = Layer(1, 1, 1024, 1024, 15, 4, torch.float32)
# What a CPU without instructions for bfloat16 would run: in torch, in oneDNN and in our kernels.
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "SAPT_FAST_CPU_CAPABILITY": "avx2",
}
STEP = Step("t5", 512, 2048, 6, 8, 32128, batch=8, source=256, target=50, adapters=15)


class Measured(NamedTuple):
    """What the targets are about; each as `checks` returned it."""

    train32: dict[str, Any]
    train16: dict[str, Any]
    forward16: dict[str, Any]
    decoding: dict[str, Any]
    steps: dict[str, Any]
    pools: dict[str, Any]
    saved: dict[str, Any]


def main() -> int:
    options = checks.arguments(__doc__)
    layer, decode, step, repeats = LAYER, DECODE, STEP, 12
    if options.quick:
        layer = replace(LAYER, batch=2, tokens=32, width=128, out=128)
        decode = replace(DECODE, width=128, out=128)
        step = replace(
            STEP, width=64, hidden=128, layers=1, heads=2, vocabulary=500, source=16, target=8
        )
        repeats = 3
    odd = replace(layer, batch=3, tokens=33, width=96, out=80)
    halves = (torch.bfloat16, torch.float16)
    gate = checks.correctness(
        [
            layer,
            replace(layer, dtype=torch.bfloat16),
            odd,
            *(replace(odd, dtype=d) for d in halves),
        ],
        [decode, *(replace(decode, batch=3, dtype=d) for d in halves)],
    )
    train32 = checks.paired_times(layer, gate, repeats=repeats, training=True)
    train16 = checks.paired_times(
        replace(layer, dtype=torch.bfloat16), gate, repeats=repeats, training=True
    )
    forward16 = _with_avx2_alone(replace(layer, dtype=torch.bfloat16), gate, repeats)
    decoding = checks.paired_times(decode, gate, repeats=40 * repeats, training=False)
    steps = checks.step_times(
        {
            "ours": ("ours", step),
            "released": ("released", step),
            "peft_one_lora": ("peft_one_lora", step),
        },
        repeats=max(3, repeats // 2),
    )
    pools = checks.step_times(
        {f"K{k}": ("ours", replace(step, adapters=k)) for k in (2, 64)},
        repeats=max(3, repeats // 2),
    )
    saved = checks.saved_for_backward(layer)
    searches = search_check.run(quick=options.quick, repeats=max(3, repeats // 2))
    measured = Measured(train32, train16, forward16, decoding, steps, pools, saved)
    targets = [*_targets(measured), *searches["targets"]]
    result = {
        "kind": "cpu_check",
        "quick": options.quick,
        "environment": measure.environment("cpu"),
        "correctness": {**gate, **searches["correctness"]},
        "targets": targets,
        "layers": [train32, train16, decoding, forward16],
        "saved_for_backward": saved,
        "steps": [steps, pools],
        "ops": searches["rows"],
    }
    return checks.finish(result, options.out)


def _with_avx2_alone(layer: Layer, gate: dict[str, dict[str, Any]], repeats: int) -> dict[str, Any]:
    """Times of a forward on a CPU without bfloat16, after a check of our kernels there.

    Forward only: torch's product of the backward takes 100 times as long as in float32 there.
    """
    from sapt_fast import _C

    best, rivals = _C.cpu_capability(), []
    if "avx2" in _C.cpu_capabilities():
        rivals = ["base"]
        _C.set_cpu_capability("avx2")
        checks.join(
            gate, checks.correctness([replace(layer, batch=3, tokens=33, width=96, out=80)])
        )
        _C.set_cpu_capability(best)
    return checks.paired_times(
        layer, gate, repeats=repeats, training=False, rivals=rivals, variables=AVX2
    )


def _targets(measured: Measured) -> list[dict[str, Any]]:
    train32, train16, forward16, decoding, steps, pools, saved = measured
    step_ms = steps["ms"]
    return [
        target("layer forward+backward fp32: ours / base", under(train32, "base"), 1.08),
        target("layer fp32: ours / base, both by oneDNN", under(train32, "base_onednn"), 1.15),
        target("layer bf16: ours / base", under(train16, "base"), 1.3),
        target(
            "layer bf16 forward, AVX2 alone: base / ours", over(forward16, "base"), 4, at_least=True
        ),
        target("layer fp32: released / ours", over(train32, "released"), 3.8, at_least=True),
        target("layer bf16: released / ours", over(train16, "released"), 12, at_least=True),
        target("layer fp32: PEFT loop / ours", over(train32, "peft"), 2.6, at_least=True),
        target(
            "layer bf16: PEFT loop (float32 adapters, its default) / ours",
            over(train16, "peft_default"),
            3,
            at_least=True,
        ),
        target(
            "layer bf16: PEFT loop (bf16 adapters) / ours",
            over(train16, "peft"),
            3,
            at_least=True,
        ),
        target("layer fp32: ours / stacked torch", under(train32, "stacked"), 1.0),
        target("layer fp32: ours / stacked torch by oneDNN", under(train32, "stacked_onednn"), 1.0),
        target("layer bf16: ours / stacked torch", under(train16, "stacked"), 1.0),
        target(
            "layer bf16: ours / stacked torch under torch.compile",
            under(train16, "stacked_compiled"),
            0.8,
        ),
        target("saved for backward / (M * R)", saved["elements"] / saved["rows_times_rank"], 1.001),
        target("T5 step: ours / PEFT with one LoRA", ratio(step_ms, "ours", "peft_one_lora"), 1.05),
        target("T5 step: released / ours", ratio(step_ms, "released", "ours"), 1.55, at_least=True),
        target("T5 step: K 64 / K 2", ratio(pools["ms"], "K64", "K2"), 1.12),
        target(
            "T5 step peak memory: ours / PEFT with one LoRA",
            steps["peak_bytes"]["ours"] / steps["peak_bytes"]["peft_one_lora"],
            1.05,
        ),
        target("decode one token: ours / base", under(decoding, "base"), 1.25),
        target(
            "import sapt_fast after torch: seconds",
            measure.import_seconds("sapt_fast", after="torch"),
            0.15,
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
