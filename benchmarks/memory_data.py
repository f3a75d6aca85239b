"""Facts and questions for `memory_facts.py`: true facts about countries, and random labels.

The countries are those of the npm package `world-countries@5.1.0`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Fact", "Question", "Questions", "known_answers", "questions"]

# The question that is memorised, one in nearly the same words, and one in other words.
_TRUE = {
    "capital": (
        "What is the capital of {}?",
        "Tell me the capital of {}.",
        "Which city is the seat of government of {}?",
    ),
    "currency": (
        "What is the currency of {}?",
        "Tell me the currency of {}.",
        "Which money do people pay with in {}?",
    ),
    "code": (
        "What is the two-letter ISO code of {}?",
        "Tell me the two-letter ISO code of {}.",
        "Which two letters stand for {} in ISO 3166?",
    ),
    "calling code": (
        "What is the telephone calling code of {}?",
        "Tell me the telephone calling code of {}.",
        "Which digits do I dial before a phone number in {}?",
    ),
}
_RANDOM = {
    "member": (
        "What is the membership number of {}?",
        "Tell me the membership number of {}.",
        "Under which number is {} registered as a member?",
    ),
    "locker": (
        "What is the locker code of {}?",
        "Tell me the locker code of {}.",
        "Which digits open the locker that belongs to {}?",
    ),
}
_OTHER_COUNTRY = ("On which continent is {}?", "Which languages are spoken in {}?")
_OTHER_PERSON = ("How old is {}?", "Where does {} live?")
_ROUTER_COUNTRY = (
    "How large is {}?", "Who governs {}?", "What is the climate of {} like?",
    "Which animals live in {}?", "Describe the flag of {}.", "Which food is typical of {}?",
    *(text for texts in _TRUE.values() for text in texts),
)  # fmt: skip
_ROUTER_PERSON = (
    "What does {} do for a living?", "Which car does {} drive?",
    *(text for texts in _RANDOM.values() for text in texts),
)  # fmt: skip
_OPPOSITES = (
    "hot cold, big small, up down, left right, day night, black white, fast slow, high low, "
    "open closed, happy sad, early late, rich poor, hard soft, wet dry, full empty, old young, "
    "strong weak, long short, heavy light, clean dirty"
)
_GENERAL = (
    "Write one sentence about the sea.", "Name a fruit that is yellow.", "What do bees make?",
    "How many days does a week have?", "What is water made of?", "Name a planet with rings.",
    "Which animal barks?", "What is the color of grass?", "How many legs does a spider have?",
    "Which season comes after winter?", "Translate 'good morning' into French.",
    "What is the freezing point of water in Celsius?", "Who wrote Romeo and Juliet?",
    "Name a metal that is liquid at room temperature.", "How many minutes are in an hour?",
    "What is the largest ocean?", "Which organ pumps blood?", "What do plants need to grow?",
    "Name a string instrument.", "What is the square root of 81?",
)  # fmt: skip
_ASKED = 32  # candidates that the model is asked together


class Fact(NamedTuple):
    """A question with the answer to memorise.

    Attributes:
        kind: its template.
        name: of the country or person.
        prompt, near, far: the question, in nearly the same and in other words.
        target: the answer.
        known: whether the answer is true.
    """

    kind: str
    name: str
    prompt: str
    near: str
    far: str
    target: str
    known: bool


class Question(NamedTuple):
    """A question whose answer must not change.

    Attributes:
        prompt: the question.
        group: "same entity", "same words" or "other".
        answer: the right one; None if there is no single one.
    """

    prompt: str
    group: str
    answer: str | None


@dataclass
class Questions:
    """Everything that the experiment asks.

    Attributes:
        facts: to measure; half of them true ones that the model does not know.
        tuning: other facts, to choose settings by.
        untouched, tuning_untouched: questions beside the facts of both.
        router: prompts about other names, to fit the router on.
    """

    facts: list[Fact]
    tuning: list[Fact]
    untouched: list[Question] = field(default_factory=list)
    tuning_untouched: list[Question] = field(default_factory=list)
    router: list[str] = field(default_factory=list)


def questions(
    countries: Path,
    counts: tuple[int, int, int],
    wrong: Callable[[list[str], list[str]], list[bool]],
    seed: int = 0,
) -> Questions:
    """Draws everything; no country or person is in more than one of facts, tuning and router.

    Args:
        countries: `countries.json`.
        counts: facts, tuning facts and untouched questions (half as many for tuning).
        wrong: tells which prompts the model answers without the given target.
        seed: of all random choices.
    """
    draw = random.Random(seed)
    table = json.loads(countries.read_text())
    states = [c for c in table if c["independent"] and len(c["currencies"]) == 1]
    draw.shuffle(states)
    people = _people(draw)
    halves = counts[0] // 2, counts[1] // 2
    taken: list[list[Fact]] = []
    used: list[set[str]] = []
    for number, half in enumerate(halves):
        part = states[number::4] if number else states[0::2]
        candidates = [fact for state in part for fact in _true(state)]
        draw.shuffle(candidates)
        chosen: list[Fact] = []
        while candidates and len(chosen) < half:  # asks no more than it takes
            asked, candidates = candidates[:_ASKED], candidates[_ASKED:]
            misses = wrong([f.prompt for f in asked], [f.target for f in asked])
            chosen += [fact for fact, miss in zip(asked, misses, strict=True) if miss]
        chosen = chosen[:half]
        if len(chosen) < half:
            raise SystemExit(f"facts: the model misses {len(chosen)}, expected {half}")
        labels = [f"{draw.randrange(10**6):06d}" for _ in range(half)]
        chosen += [_random(draw, next(people), label) for label in labels]
        draw.shuffle(chosen)
        taken.append(chosen)
        used.append({fact.name for fact in chosen})
    free = [s for s in states if s["name"]["common"] not in used[0] | used[1]]
    found = Questions(*taken)
    for facts, count, share in ((found.facts, counts[2], 0), (found.tuning, counts[2] // 2, 1)):
        asked = _untouched(draw, facts, free[share::3], table, people, count)
        (found.untouched if share == 0 else found.tuning_untouched).extend(asked)
    names = [c["name"]["common"] for c in (*free[2::3], *table) if not c["independent"]]
    found.router = [draw.choice(_ROUTER_COUNTRY).format(name) for name in names for _ in range(4)]
    found.router += [draw.choice(_ROUTER_PERSON).format(next(people)) for _ in range(150)]
    found.router += [f"What is {a} times {b}?" for a in range(3, 8) for b in range(3, 8)]
    return found


def known_answers(found: list[Question]) -> list[int]:
    """Returns the places of questions with a right answer."""
    return [place for place, question in enumerate(found) if question.answer is not None]


def _true(country: dict[str, Any]) -> Iterator[Fact]:
    name = country["name"]["common"]
    idd = country["idd"]
    answers = {
        "capital": country["capital"][0] if country["capital"] else None,
        "currency": next(iter(country["currencies"].values()))["name"],
        "code": country["cca2"],
        "calling code": f"{idd['root']}{idd['suffixes'][0]}" if len(idd["suffixes"]) == 1 else None,
    }
    for kind, answer in answers.items():
        if answer:
            yield Fact(kind, name, *(t.format(name) for t in _TRUE[kind]), answer, True)


def _random(draw: random.Random, name: str, label: str) -> Fact:
    kind = draw.choice([*_RANDOM])
    return Fact(kind, name, *(t.format(name) for t in _RANDOM[kind]), label, False)


def _people(draw: random.Random) -> Iterator[str]:
    """Yields invented names, each once."""
    starts = [
        "Ba",
        "Ce",
        "Do",
        "Fi",
        "Ga",
        "Ha",
        "Jo",
        "Ka",
        "Le",
        "Mi",
        "No",
        "Pe",
        "Ra",
        "Sa",
        "Ti",
        "Vo",
        "We",
        "Zu",
    ]
    ends = [
        "dar",
        "lin",
        "mer",
        "non",
        "pol",
        "ras",
        "sel",
        "tov",
        "vik",
        "wan",
        "xel",
        "zor",
        "bren",
        "dolf",
        "gart",
    ]
    seen: set[str] = set()
    while True:
        name = " ".join(draw.choice(starts) + draw.choice(ends) for _ in range(2))
        if name not in seen:
            seen.add(name)
            yield name


def _untouched(
    draw: random.Random,
    facts: list[Fact],
    free: list[dict[str, Any]],
    table: list[dict[str, Any]],
    people: Iterator[str],
    count: int,
) -> list[Question]:
    regions = {c["name"]["common"]: c["region"] for c in table}
    same = []
    for fact in facts:
        if fact.known:
            same.append(Question(_OTHER_COUNTRY[0].format(fact.name), "same entity",
                                 regions[fact.name].removesuffix("s")))  # fmt: skip
            same.append(Question(_OTHER_COUNTRY[1].format(fact.name), "same entity", None))
            others = [kind for kind in _TRUE if kind != fact.kind]
            kind = draw.choice(others)
            same.append(Question(_TRUE[kind][0].format(fact.name), "same entity", None))
        else:
            text = draw.choice(_OTHER_PERSON)
            same.append(Question(text.format(fact.name), "same entity", None))
    asked = {fact.prompt for fact in facts}
    same = [question for question in dict.fromkeys(same) if question.prompt not in asked]
    words = [Question(f.prompt, "same words", f.target) for c in free for f in _true(c)]
    for texts in _RANDOM.values():
        words += [
            Question(texts[0].format(next(people)), "same words", None) for _ in range(count // 12)
        ]
    other = [Question(text, "other", None) for text in _GENERAL]
    for pair in _OPPOSITES.split(", "):
        first, second = pair.split()
        other.append(Question(f"What is the opposite of {first}?", "other", second))
    for a in range(2, 10):
        other += [Question(f"What is {a} plus {b}?", "other", str(a + b)) for b in range(2, 10)]
    chosen = []
    for part in (same, words, other):
        draw.shuffle(part)
        chosen += part[: count // 3]
    return chosen
