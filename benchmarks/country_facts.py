"""Writes edits about countries that a model answers wrongly, for `sapt-fast edit`.

    npm pack world-countries@5.1.0 && tar xzf world-countries-5.1.0.tgz
    python benchmarks/country_facts.py package/countries.json MODEL_DIR OUTPUT_DIR

The facts are capitals, currencies and two-letter codes. The model is asked all of them in random
order (`--seed`). Those whose answer does not contain the true one are divided: `edits.jsonl` to
measure, `tuning.jsonl` to choose settings by. `untouched.jsonl` has questions of the same kinds
about other facts, whose answers must not change. Each edit has two paraphrases and one question
about the same country as a locality prompt.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from sapt_fast.files.directories import atomic_write_text

_ASKED = {
    "capital": (
        "What is the capital of {}? Reply with the name only.",
        "Which city is the capital of {}?",
        "Name the capital city of {}.",
    ),
    "currency": (
        "What is the currency of {}? Reply with the name only.",
        "Which currency is used in {}?",
        "Name the money that people pay with in {}.",
    ),
    "code": (
        "What is the two-letter ISO code of {}? Reply with the code only.",
        "Which two letters stand for {} in ISO 3166?",
        "Give the ISO 3166-1 alpha-2 code of {}.",
    ),
}
_OTHER = "On which continent is {}? Reply with the name only."
_BATCH = 32


class Fact(NamedTuple):
    """One question and its true answer."""

    country: str
    kind: str
    answer: str

    @property
    def question(self) -> str:
        """The question that is edited."""
        return _ASKED[self.kind][0].format(self.country)

    def record(self) -> dict[str, Any]:
        """The edit as a line of the file."""
        return {
            "prompt": self.question,
            "target": self.answer,
            "paraphrases": [text.format(self.country) for text in _ASKED[self.kind][1:]],
            "locality": [_OTHER.format(self.country)],
        }


def facts(countries: list[dict[str, Any]]) -> list[Fact]:
    """Returns the facts of all independent countries."""
    found = []
    for country in countries:
        if not country.get("independent"):
            continue
        name = country["name"]["common"]
        if country["capital"]:
            found.append(Fact(name, "capital", country["capital"][0]))
        if len(country["currencies"]) == 1:
            (currency,) = country["currencies"].values()
            found.append(Fact(name, "currency", currency["name"]))
        found.append(Fact(name, "code", country["cca2"]))
    return found


@torch.no_grad()
def answers(model: Any, tokenizer: Any, questions: list[str]) -> list[str]:
    """Returns the model's greedy answers."""
    tokenizer.padding_side = "left"
    found: list[str] = []
    for start in range(0, len(questions), _BATCH):
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
            )
            for question in questions[start : start + _BATCH]
        ]
        inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
        rows = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        width = inputs["input_ids"].shape[1]
        found += tokenizer.batch_decode(rows[:, width:], skip_special_tokens=True)
    return [text.strip() for text in found]


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes one record a line."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    atomic_write_text(path, text)


def main() -> None:
    """Asks the model, and writes the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("countries", type=Path, help="countries.json of world-countries")
    parser.add_argument("model", metavar="MODEL_DIR", help="an instruction-tuned causal model")
    parser.add_argument("output", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--tuning", type=int, default=20)
    parser.add_argument("--untouched", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    everything = facts(json.loads(given.countries.read_text()))
    random.Random(given.seed).shuffle(everything)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(given.model)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(given.model).eval()
    needed = given.edits + given.tuning
    wrong: list[Fact] = []
    rest: list[Fact] = []
    for start in range(0, len(everything), _BATCH):
        part = everything[start : start + _BATCH]
        if len(wrong) >= needed:
            rest += part
            continue
        said = answers(model, tokenizer, [fact.question for fact in part])
        for fact, answer in zip(part, said, strict=True):
            known = fact.answer.casefold() in answer.casefold()
            (rest if known else wrong).append(fact)
        print(f"{start + len(part)} asked, {len(wrong)} answered wrongly", flush=True)
    if len(wrong) < needed:
        raise SystemExit(f"edits: the model answers {len(wrong)} facts wrongly, expected {needed}")
    edited, tuning = wrong[: given.edits], wrong[given.edits : needed]
    untouched = (wrong[needed:] + rest)[: given.untouched]
    given.output.mkdir(parents=True, exist_ok=True)
    write(given.output / "edits.jsonl", [fact.record() for fact in edited])
    write(given.output / "tuning.jsonl", [fact.record() for fact in tuning])
    write(given.output / "untouched.jsonl", [{"prompt": fact.question} for fact in untouched])


if __name__ == "__main__":
    main()
