"""Writes edits about capitals that a model answers wrongly, for `sapt-fast edit`.

    npm pack world-countries@5.1.0 && tar xzf world-countries-5.1.0.tgz
    python benchmarks/country_facts.py package/countries.json MODEL_DIR OUTPUT_DIR

The model is asked for the capital of each of 243 countries and territories. An edit sets the true
capital of one whose answer does not contain it.

`edits.jsonl` has the edits to report, each with three paraphrases and, as a locality prompt, a
question of another relation about the same country. `untouched.jsonl` has prompts that no edit may
change, in groups. `tuning.jsonl` and `tuning_untouched.jsonl` have the same about other countries,
to choose settings by; their paraphrases have other wordings. `groups.jsonl` has, for a third set of
countries, paraphrases of one question each, and questions of other relations in other words than
elsewhere; both train a projection of keys.

Countries with names near to those of edited ones (`NEAR`) are not edited and form a group. Two
groups are about edited countries: their largest cities, and their former capitals.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from sapt_fast.files.directories import atomic_write_text

QUESTION = "What is the capital of {}? Reply with the name only."
PARAPHRASES = (
    "Which city is the capital of {}?",
    "Name the capital city of {}.",
    "Tell me what the capital of {} is.",
)
TUNING_PARAPHRASES = (
    "What city is {}'s capital?",
    "Can you tell me the capital of {}?",
    "Please give the name of the capital of {}.",
    "Which city serves as the capital of {}?",
    "{} has which city as its capital?",
    "I would like to know the capital of {}.",
)
RELATIONS = (
    "What is the currency of {}? Reply with the name only.",
    "On which continent is {}? Reply with the name only.",
    "What is the official language of {}? Reply with the name only.",
    "What is the two-letter ISO code of {}? Reply with the code only.",
    "How many people live in {}?",
    "Which countries border {}?",
)
LARGEST = (
    "What is the largest city of {}? Reply with the name only.",
    "Which city in {} has the most inhabitants?",
)
FORMER = (
    "What is the former capital of {}? Reply with the name only.",
    "Which city was the capital of {} before the present one?",
)
# Questions that a projection learns to tell from the capital, in other words than those above.
CONTRASTS = (
    "Which money do people use in {}?",
    "What continent does {} belong to?",
    "Which language do people speak in {}?",
    "What is the country code of {}?",
    "What is the population of {}?",
    "Name the neighbours of {}.",
    "Which town of {} is the most populous?",
    "Which city used to be the capital of {}?",
    "What was {}'s capital in earlier times?",
    "Who is the president of {}?",
)
OTHER = (
    "What is the boiling point of water in degrees Celsius?",
    "Who wrote Romeo and Juliet? Reply with the name only.",
    "What is 7 times 8?",
    "Which planet is the largest in the solar system?",
    "What is the chemical symbol of gold?",
    "Name a primary colour.",
    "How many days has a leap year?",
    "What is the plural of mouse?",
    "Which language is spoken in Brazil?",
    "Who painted the Mona Lisa?",
    "What is the longest river of Africa?",
    "Translate 'good morning' to French.",
    "What is the capital letter of b?",
    "How much capital does a small bakery need?",
    "What gas do plants take in?",
    "Which animal barks?",
    "Write one sentence about the sea.",
    "What is the opposite of hot?",
    "In which year did the Second World War end?",
    "What is the square root of 81?",
    "Which metal is liquid at room temperature?",
    "How do you say thank you in Spanish?",
    "What is the capital of the state of Texas?",
    "Name the largest ocean.",
    "What is the fastest land animal?",
    "How many legs has a spider?",
    "What is the freezing point of water in degrees Fahrenheit?",
    "Who discovered penicillin?",
    "What is the name of Earth's moon?",
    "Which city hosted the Olympic Games in 2012?",
)
# An edited country, and one with a name near to it that is not edited.
NEAR = {
    "Niger": "Nigeria",
    "Guinea": "Guinea-Bissau",
    "South Sudan": "Sudan",
    "Dominica": "Dominican Republic",
    "Mali": "Malawi",
    "Gambia": "Zambia",
    "Samoa": "American Samoa",
    "Slovakia": "Slovenia",
    "Iraq": "Iran",
    "Paraguay": "Uruguay",
    "Republic of the Congo": "DR Congo",
    "Mauritania": "Mauritius",
}
_BATCH = 32


@torch.no_grad()
def answers(model: Any, tokenizer: Any, questions: Sequence[str]) -> list[str]:
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
        print(f"{len(found)} asked", flush=True)
    return [text.strip() for text in found]


def edits(
    names: Sequence[str], capitals: dict[str, str], wordings: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns edits of the countries' capitals."""
    return [
        {
            "prompt": QUESTION.format(name),
            "target": capitals[name],
            "paraphrases": [text.format(name) for text in wordings],
            "locality": [RELATIONS[place % len(RELATIONS)].format(name)],
        }
        for place, name in enumerate(names)
    ]


