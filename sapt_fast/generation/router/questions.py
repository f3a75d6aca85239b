"""Questions with labels: those of the package, and files in the same form."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from sapt_fast.files.reading import DATA_BYTES, parse_json, read_bytes

__all__ = ["SPLITS", "LabelledQuestion", "packaged_questions", "read_questions", "split_questions"]

SPLITS = ("train", "dev", "test")
_DEV_SHARE, _TEST_SHARE = 0.15, 0.15


@dataclass(frozen=True)
class LabelledQuestion:
    """A question for a router.

    Attributes:
        question: the text.
        label: 1 if points that are written independently suit its answer, else 0.
        split: "train", "dev", "test", or None if the file does not say.
        category: the kind of question, for tables.
        language: ISO 639-1 code.
    """

    question: str
    label: int
    split: str | None = None
    category: str | None = None
    language: str | None = None


def packaged_questions() -> list[LabelledQuestion]:
    """Returns the 613 questions of this package, in 16 languages, with their splits.

    Label 1: advice, comparisons, reasons, overviews, ideas. Label 0: mathematics, code, procedures
    whose steps need each other, translations, single facts, rewriting, roleplay, flowing text.
    """
    with resources.as_file(resources.files(__package__) / "questions.jsonl") as path:
        return read_questions(path)


def read_questions(path: str | os.PathLike[str]) -> list[LabelledQuestion]:
    """Reads a file of labelled questions.

    Args:
        path: JSONL, an object a line: question and label, and optional split, category, language.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line is not such an object, or the file has no question.
        ValueError: if a question appears twice, or only some questions have a split.
    """
    source = Path(path)
    found: list[LabelledQuestion] = []
    first: dict[str, int] = {}
    for number, line in enumerate(read_bytes(source, DATA_BYTES).split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{source}, line {number}"
        row = _row(parse_json(line, place), place)
        if first.setdefault(row.question, number) != number:
            raise ValueError(f"{place}: has the question of line {first[row.question]}")
        found.append(row)
    if not found:
        raise ValueError(f"{source}: has no questions")
    if len({row.split is None for row in found}) > 1:
        raise ValueError(f"{source}: some questions have a split and some do not")
    return found


def _row(content: Any, place: str) -> LabelledQuestion:
    if not isinstance(content, Mapping) or not {"question", "label"} <= content.keys():
        raise ValueError(f"{place}: expected an object with question and label")
    question, label, split = content["question"], content["label"], content.get("split")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{place}: question: got {str(question)[:40]!r}, expected text")
    if type(label) is not int or label not in (0, 1):
        raise ValueError(f"{place}: label: got {str(label)[:40]!r}, expected 0 or 1")
    if split is not None and split not in SPLITS:
        raise ValueError(f"{place}: split: got {str(split)[:40]!r}, expected train, dev or test")
    texts = [content.get(name) for name in ("category", "language")]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise ValueError(f"{place}: category, language: got {texts}, expected text")
    return LabelledQuestion(question, label, split, *texts)


def split_questions(
    rows: Sequence[LabelledQuestion], seed: int = 0
) -> dict[str, list[LabelledQuestion]]:
    """Returns the questions by "train", "dev" and "test".

    Questions without a split are divided at random, 70, 15 and 15 percent of each label.

    Args:
        rows: all with a split, or all without.
        seed: seed of the division.

    Raises:
        ValueError: if the questions for training do not have both labels.
    """
    parts: dict[str, list[LabelledQuestion]] = {name: [] for name in SPLITS}
    for label in (0, 1):
        of_label = [row for row in rows if row.label == label]
        if any(row.split is None for row in of_label):
            random.Random(seed).shuffle(of_label)
            test, dev = (round(share * len(of_label)) for share in (_TEST_SHARE, _DEV_SHARE))
            parts["test"] += of_label[:test]
            parts["dev"] += of_label[test : test + dev]
            parts["train"] += of_label[test + dev :]
            continue
        for row in of_label:
            parts[row.split or "train"].append(row)
    labels = {row.label for row in parts["train"]}
    if labels != {0, 1}:
        raise ValueError(
            f"data: got the labels {sorted(labels)} in the questions for training, expected 0 and 1"
        )
    return parts
