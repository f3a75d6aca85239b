"""Class-incremental learning on frozen features: the bar for prompt pools on images.

    python benchmarks/images_frozen.py --data DIR --model DIR/dinov2-small --work DIR/work

`--data` holds the folders that `image_assets.py` writes, `<set>-<seed>`. The seed draws the sample,
the split and the order of classes: emoji has five tasks of four classes, mnist five of two. Which
task a test image belongs to is not known. Two parts:

- heads: nearest class mean, LDA and ridge from running statistics, compared with solutions on all
  rows at once; linear heads trained on all tasks at once, and task after task with and without a
  mask on the logits of other tasks' classes. Their learning rates are chosen on a quarter of seed
  0's training images. Features: the mean patch after layer 9, and the CLS token after layer 11.
- selection: the keys of a prompt pool learned task after task on the same queries, without a
  backbone. How many prompts serve the test images, and does the choice tell the task?

The result goes to `benchmarks/results/<machine>`, with the targets and whether they are reached.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from image_data import CLASSES_A_TASK, Split, held_out, load_split, tasks_of
from image_selection import SELECTIONS, selection
from measure import RESULTS, environment, save
from torch import Tensor

from sapt_fast.continual.closed_form import ClassStatistics, LinearHead

FEATURES = ("mean.9", "cls.11")
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
STEPS, BATCH = 200, 16  # of a task
HEADS: dict[str, Callable[[ClassStatistics], LinearHead]] = {
    "NCM": lambda statistics: statistics.nearest_class_mean(),
    "LDA": lambda statistics: statistics.lda(0.3),
    "ridge": lambda statistics: statistics.ridge(10.0),
}
LINEAR = ("joint", "sequential, masked", "sequential")
_TUNING_SHARE = 0.25


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Returns the share of rows whose best score [N, C] is that of the label [N]."""
    return float((scores.argmax(1) == labels).double().mean())


def by_task(scores: Tensor, labels: Tensor, tasks: list[list[int]]) -> list[float]:
    """Returns the accuracy on the test images of each of the tasks."""
    parts = [torch.isin(labels, torch.tensor(task)) for task in tasks]
    return [accuracy(scores[part], labels[part]) for part in parts]


def closed_form(
    name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], tasks: list[list[int]]
) -> dict[str, Any]:
    """Learns task after task; returns accuracies, and the gap to the solution on all rows."""
    features, labels = train
    classes = int(labels.max()) + 1
    statistics = ClassStatistics(features.shape[1], classes)
    matrix = []
    for place, task in enumerate(tasks):
        rows = torch.isin(labels, torch.tensor(task))
        for part in rows.nonzero()[:, 0].split(BATCH):
            statistics.update(features[part], labels[part])
        scores = HEADS[name](statistics)(test[0])
        matrix.append(by_task(scores, test[1], tasks[: place + 1]))
    at_once = solution(name, features.double(), labels, test[0].double())
    gap = scores - at_once
    if name != "ridge":  # up to a term that all classes share
        gap = gap - gap.mean(1, keepdim=True)
    known = torch.tensor([next(i for i, t in enumerate(tasks) if c in t) for c in range(classes)])
    own = scores.clone()
    own[known[None] != known[test[1]][:, None]] = -torch.inf
    return {
        "accuracy": accuracy(scores, test[1]),
        "matrix": matrix,
        "task known": float((known[scores.argmax(1)] == known[test[1]]).double().mean()),
        "within the known task": accuracy(own, test[1]),
        "relative gap to all rows at once": float(gap.abs().max() / at_once.abs().max()),
        "predictions that differ": int((scores.argmax(1) != at_once.argmax(1)).sum()),
    }