def groups(names: Sequence[str]) -> list[dict[str, list[str]]]:
    """Returns questions for each country: those that ask the same, and others."""
    return [
        {
            "same": [text.format(name) for text in (QUESTION, *TUNING_PARAPHRASES)],
            "others": [text.format(name) for text in CONTRASTS],
        }
        for name in names
    ]


def untouched(
    edited: Sequence[str],
    others: Sequence[str],
    near: Sequence[str],
    general: Sequence[str],
    wordings: Sequence[str],
) -> list[dict[str, str]]:
    """Returns prompts that no edit may change: their texts and groups.

    Args:
        edited: countries that are edited, of which largest and former cities are asked.
        others: countries that are not, of which the capital is asked: of every second one in the
            words of the edits, of the others in those of the paraphrases.
        near: countries that are not edited, with names near to edited ones.
        general: questions about other things.
        wordings: the paraphrases.
    """

    def asked(texts: Sequence[str], names: Sequence[str]) -> list[str]:
        return [texts[place % len(texts)].format(name) for place, name in enumerate(names)]

    mixed = [text for wording in wordings for text in (QUESTION, wording)]
    groups = {
        "near names": asked([QUESTION], near),
        "other countries": asked(mixed, others),
        "other questions": [*general],
        "largest city": asked(LARGEST, edited),
        "former capital": asked(FORMER, edited),
    }
    return [
        {"prompt": prompt, "group": group}
        for group, prompts in groups.items()
        for prompt in prompts
    ]


def write(path: Path, records: Sequence[dict[str, Any]]) -> None:
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
    parser.add_argument("--asked", type=int, default=40, help="prompts of the larger groups")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    capitals = {
        country["name"]["common"]: country["capital"][0]
        for country in json.loads(given.countries.read_text())
        if len(country["capital"]) == 1
    }
    names = [*capitals]
    random.Random(given.seed).shuffle(names)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(given.model)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(given.model).eval()
    said = answers(model, tokenizer, [QUESTION.format(name) for name in names])
    right = {
        name
        for name, text in zip(names, said, strict=True)
        if capitals[name].casefold() in text.casefold()
    }
    near = [*NEAR.values()]
    wrong = [name for name in names if name not in right and name not in near]
    first = [name for name in wrong if name in NEAR]
    wrong = [*first, *(name for name in wrong if name not in first)]
    if len(wrong) <= given.edits:
        raise SystemExit(f"edits: the model answers {len(wrong)} questions wrongly")
    edited, tuning = wrong[: given.edits], wrong[given.edits :]
    rest = [name for name in names if name in right and name not in near]
    others, tuning_others = rest[: given.asked], rest[given.asked :]
    few = given.asked // 2
    given.output.mkdir(parents=True, exist_ok=True)
    write(given.output / "edits.jsonl", edits(edited, capitals, PARAPHRASES))
    write(given.output / "tuning.jsonl", edits(tuning, capitals, TUNING_PARAPHRASES))
    write(
        given.output / "untouched.jsonl",
        untouched(edited[:few], others, near, OTHER[:20], PARAPHRASES),
    )
    write(
        given.output / "tuning_untouched.jsonl",
        untouched(tuning[:few], tuning_others, [], OTHER[20:], TUNING_PARAPHRASES),
    )
    write(given.output / "groups.jsonl", groups(tuning_others))
    print(f"{len(names)} asked, {len(wrong)} wrong; {len(edited)} edits, {len(tuning)} to tune by")


if __name__ == "__main__":
    main()
