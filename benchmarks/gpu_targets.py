"""What is asked of the speed and the memory that gpu_check measures: rows of its table."""

from typing import Any

import decode_pair
import torch
from checks import ratio, target
from providers import Layer
from training_step import Step

from sapt_fast import dispatch

Target = dict[str, Any]


def pair_targets(layer: Layer, row: dict[str, Any]) -> list[Target]:
    ours = decode_pair.chosen(row) or "ours"
    what = f"decode of a pair, graph, B {layer.batch}"
    over = ratio(row["ms"], "peft", ours)
    return [
        target(f"{what}: {ours} / base linears", ratio(row["ms"], ours, "base"), 1.15),
        target(f"{what}: PEFT loop / {ours}", over, 8, at_least=True),
    ]


def few_of_many_target(
    layer: Layer, few: Layer, of_many: dict[str, Any], alone: dict[str, Any]
) -> Target:
    ours = decode_pair.chosen(of_many) or "ours"
    both = {n: r["ms"][ours] for n, r in (("many", of_many), ("few", alone)) if ours in r["ms"]}
    what = f"{few.adapters} of {layer.adapters} adapters carry weight / {few.adapters} adapters"
    return target(f"decode, B {layer.batch}, {ours}: {what}", ratio(both, "many", "few"), 1.15)


def step_targets(step: Step, row: dict[str, Any]) -> list[Target]:
    times, peak = ratio(row["ms"], "released", "ours"), row["peak_bytes"]
    memory = peak["ours"] / peak["released"] if "released" in peak else None
    return [
        target(f"{step.kind} step: released / ours", times, 2.5, at_least=True),
        target(f"{step.kind} step peak memory: ours / released", memory, 0.5),
    ]


def layer_targets(layer: Layer, forward: dict[str, Any], both: dict[str, Any]) -> list[Target]:
    size = f"d {layer.width}, R {layer.adapters * layer.rank}"
    ours = f"ours_{dispatch.resolve('mixed_lora', torch.device(layer.device), dtype=layer.dtype)}"
    rivals = [name for name in both if not name.startswith("ours_") and name != "base"]
    best = min(rivals, key=lambda name: both[name]["median"], default="none ran")
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