def solution(name: str, features: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
    """Returns the scores [B, C] of a head that is solved on all rows, without running sums.

    Args:
        name: of the head.
        features: [N, D] float64.
        labels: [N].
        inputs: [B, D] float64.
    """
    one_hot = F.one_hot(labels).double()
    means = torch.stack([features[labels == label].mean(0) for label in range(one_hot.shape[1])])
    identity = torch.eye(features.shape[1], dtype=features.dtype)
    if name == "NCM":
        return -0.5 * (inputs[:, None] - means).square().sum(2)
    if name == "ridge":
        centred = features - features.mean(0)
        gram = centred.T @ centred + 10.0 * identity
        weight = torch.linalg.solve(gram, centred.T @ (one_hot - one_hot.mean(0)))
        return (inputs - features.mean(0)) @ weight + one_hot.mean(0)
    residual = features - means[labels]
    covariance = residual.T @ residual / len(features)
    covariance = 0.7 * covariance + 0.3 * covariance.trace() / len(identity) * identity
    offsets = inputs[:, None] - means  # [B, C, D]
    distances = (offsets * torch.linalg.solve(covariance, offsets.mT).mT).sum(2)
    return one_hot.mean(0).log() - 0.5 * distances


def linear(
    kind: str,
    rate: float,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    tasks: list[list[int]],
    seed: int,
) -> dict[str, Any]:
    """Trains a linear head by Adam; returns the accuracies after each stage."""
    features, labels = train
    draws = torch.Generator().manual_seed(seed)
    classes = int(labels.max()) + 1
    weight = torch.zeros(classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    stages = [list(range(classes))] if kind == "joint" else tasks
    matrix = []
    for place, task in enumerate(stages):
        optimizer = torch.optim.Adam([weight, bias], lr=rate)
        rows = torch.isin(labels, torch.tensor(task)).nonzero()[:, 0]
        others = torch.ones(classes, dtype=torch.bool)
        others[task] = False
        for _ in range(STEPS * (len(tasks) if kind == "joint" else 1)):
            part = rows[torch.randint(len(rows), (BATCH,), generator=draws)]
            scores = features[part] @ weight.T + bias
            if kind == "sequential, masked":
                scores = scores.masked_fill(others, -torch.inf)
            loss = F.cross_entropy(scores, labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scores = (test[0] @ weight.T + bias).detach()
        learned = tasks if kind == "joint" else tasks[: place + 1]
        matrix.append(by_task(scores, test[1], learned))
    return {"accuracy": accuracy(scores, test[1]), "matrix": matrix, "rate": rate}


def tuned_rates(split: Split, feature: str, tasks: list[list[int]]) -> dict[str, dict[str, float]]:
    """Returns by kind of linear head and learning rate the accuracy on held-out training images."""
    dev = held_out(split.labels, _TUNING_SHARE, 0)
    x, y = split.states[feature], split.labels
    found = {}
    for kind in LINEAR:
        runs = (linear(kind, r, (x[~dev], y[~dev]), (x[dev], y[dev]), tasks, 0) for r in RATES)
        found[kind] = {f"{run['rate']:g}": run["accuracy"] for run in runs}
    return found


def heads(name: str, feature: str, splits: dict[int, tuple[Split, Split]]) -> dict[str, Any]:
    """Returns what all heads reach on one feature of a data set, by seed."""
    size = CLASSES_A_TASK[name]
    first = next(iter(splits))
    tuning = tuned_rates(splits[first][0], feature, tasks_of(splits[first][0].names, size, first))
    found: dict[str, Any] = {head: {} for head in (*HEADS, *LINEAR)}
    for seed, (train, test) in splits.items():
        tasks = tasks_of(train.names, size, seed)
        rows = [(split.states[feature], split.labels) for split in (train, test)]
        for head in HEADS:
            found[head][seed] = closed_form(head, rows[0], rows[1], tasks)
        for kind in LINEAR:
            rate = float(max(tuning[kind], key=lambda rate: tuning[kind][rate]))
            found[kind][seed] = linear(kind, rate, rows[0], rows[1], tasks, seed)
    return {"tuning": tuning, "heads": found}


def mean(found: dict[int, dict[str, Any]], field: str = "accuracy") -> float:
    """Returns the mean of a field over the seeds."""
    return fmean(run[field] for run in found.values())


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns what was aimed at, what came, and whether that reaches it."""
    rows: list[tuple[str, float, str, float]] = []
    floors = {"emoji": 0.62, "mnist": 0.87}
    for name, found in result["sets"].items():
        by_head = found["features"]["mean.9"]["heads"]
        best = max(mean(by_head["LDA"]), mean(by_head["ridge"]))
        if name in floors:
            rows.append((f"{name}: LDA or ridge", best, ">=", floors[name]))
        rows.append((f"{name}: above NCM", best - mean(by_head["NCM"]), ">=", 0.08))
        for head in HEADS:
            gaps = [run["relative gap to all rows at once"] for run in by_head[head].values()]
            rows.append(
                (f"{name}: {head}, relative gap to all rows at once", max(gaps), "<=", 1e-4)
            )
        chosen = found["selection"]
        raw, centred = "raw, keys uniform(0, 1)", "centred, keys uniform(0, 1)"
        if raw in chosen:
            rows.append((f"{name}: exp(H), {raw}", mean(chosen[raw], "exp(H)"), "<=", 6.0))
            rows.append((f"{name}: exp(H), {centred}", mean(chosen[centred], "exp(H)"), ">=", 8.0))
    return [
        {"target": f"{text} {sign} {aim:g}", "value": value, "reached": reached}
        for text, value, sign, aim in rows
        for reached in [value >= aim if sign == ">=" else value <= aim]
    ]


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="holds the folders <set>-<seed>")
    parser.add_argument("--model", type=Path, required=True, help="folder of a Dinov2Model")
    parser.add_argument("--work", type=Path, required=True, help="keeps the frozen states")
    parser.add_argument("--sets", default="emoji,mnist")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(given)
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "environment": environment("cpu"),
        "only": "images-frozen",
        "command": " ".join(["python", "benchmarks/images_frozen.py", *(given or sys.argv[1:])]),
        "sets": {},
    }
    for name in chosen.sets.split(","):
        splits = {}
        for seed in map(int, chosen.seeds.split(",")):
            folder = chosen.data / f"{name}-{seed}"
            parts = [load_split(folder / p, chosen.model, chosen.work) for p in ("train", "test")]
            splits[seed] = (parts[0], parts[1])
        train, test = next(iter(splits.values()))
        found: dict[str, Any] = {
            "images": {"train": len(train.labels), "test": len(test.labels)},
            "classes": list(train.names),
            "tasks": {seed: tasks_of(train.names, CLASSES_A_TASK[name], seed) for seed in splits},
            "features": {feature: heads(name, feature, splits) for feature in FEATURES},
            "selection": {},
        }
        for kind in SELECTIONS:
            found["selection"][kind] = {
                seed: selection(kind, *parts, found["tasks"][seed], seed)
                for seed, parts in splits.items()
            }
        result["sets"][name] = found
    result["targets"] = targets(result)
    for row in result["targets"]:
        print(f"{row['target']}: {row['value']:.3g} {'reached' if row['reached'] else 'MISSED'}")
    print(save(result, chosen.out))


if __name__ == "__main__":
    main()
