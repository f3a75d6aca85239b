"""Reads files of edits into records, whose text is not tokenised yet.

Three layouts are read, and told apart by their keys:

    {"prompt": ..., "target": ..., "paraphrases": [...], "locality": [...]}      our JSONL
    {"input": ..., "output": [{"answer": ...}], "filtered_rephrases": [...]}     zsRE, JSONL (GRACE)
    [{"src": ..., "answers": [...], "rephrase": ..., "loc": ...}, ...]           zsRE, JSON (MEND)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sapt_fast.files.reading import DATA_BYTES, parse_json, read_bytes

__all__ = ["edit_records", "group_records", "probe_records"]

_EDIT = ("prompt", "target", "paraphrases", "locality")
_PROBE = ("prompt", "target", "group")
_GROUP = ("same", "others")


def edit_records(path: str | os.PathLike[str]) -> list[tuple[str, dict[str, Any]]]:
    """Reads edits.

    Args:
        path: a file in one of the three layouts.

    Returns:
        For each edit, where it is in the file, and the keys of our layout.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if a line is not JSON, lacks a key, or has an unknown one.
        ValueError: if there is no edit.
    """
    return [(place, _edit(record, place)) for place, record in _records(Path(path))]


def probe_records(path: str | os.PathLike[str]) -> list[tuple[str, dict[str, Any]]]:
    """Reads prompts whose answers must not change.

    A file is JSONL of `prompt` and, optional, `target` and `group`.

    Args:
        path: the file.

    Returns:
        For each prompt, where it is in the file, and the keys.

    Raises:
        FileNotFoundError, ValueError: as `edit_records`.
    """
    found = []
    for place, record in _records(Path(path)):
        _require_keys(record, place, ("prompt",), _PROBE)
        found.append((place, record))
    return found


def group_records(path: str | os.PathLike[str]) -> list[tuple[str, dict[str, Any]]]:
    """Reads groups of prompts that ask the same.

    A file is JSONL of `same`, a list of two or more prompts, and an optional list `others` of
    prompts that ask something else.

    Args:
        path: the file.

    Returns:
        For each group, where it is in the file, and the keys.

    Raises:
        FileNotFoundError, ValueError: as `edit_records`.
    """
    found = []
    for place, record in _records(Path(path)):
        _require_keys(record, place, _GROUP[:1], _GROUP)
        for name, least in zip(_GROUP, (2, 0), strict=True):
            listed = record.get(name, [])
            if not isinstance(listed, list) or len(listed) < least:
                wanted = f"a list of at least {least} prompts" if least else "a list of prompts"
                raise ValueError(f"{place}: {name}: got {str(listed)[:40]!r}, expected {wanted}")
        found.append((place, record))
    return found


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    data = read_bytes(path, DATA_BYTES)
    found = [*(_items(data, path) if data.lstrip()[:1] == b"[" else _lines(data, path))]
    if not found:
        raise ValueError(f"{path}: got no line, expected at least one")
    for place, record in found:
        if not isinstance(record, dict):
            raise ValueError(f"{place}: got {str(record)[:40]!r}, expected a JSON object")
    return found


def _lines(data: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, parse_json(line, place)


def _items(data: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    for number, item in enumerate(parse_json(data, path), 1):
        yield f"{path}, entry {number}", item


def _edit(record: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Returns a record in our layout."""
    if "input" in record and "output" in record:
        return _of_grace(record, place)
    if "src" in record:
        return _of_mend(record, place)
    _require_keys(record, place, _EDIT[:2], _EDIT)
    for name in _EDIT[2:]:
        if not isinstance(record.get(name, []), list):
            raise ValueError(f"{place}: {name}: got {record[name]!r}, expected a list")
    return dict(record)


def _of_grace(record: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The question, its first answer, and the rephrasings as paraphrases.

    The code of GRACE edits half of all questions and rephrasings, without regard to which belong
    together, and holds the others out.
    """
    try:
        answer = record["output"][0]["answer"]
    except (IndexError, KeyError, TypeError):
        raise ValueError(f"{place}: output: expected a list of answers") from None
    paraphrases = record.get("filtered_rephrases", [])
    if not isinstance(paraphrases, list):
        raise ValueError(f"{place}: filtered_rephrases: got {paraphrases!r}, expected a list")
    return {"prompt": record["input"], "target": answer, "paraphrases": paraphrases}


def _of_mend(record: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The question, its first correct answer, one rephrasing and one unrelated question."""
    answers = record.get("answers")
    if not isinstance(answers, list) or not answers:
        raise ValueError(f"{place}: answers: got {answers!r}, expected a list of answers")
    return {
        "prompt": record["src"],
        "target": answers[0],
        "paraphrases": [record[name] for name in ("rephrase",) if record.get(name)],
        "locality": [record[name] for name in ("loc",) if record.get(name)],
    }


def _require_keys(
    record: Mapping[str, Any], place: str, needed: tuple[str, ...], known: tuple[str, ...]
) -> None:
    missing = [name for name in needed if name not in record]
    if missing:
        raise ValueError(f"{place}: got no {missing[0]!r}, expected {', '.join(needed)}")
    unknown = sorted(set(record) - set(known))
    if unknown:
        raise ValueError(f"{place}: got {unknown[0]!r}, expected among {', '.join(known)}")
