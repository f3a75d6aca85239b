"""Edits and probes as token ids, checked before anything runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from sapt_fast.editing.records import edit_records, group_records, probe_records
from sapt_fast.methods.edits.inputs import read_edits, read_prompt
from sapt_fast.methods.edits.texts import kind_of

__all__ = ["EditRow", "Probe", "Reader", "Tokens", "digest", "end_tokens", "require_agreement"]

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Probe:
    """A prompt whose answer must not change.

    Attributes:
        prompt: its tokens.
        target: the expected answer; None: the model's answer before the first edit.
        group: a name under which the prompt is also reported; None for none.
    """

    prompt: Tokens
    target: Tokens | None = None
    group: str | None = None


@dataclass(frozen=True)
class EditRow:
    """An edit, and the prompts that measure it.

    Attributes:
        prompt, target: their tokens; the target of a classifier is its class.
        paraphrases: prompts that should get the target too.
        locality: prompts whose answers must not change.
        place: where the edit is in its file, for messages.
    """

    prompt: Tokens
    target: Tokens
    paraphrases: tuple[Tokens, ...] = ()
    locality: tuple[Probe, ...] = ()
    place: str = ""


class Reader:
    """Turns text and token ids into checked tokens.

    Args:
        model: the transformers model.
        tokenizer: reads text; None: everything must be token ids.
        chat: whether a prompt that is text becomes a user's message in the chat template.

    Raises:
        ValueError: if `chat` is set and the tokenizer has no chat template.
    """

    def __init__(self, model: Any, tokenizer: Any = None, chat: bool = False) -> None:
        if chat and not getattr(tokenizer, "chat_template", None):
            raise ValueError("chat: the tokenizer has no chat template; leave --chat out")
        self.model, self.tokenizer, self.chat = model, tokenizer, chat
        self._ends = end_tokens(model)

    def edits(self, source: str | os.PathLike[str] | Iterable[Mapping[str, Any]]) -> list[EditRow]:
        """Reads edits.

        Args:
            source: a file of one of the layouts of `editing.records`, or records of our layout.

        Raises:
            FileNotFoundError: if the file is missing.
            ValueError, TypeError: if an edit does not fit; the message names its line.
        """
        if isinstance(source, (str, os.PathLike)):
            records = edit_records(source)
        else:
            records = [(f"edits[{i}]", dict(record)) for i, record in enumerate(source)]
        return [self._at(place, self._edit, record) for place, record in records]

    def probes(self, source: str | os.PathLike[str] | Iterable[Any]) -> list[Probe]:
        """Reads prompts whose answers must not change.

        Args:
            source: a file of `prompt` and, optional, `target`, `group`; or such records, texts or
                tokens.

        Raises:
            FileNotFoundError, ValueError, TypeError: as `edits`.
        """
        if isinstance(source, (str, os.PathLike)):
            records: Iterable[tuple[str, Any]] = probe_records(source)
        else:
            records = [(f"probes[{i}]", record) for i, record in enumerate(source)]
        return [self._at(place, self._probe, record) for place, record in records]

    def groups(self, path: str | os.PathLike[str]) -> tuple[list[list[Tokens]], list[Tokens]]:
        """Reads groups of prompts that ask the same, for `ProjectedKeys.fit`.

        Args:
            path: a file of `same` and, optional, `others`.

        Returns:
            The prompts of each group, and all prompts that ask something else.

        Raises:
            FileNotFoundError, ValueError, TypeError: as `edits`.
        """
        groups: list[list[Tokens]] = []
        others: list[Tokens] = []
        for place, record in group_records(path):
            same, more = self._at(place, self._group, record)
            groups.append(same)
            others += more
        return groups, others

    def _group(self, record: Mapping[str, Any], where: str) -> list[list[Tokens]]:
        return [
            [self._prompt(text, f"{name}[{i}], ") for i, text in enumerate(record.get(name, []))]
            for name in ("same", "others")
        ]

    def _at(self, place: str, read: Callable[[Any, str], Any], record: Any) -> Any:
        """Calls `read`; errors name the place."""
        try:
            return read(record, place)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{place}: {error}") from None

    def _edit(self, record: Mapping[str, Any], place: str) -> EditRow:
        prompt, target = self._pair(record["prompt"], record["target"])
        return EditRow(
            prompt,
            target,
            tuple(
                self._prompt(text, f"paraphrases[{i}], ")
                for i, text in enumerate(record.get("paraphrases", []))
            ),
            tuple(
                self._probe(probe, f"locality[{i}], ")
                for i, probe in enumerate(record.get("locality", []))
            ),
            place,
        )

    def _probe(self, record: Any, where: str) -> Probe:
        within = where if where.endswith(", ") else ""
        if not isinstance(record, Mapping):
            return Probe(self._prompt(record, within))
        if "prompt" not in record or set(record) - {"prompt", "target", "group"}:
            got = ", ".join(map(str, record))
            raise ValueError(
                f"{within}got the keys {got}, expected prompt and, optional, target and group"
            )
        group = record.get("group")
        if group is not None and not isinstance(group, str):
            raise TypeError(f"{within}group: got {group!r}, expected a name")
        if record.get("target") is None:
            return Probe(self._prompt(record["prompt"], within), group=group)
        try:
            return Probe(*self._pair(record["prompt"], record["target"]), group)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{within}{error}") from None

    def _prompt(self, given: Any, where: str = "") -> Tokens:
        tokens = read_prompt(self.model, self.tokenizer, self._chatted(given), where)
        return tuple(tokens.tolist())

    def _pair(self, prompt: Any, target: Any) -> tuple[Tokens, Tokens]:
        prompt = self._chatted(prompt)
        if target is None:
            raise ValueError("target: got null, expected text, or a list of tokens")
        self._require_tokenizer("target", target)
        generates = kind_of(self.model) != "classifier"
        ends = generates and isinstance(target, list) and target and self._ends
        if ends and target[-1] not in self._ends:
            target = [*target, self._ends[0]]
        pairs, _ = read_edits(self.model, self.tokenizer, prompt, target)
        ((read, wanted),) = pairs
        return tuple(read.tolist()), tuple(wanted.tolist())

    def _chatted(self, prompt: Any) -> Any:
        self._require_tokenizer("prompt", prompt)
        if not self.chat or not isinstance(prompt, str) or not prompt.strip():
            return prompt
        message = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(
            message, add_generation_prompt=True, tokenize=True, return_dict=False
        )

    def _require_tokenizer(self, name: str, given: Any) -> None:
        if self.tokenizer is None and isinstance(given, str):
            raise ValueError(
                f"{name}: got text, but there is no tokenizer; expected a list of token ids"
            )


def end_tokens(model: Any) -> Tokens:
    """Returns the tokens at which `generate` stops."""
    config = getattr(model, "generation_config", None) or model.config
    ends = config.eos_token_id
    if ends is None:
        return ()
    return tuple(ends) if isinstance(ends, Sequence) else (int(ends),)


def require_agreement(rows: Sequence[EditRow], batch: int) -> None:
    """Raises ValueError if two edits of one batch have the same prompt and different targets."""
    for start in range(0, len(rows), batch):
        first: dict[Tokens, EditRow] = {}
        for row in rows[start : start + batch]:
            other = first.setdefault(row.prompt, row)
            if other.target != row.target:
                raise ValueError(
                    f"{other.place} and {row.place} have the same prompt and different targets, "
                    "and are edited in one batch; use batch=1, or remove one"
                )


def digest(rows: Sequence[Any]) -> str:
    """Returns a SHA-256 of edits or probes; the places in files do not count."""
    content = [{k: v for k, v in asdict(row).items() if k != "place"} for row in rows]
    return sha256(json.dumps(content).encode()).hexdigest()
