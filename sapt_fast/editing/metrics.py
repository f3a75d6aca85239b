"""The metrics of a model after some edits.

| metric | prompts | right if |
|---|---|---|
| success (ES) | each edit's own, asked as soon as it was made | the answer is the target |
| retention (ERR) | those of all edits so far | the answer is the target |
| upstream (TRR) | of a file of untouched prompts | the answer is that of before the edits |
| paraphrase | the paraphrases of all edits so far | the answer is the edit's target |
| locality | the locality prompts of all edits so far | the answer is that of before the edits |

Each is a mean over prompts. Edits that could not be made count. Of a prompt that is edited more
than once, the last target counts. A prompt that was edited is neither a paraphrase nor untouched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sapt_fast.editing.answers import Examiner, matches
from sapt_fast.editing.data import EditRow, Probe, Tokens

__all__ = ["METRICS", "Questions", "mean", "measure", "questions", "untouched"]

METRICS = ("success", "retention", "upstream", "paraphrase", "locality")


@dataclass(frozen=True)
class Questions:
    """What to ask after some edits: (prompt, expected answer) by the name of the metric."""

    retention: list[tuple[Tokens, Tokens]]
    upstream: list[tuple[Tokens, Tokens]]
    paraphrase: list[tuple[Tokens, Tokens]]
    locality: list[tuple[Tokens, Tokens]]


def questions(
    rows: Sequence[EditRow], upstream: Sequence[Probe], before: Mapping[Tokens, Tokens]
) -> Questions:
    """Returns what to ask.

    Args:
        rows: the edits so far, oldest first.
        upstream: prompts that no edit should touch.
        before: the answers before the first edit, by prompt; of probes without a target.
    """
    latest = {row.prompt: row for row in rows}

    def expected(probes: Iterable[Probe]) -> list[tuple[Tokens, Tokens]]:
        distinct = {probe.prompt: probe for probe in probes if probe.prompt not in latest}
        return [
            (prompt, before[prompt] if probe.target is None else probe.target)
            for prompt, probe in distinct.items()
        ]

    paraphrases = {
        text: row.target
        for row in latest.values()
        for text in row.paraphrases
        if text not in latest
    }
    return Questions(
        retention=[(row.prompt, row.target) for row in latest.values()],
        upstream=expected(upstream),
        paraphrase=[*paraphrases.items()],
        locality=expected(probe for row in rows for probe in row.locality),
    )


def untouched(rows: Sequence[EditRow], upstream: Sequence[Probe]) -> list[Tokens]:
    """Returns the prompts whose answers are needed from before the first edit, without repeats."""
    probes = [*upstream, *(probe for row in rows for probe in row.locality)]
    return [*dict.fromkeys(probe.prompt for probe in probes if probe.target is None)]


def measure(examiner: Examiner, asked: Questions) -> dict[str, dict[str, float | None]]:
    """Asks, and returns each metric but success, "generated" and "forced"; None if not asked."""
    by_name: dict[str, list[tuple[Tokens, Tokens]]] = vars(asked)
    everything = [pair for pairs in by_name.values() for pair in pairs]  # more of equal length
    answers = examiner.answers([prompt for prompt, _ in everything])
    right = iter([matches(a, wanted) for a, (_, wanted) in zip(answers, everything, strict=True)])
    shares = iter(examiner.forced(everything))
    found: dict[str, dict[str, float | None]] = {"generated": {}, "forced": {}}
    for name, pairs in by_name.items():
        found["generated"][name] = mean([next(right) for _ in pairs])
        found["forced"][name] = mean([next(shares) for _ in pairs])
    return found


def mean(values: Sequence[Any]) -> float | None:
    """Returns the mean; None of nothing."""
    return fmean(values) if values else None
