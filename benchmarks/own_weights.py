"""Why the newest task's adapter gets little weight in SAPT, and what changes that, on a CPU.

    python benchmarks/own_weights.py --data CL_Benchmark --model MINILM_DIR

Ten tasks are learned in one order and its reverse, with SAPT's router changed in one way at a time
(`VARIANTS`). Three weights are recorded for each task, on its own dev rows or test rows: that of
its own adapter before the task trains, right after, and after the last task. If the second is low,
the adapter was never chosen; if only the third is, the router forgot. Only the encoder's upper
layers have adapters (`cached_encoder.py`). Every run is a folder under --work: a script that was
ended goes on with the same command.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import measure
import torch
from cached_encoder import CachedSource, upper_query_and_value
from real_encoder import BASE, TASKS, packaged_model
from safetensors.torch import load_file
from torch import Tensor

from sapt_fast.continual.compare.compare import compare
from sapt_fast.continual.strategies import STRATEGIES
from sapt_fast.continual.strategies.sapt import Sapt

RATE, ROUTER_RATE = 1e-3, 2e-3
# What is changed; the learning rates are those that were tuned, unless they are what changes.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "own_key_loss_0.03": {"own_key_loss": 0.03},
    "own_key_loss_0.1": {"own_key_loss": 0.1},
    "own_key_loss_0.3": {"own_key_loss": 0.3},
    "key_rate_x10": {"key_learning_rate": 10 * ROUTER_RATE},
    "router_rate_x3": {"key_learning_rate": 6e-3, "query_learning_rate": 6e-3},
    "mean_query_key": {"key_init": "mean_query"},
    "half_temperature": {"temperature": 384**0.5 / 2},
    "twice_temperature": {"temperature": 384**0.5 * 2},
    "kl_ratio_0.5": {"kl_ratio": 0.5},
    "standardized_max": {"pooling": "max", "standardize_query": True},
}


class Watched(Sapt):
    """SAPT that notes each task's weight on its own adapter before the task trains."""

    def begin_task(self, task: Any, learned: Sequence[Any]) -> None:
        super().begin_task(task, learned)
        self.start = float(self.bench.mean_attention(task.dev, None)[-1])

    def end_task(self, task: Any) -> None:
        super().end_task(task)
        self.starts = [*getattr(self, "starts", []), self.start]

    def state(self) -> dict[str, Tensor]:
        return {"starts": torch.tensor(self.starts)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.starts = state["starts"].tolist() if "starts" in state else []


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder that holds Long_Sequence/")
    parser.add_argument("--model", help="an encoder's folder")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--orders", type=int, default=2, choices=(1, 2))
    parser.add_argument("--steps", type=int, default=BASE.steps)
    parser.add_argument("--eval-rows", type=int, default=40, help="dev and test rows of a task")
    parser.add_argument("--first", type=int, default=4, help="first layer with adapters")
    parser.add_argument("--source-length", type=int, default=40, help="most tokens of a text")
    parser.add_argument("--work", type=Path, default=Path("runs/own_weights"))
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    return parser.parse_args(given)


def weights_of(cells: Sequence[Any]) -> dict[str, Any]:
    """Returns AP, F.Ra and the own weights by learning position, means over runs."""
    found: dict[str, list[list[float]]] = {"start": [], "learned": [], "end": []}
    for cell in cells:
        results = cell.results
        for name, kept in (("learned", "training_attention"), ("end", "testing_attention")):
            found[name].append([row[place] for place, row in enumerate(results[kept])])
        last = sorted((cell.folder / "checkpoints").iterdir(), key=_number)[-1]
        found["start"].append(load_file(last / "strategy.safetensors")["starts"].tolist())
    by_position = {
        name: [fmean(values) for values in zip(*rows, strict=True)] for name, rows in found.items()
    }
    metrics = {name: [cell.results["metrics"][name] for cell in cells] for name in ("AP", "F.Ra")}
    return {"runs": len(cells), **metrics, "own weight": by_position}


def _number(folder: Path) -> int:
    return int(folder.name.split("-")[0])


def main(given: Sequence[str] | None = None) -> Path:
    options = arguments(given)
    torch.set_num_threads(1)
    STRATEGIES["sapt_watched"] = Watched
    names = options.tasks.split(",")
    orders = [",".join(names), ",".join(names[::-1])][: options.orders]
    source = CachedSource(
        model=options.model or packaged_model(),
        benchmark="Long_Sequence",
        data=options.data,
        tasks=orders[0],
        max_train=400,
        max_eval=options.eval_rows,
        kind="encoder",
        first=options.first,
    )
    base = BASE.but(
        strategy="sapt_watched",
        steps=options.steps,
        limit_pseudo_samples=False,  # all replayed inputs are real
        max_source_length=options.source_length,
        target_modules=upper_query_and_value(options.first),
        learning_rate=RATE,
        key_learning_rate=ROUTER_RATE,
        query_learning_rate=ROUTER_RATE,
    )
    rows = {name: base.but(**VARIANTS[name]) for name in options.variants.split(",")}
    comparison = compare(source, rows, options.work, orders=orders)
    result = {
        "only": "own-weights",
        "command": shlex.join(["python", *(sys.argv if given is None else given)]),
        "environment": measure.environment("cpu"),
        "orders": orders,
        "variants": {
            name: {"changed": VARIANTS[name], **weights_of(comparison.of(name))} for name in rows
        },
    }
    path = measure.save(result, options.out)
    print(path)
    return path


if __name__ == "__main__":
    main()
