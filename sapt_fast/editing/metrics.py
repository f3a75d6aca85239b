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
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from sapt_fast.editing.answers import Examiner, matches
from sapt_fast.editing.data import EditRow, Probe, Tokens

__all__ = ["METRICS", "Questions", "mean", "measure", "questions", "untouched"]

METRICS = ("success", "retention", "upstream", "paraphrase", "locality")


@dataclass(frozen=True)
class Questions:
    """What to ask after some edits: (prompt, expected answer) by the name of the metric.

    `groups` has those of the prompts in `upstream` and `locality` that are reported by a name.
    """

    retention: list[tuple[Tokens, Tokens]]
    upstream: list[tuple[Tokens, Tokens]]
    paraphrase: list[tuple[Tokens, Tokens]]
    locality: list[tuple[Tokens, Tokens]]
    groups: dict[str, list[tuple[Tokens, Tokens]]] = field(default_factory=dict)


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

    def expected(given: Iterable[Probe], group: str | None = None) -> list[tuple[Tokens, Tokens]]:
        probes = [probe for probe in given if group in (None, probe.group)]
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
    local = [probe for row in rows for probe in row.locality]
    names = dict.fromkeys(probe.group for probe in [*upstream, *local])
    return Questions(
        retention=[(row.prompt, row.target) for row in latest.values()],
        upstream=expected(upstream),
        paraphrase=[*paraphrases.items()],
        locality=expected(local),
        groups={name: expected([*upstream, *local], name) for name in names if name is not None},
    )


def untouched(rows: Sequence[EditRow], upstream: Sequence[Probe]) -> list[Tokens]:
    """Returns the prompts whose answers are needed from before the first edit, without repeats."""
    probes = [*upstream, *(probe for row in rows for probe in row.locality)]
    return [*dict.fromkeys(probe.prompt for probe in probes if probe.target is None)]


def measure(
    examiner: Examiner,
    asked: Questions,
    *,
    teacher_forcing: bool = True,
    known: Mapping[Tokens, Tokens] | None = None,
) -> dict[str, dict[str, float | None]]:
    """Asks, and returns each metric but success.

    Args:
        examiner: asks the model.
        asked: the questions.
        teacher_forcing: whether to also compute the metrics by teacher forcing.
        known: answers of the model as it is, by prompt, which are not generated again.

    Returns:
        "generated" and "forced", the metrics by name; and "groups", the share of right answers by
        generation of each group. None for what was not asked.
    """
    by_name = {name: pairs for name, pairs in vars(asked).items() if name != "groups"}
    pairs = [*dict.fromkeys(pair for found in by_name.values() for pair in found)]
    answers = dict(known or {})
    unknown = [*dict.fromkeys(prompt for prompt, _ in pairs if prompt not in answers)]
    answers |= zip(unknown, examiner.answers(unknown), strict=True)  # more of equal length
    shares = examiner.forced(pairs) if teacher_forcing else []
    right = {pair: matches(answers[pair[0]], pair[1]) for pair in pairs}
    forced = dict(zip(pairs, shares, strict=False))

    def means(
        by_name: Mapping[str, Sequence[Any]], values: Mapping[Any, Any]
    ) -> dict[str, float | None]:
        return {
            name: mean([values[pair] for pair in found]) if values else None
            for name, found in by_name.items()
        }

    return {
        "generated": means(by_name, right),
        "forced": means(by_name, forced),
        "groups": means(asked.groups, right),
    }


def mean(values: Sequence[Any]) -> float | None:
    """Returns the mean; None of nothing."""
    return fmean(values) if values else None
