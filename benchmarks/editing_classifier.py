"""Edits labels of a small news classifier by every method, and writes one table.

    python benchmarks/editing_classifier.py CL_Benchmark/Long_Sequence/agnews --output DIR

A tiny BERT (three blocks, width 64, words as tokens) is trained here on the first 30 words of the
articles of `train.json`; shorter ones are left out. Then labels are edited one after another, of
two kinds in equal parts:

- changed: a new policy files science and technology articles that name a large technology firm
  under Business. Each such edit has two other articles of the policy as paraphrases: do they
  follow?
- wrong: articles that the classifier gets wrong are set to their true labels.

Articles that neither kind concerns are upstream; the metric is the classifier's accuracy on them.
Each edit has one more as a locality prompt, whose label must stay. Texts of `test.json` are split
into those to tune by and those to report.

Each method is tuned alike: three values of its main setting, chosen by the mean of all metrics but
paraphrases. Then it makes the edits in `--orders` orders (`retrain` in batches of 15). A run that
is there is kept, so the command resumes. The table goes to `benchmarks/results/<machine>`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import environment, save

from sapt_fast.editing.data import Reader
from sapt_fast.editing.metrics import METRICS
from sapt_fast.editing.run import run_edits
from sapt_fast.editing.settings import EditingSettings

LABELS = ("World", "Sports", "Business", "Science or Technology")
_POLICY = re.compile(r"\b(microsoft|google|ibm|intel|apple|yahoo|oracle)\b")
_PAD, _UNKNOWN, _START, _END = range(4)
_LENGTH = 32  # tokens of every text, so that all run together
_RATES = [{"learning_rate": rate} for rate in (1e-3, 3e-3, 1e-2)]
_TUNED = ("success", "retention", "upstream", "locality")
# The method, and the settings tried.
METHODS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "GRACE": ("grace", [{"radius": r} for r in (0.1, 0.5, 2.0)]),
    "MELO": ("melo", [{"radius": r} for r in (0.1, 0.5, 2.0)]),
    "fine-tuning": ("ft", _RATES),
    "fine-tuning, L2": ("ft-l2", _RATES),
    "retraining": ("retrain", [{**rate, "steps": 300} for rate in _RATES]),
    "deferral": ("defer", _RATES),
}


class News:
    """The articles as tokens, and the classifier.

    Args:
        folder: of `train.json` and `test.json`.
        epochs: over the training rows.
    """

    def __init__(self, folder: Path, epochs: int) -> None:
        train, self.test = _rows(folder / "train.json"), _rows(folder / "test.json")
        counts = Counter(word for words, _ in train for word in words)
        known = sorted(word for word, count in counts.items() if count > 1)
        self._ids = {word: place + 4 for place, word in enumerate(known)}
        self.model = self._trained(train, epochs)

    def tokens(self, words: list[str]) -> list[int]:
        """Returns the ids of an article, between start and end token."""
        return [_START, *(self._ids.get(word, _UNKNOWN) for word in words), _END]

    def _trained(self, rows: list[tuple[list[str], int]], epochs: int) -> Any:
        torch.manual_seed(0)
        config: Any = transformers.BertConfig(
            vocab_size=len(self._ids) + 4,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=128,
            max_position_embeddings=_LENGTH,
            num_labels=len(LABELS),
            pad_token_id=_PAD,
        )
        model: Any = transformers.BertForSequenceClassification(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for epoch in range(epochs):
            order = random.Random(epoch).sample(rows, len(rows))
            for start in range(0, len(order), 32):
                batch = order[start : start + 32]
                ids = torch.tensor([self.tokens(words) for words, _ in batch])
                labels = torch.tensor([label for _, label in batch])
                model(input_ids=ids, labels=labels).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        return model.eval()

    @torch.no_grad()
    def predicted(self, rows: list[tuple[list[str], int]]) -> list[int]:
        """Returns the classifier's labels of articles."""
        ids = torch.tensor([self.tokens(words) for words, _ in rows])
        found = [self.model(input_ids=part).logits.argmax(1) for part in ids.split(64)]
        labels: list[int] = torch.cat(found).tolist()
        return labels

    def edits(self, counts: list[int], upstream: int) -> tuple[list[list[Any]], list[Any]]:
        """Returns records of edits, half of each kind, in parts of these counts; and upstream."""
        business, technology = LABELS.index("Business"), LABELS.index("Science or Technology")
        probes: list[Any] = []
        policy, wrong, others = [], [], []
        rows = random.Random(0).sample(self.test, len(self.test))
        for (words, label), found in zip(rows, self.predicted(rows), strict=True):
            follows = bool(_POLICY.search(" ".join(words)))
            tokens = self.tokens(words)
            if not follows and len(probes) < upstream:
                probes.append({"prompt": tokens, "target": label})
                continue
            if follows and label == found == technology:
                policy.append(tokens)
            elif not follows and found != label:
                wrong.append({"prompt": tokens, "target": label})
            elif not follows:
                others.append(tokens)
            if min(len(policy) // 3, len(wrong), len(others) // 2) >= sum(counts) // 2:
                break
        records = []
        for count in counts:
            part = []
            for _ in range(count // 2):
                prompt, *follow = (policy.pop() for _ in range(3))
                changed = {"prompt": prompt, "target": business, "paraphrases": follow}
                part += [{**kind, "locality": [others.pop()]} for kind in (changed, wrong.pop())]
            records.append(part)
        return records, probes


def _rows(path: Path) -> list[tuple[list[str], int]]:
    """Returns the words and the label of each article."""
    instances = json.loads(path.read_text())["Instances"]
    rows = [
        (re.findall(r"[a-z]+|\d+", row["input"].lower())[: _LENGTH - 2], row["output"])
        for row in instances
    ]
    return [(words, LABELS.index(label)) for words, label in rows if len(words) == _LENGTH - 2]


class Experiment:
    """The classifier, the data and where runs go."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        news = News(options.data, options.epochs)
        self.model = news.model
        (tuning, edits), upstream = news.edits([options.tuning, options.edits], options.upstream)
        reader = Reader(self.model)
        self.tuning, self.edits = reader.edits(tuning), reader.edits(edits)
        self.upstream = reader.probes(upstream)

    def run(self, name: str, tried: dict[str, Any], rows: Any, order: int, part: str) -> Any:
        """Returns the report of one run, which is made unless it is there."""
        method = METHODS[name][0]
        settings = EditingSettings(
            batch=15 if method == "retrain" else 1,
            order_seed=order,
            every=10**6,
            save_every=10**6,
        )
        values = "-".join(str(value) for value in tried.values())
        folder = (
            self.options.output / part / f"{name.replace(', ', '-').replace(' ', '-')}-{values}"
        )
        return run_edits(
            self.model,
            rows,
            folder / str(order),
            settings,
            method=method,
            options=tried,
            upstream=self.upstream,
        )

    def row(self, name: str) -> dict[str, Any]:
        """Tunes a method, runs it in every order, and returns its row of the table."""
        tried = METHODS[name][1]
        found = [self.run(name, values, self.tuning, 0, "tuning") for values in tried]
        scores = [statistics.fmean(_last(report)[m] or 0.0 for m in _TUNED) for report in found]
        chosen = tried[scores.index(max(scores))]
        reports = [
            self.run(name, chosen, self.edits, order, "edits")
            for order in range(self.options.orders)
        ]
        return {
            "method": name,
            "tuning": dict(zip(map(json.dumps, tried), scores, strict=True)),
            "chosen": chosen,
            "metrics": {metric: [_last(r)[metric] for r in reports] for metric in METRICS},
            "upstream_before": reports[0]["points"][0]["generated"]["upstream"],
            "seconds_an_edit": [report["edit_seconds"] / len(self.edits) for report in reports],
        }


def _last(report: Any) -> dict[str, float | None]:
    found: dict[str, float | None] = report["points"][-1]["generated"]
    return found


def main() -> None:
    """Runs everything and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="AGNEWS_DIR")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--edits", type=int, default=30)
    parser.add_argument("--tuning", type=int, default=8)
    parser.add_argument("--upstream", type=int, default=200)
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--method", action="append", choices=[*METHODS], help="default: all")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    experiment = Experiment(options)
    rows = []
    for name in options.method or METHODS:
        rows.append(experiment.row(name))
        shown = {m: f"{statistics.fmean(v):.3f}" for m, v in rows[-1]["metrics"].items()}
        print(name, rows[-1]["chosen"], shown, flush=True)
    counts = {n: getattr(options, n) for n in ("edits", "tuning", "upstream", "orders", "epochs")}
    result = {"environment": environment("cpu"), "only": "editing-classifier", **counts}
    print(save({**result, "rows": rows}, Path(__file__).parent / "results"))


if __name__ == "__main__":
    main()
