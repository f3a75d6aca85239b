"""The demo's generated tasks: a character tokenizer, string rules and seeded examples.

Every input has the form `NAME:payload`, such as `ENDS:kdjfa`. The instruction of four capital
letters names a rule, the payload is 2 to 6 distinct lowercase letters, and the target is the rule's
answer. The packaged backbone was pretrained on `PRETRAINING_RULES`. The demo learns `DEMO_RULES` in
sequence, which are other functions with other names.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import BatchEncoding

LETTERS = string.ascii_lowercase
VOWELS = frozenset("aeiou")
NOTHING = "-"
SHORTEST_PAYLOAD, LONGEST_PAYLOAD = 2, 6


class CharTokenizer:
    """A tokenizer with one id per character: 3 special tokens, `a-z`, `A-Z`, `0-9`, `:` and `-`.

    It implements the part of the transformers tokenizer interface that the continual loop and the
    seq2seq collators use. Encodings end with the end token, as in T5.

    Example:
        >>> tokenizer = CharTokenizer()
        >>> tokenizer.decode(tokenizer.encode("ENDS:kdjfa"))
        'ENDS:kdjfa'
    """

    pad_token, eos_token, unk_token = "<pad>", "</s>", "<unk>"
    pad_token_id, eos_token_id, unk_token_id = 0, 1, 2
    bos_token_id = None
    all_special_ids = (0, 1, 2)
    padding_side = "right"
    model_input_names = ("input_ids", "attention_mask")

    def __init__(self) -> None:
        characters = LETTERS + string.ascii_uppercase + string.digits + ":-"
        self._tokens = [self.pad_token, self.eos_token, self.unk_token, *characters]
        self._ids = {token: index for index, token in enumerate(self._tokens)}

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, including special ones: 67."""
        return len(self._tokens)

    def get_vocab(self) -> dict[str, int]:
        """Returns a copy of the mapping from tokens to ids."""
        return dict(self._ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of a text's characters and the end token; unknown ones become unk."""
        ids = [self._ids.get(character, self.unk_token_id) for character in text]
        return [*ids, self.eos_token_id] if add_special_tokens else ids

    def decode(self, token_ids: Tensor | Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of one row of ids, by default without special tokens."""
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids
        kept = (i for i in ids if not (skip_special_tokens and i in self.all_special_ids))
        return "".join(self._tokens[i] for i in kept)

    def batch_decode(
        self, sequences: Tensor | Iterable[Sequence[int]], skip_special_tokens: bool = True
    ) -> list[str]:
        """Decodes every row of `sequences`, [B, T] or lists of ids."""
        rows = sequences.tolist() if isinstance(sequences, Tensor) else sequences
        return [self.decode(row, skip_special_tokens) for row in rows]

    def pad(
        self,
        encoded: Mapping[str, Sequence[Sequence[int]]] | Sequence[Mapping[str, Sequence[int]]],
        padding: bool | str = True,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **_: object,
    ) -> BatchEncoding:
        """Pads rows of ids on the right to one length.

        Args:
            encoded: a mapping with a list of rows as `input_ids`, or a list of such mappings.
            padding: True or "longest" for the longest row, "max_length" for `max_length`, False
                for no padding.
            max_length: the length for `padding="max_length"`.
            return_tensors: "pt" for int64 tensors [B, T], None for lists.

        Returns:
            `input_ids` and `attention_mask` (1 for tokens, 0 for padding).

        Raises:
            ValueError: if `padding`, `max_length` or `return_tensors` is not one of the above.
        """
        if isinstance(encoded, Mapping):
            rows = [list(row) for row in encoded["input_ids"]]
        else:
            rows = [list(row["input_ids"]) for row in encoded]
        if padding == "max_length":
            if max_length is None:
                raise ValueError("max_length: got None, expected an int for padding='max_length'")
            width = max_length
        elif padding in (True, "longest"):
            width = max(map(len, rows), default=0)
        elif padding is False:
            width = 0
        else:
            raise ValueError(
                f"padding: got {padding!r}, expected a bool, 'longest' or 'max_length'"
            )
        ids = [row + [self.pad_token_id] * (width - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        return _batch_encoding({"input_ids": ids, "attention_mask": mask}, return_tensors)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        *,
        text_target: str | Sequence[str] | None = None,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        **_: object,
    ) -> BatchEncoding:
        """Encodes one text or a list of texts, as a transformers tokenizer does.

        Args:
            text: the inputs, or None.
            text_target: the targets, or None. With `text`, they are returned as `labels`, padded
                with the pad token; without, as `input_ids`.
            padding, max_length, return_tensors: as in `pad`.
            truncation: whether to truncate rows to `max_length`, keeping the end token.
            add_special_tokens: whether to append the end token.

        Returns:
            `input_ids` and `attention_mask`, and `labels` if both texts are given.

        Raises:
            ValueError: if both texts are None.
            ValueError: if `padding` or `return_tensors` is unknown.
        """
        if text is None and text_target is None:
            raise ValueError("text: got None and no text_target, expected one of them")
        fields: dict[str, object] = {}
        for name, texts in (("text", text), ("text_target", text_target)):
            if texts is None:
                continue
            single = isinstance(texts, str)
            listed = [texts] if isinstance(texts, str) else texts
            rows = [self.encode(one, add_special_tokens) for one in listed]
            if truncation and max_length is not None:
                rows = [_truncate(row, max_length, add_special_tokens) for row in rows]
            batch = self.pad({"input_ids": rows}, padding, max_length, return_tensors)
            if single and return_tensors is None:
                batch = BatchEncoding({key: value[0] for key, value in batch.items()})
            if name == "text_target" and text is not None:
                fields["labels"] = batch["input_ids"]
            else:
                fields.update(batch)
        return BatchEncoding(fields)


def _truncate(row: list[int], max_length: int, keep_last: bool) -> list[int]:
    if len(row) <= max_length:
        return row
    return row[: max_length - 1] + row[-1:] if keep_last else row[:max_length]


def _batch_encoding(
    fields: dict[str, list[list[int]]], return_tensors: str | None
) -> BatchEncoding:
    if return_tensors is None:
        return BatchEncoding(fields)
    if return_tensors != "pt":
        raise ValueError(f"return_tensors: got {return_tensors!r}, expected 'pt' or None")
    return BatchEncoding({key: torch.tensor(rows) for key, rows in fields.items()})


class Rule(NamedTuple):
    """A string function and the instructions that name it."""

    instructions: tuple[str, ...]
    apply: Callable[[str], str]


class Example(NamedTuple):
    """One example: the model's input text and the answer."""

    source: str
    target: str


@dataclass(frozen=True)
class DemoTask:
    """A task of the demo; its three splits have distinct payloads."""

    name: str
    instruction: str
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]


def _shift(text: str, by: int) -> str:
    return "".join(LETTERS[(LETTERS.index(letter) + by) % len(LETTERS)] for letter in text)


def _vowels(text: str) -> str:
    return "".join(letter for letter in text if letter in VOWELS) or NOTHING


def _consonants(text: str) -> str:
    return "".join(letter for letter in text if letter not in VOWELS) or NOTHING


def _has_vowel(text: str) -> bool:
    return not VOWELS.isdisjoint(text)


# The instructions were drawn at random once. They are written out, so that the packaged weights do
# not depend on a Python version's random numbers.
PRETRAINING_RULES: dict[str, Rule] = {
    "copy": Rule(("KEMU", "BCRD", "LSBQ"), lambda s: s),
    "reverse": Rule(("GBCN", "NCHC", "RNBS"), lambda s: s[::-1]),
    "sort": Rule(("DHUU", "SBSS", "MBHB"), lambda s: "".join(sorted(s))),
    "sort_down": Rule(("REJN", "ERDS", "JRVF"), lambda s: "".join(sorted(s, reverse=True))),
    "next": Rule(("DSSU", "GLDR", "WCSB"), lambda s: _shift(s, 1)),
    "previous": Rule(("TGPV", "RNYK", "OSOL"), lambda s: _shift(s, -1)),
    "rotate_left": Rule(("JHZF", "WYHC", "SJQP"), lambda s: s[1:] + s[0]),
    "rotate_right": Rule(("KXOJ", "TCDQ", "NFYK"), lambda s: s[-1] + s[:-1]),
    "swap_ends": Rule(("EPNB", "VCYR", "SZKK"), lambda s: s[-1] + s[1:-1] + s[0]),
    "add_first": Rule(("WLTP", "SZOC", "CIPW"), lambda s: s + s[0]),
    "drop_first": Rule(("VCBX", "WJUS", "VOJW"), lambda s: s[1:]),
    "drop_last": Rule(("MVLA", "OLFT", "DPBG"), lambda s: s[:-1]),
    "first": Rule(("YJEX", "HMMP", "CFOM"), lambda s: s[0]),
    "last": Rule(("RIEN", "RIWN", "LVMH"), lambda s: s[-1]),
    "max": Rule(("ECFE", "HVHA", "PSFI"), max),
    "min": Rule(("JAEN", "RLTS", "KEWQ"), min),
    "evens": Rule(("TUVX", "BOYV", "ZRMM"), lambda s: s[::2]),
    "odds": Rule(("MMDP", "UMBG", "CGOF"), lambda s: s[1::2]),
    "vowels": Rule(("DKTB", "DASE", "RDLT"), _vowels),
    "consonants": Rule(("ACGT", "MEUI", "LTLP"), _consonants),
    "count_vowels": Rule(("DDPO", "PPJC", "EDXK"), lambda s: str(sum(c in VOWELS for c in s))),
    "length": Rule(("XIPW", "FQAG", "QLEW"), lambda s: str(len(s))),
    "ascending_ends": Rule(("RAYQ", "JUCW", "IQLF"), lambda s: "y" if s[0] < s[-1] else "n"),
    "has_vowel": Rule(("LYHR", "RYQK", "UHTZ"), lambda s: "y" if _has_vowel(s) else "n"),
}

# In learning order.
DEMO_RULES: dict[str, Rule] = {
    "last_first": Rule(("ENDS",), lambda s: s[-1] + s[0]),
    "reverse_drop_first": Rule(("WRAP",), lambda s: s[::-1][1:]),
    "vowel_label": Rule(("OPEN",), lambda s: "AB" if _has_vowel(s) else "CD"),
    "max_min": Rule(("SPAN",), lambda s: max(s) + min(s)),
    "next_of_first": Rule(("STEP",), lambda s: _shift(s[0], 1)),
    "consonants_reversed": Rule(("HUMS",), lambda s: _consonants(s)[::-1]),
}


def random_payload(rng: random.Random) -> str:
    """Draws 2 to 6 distinct lowercase letters; every length has the same probability."""
    return "".join(rng.sample(LETTERS, rng.randint(SHORTEST_PAYLOAD, LONGEST_PAYLOAD)))


def make_example(rule: Rule, payload: str, rng: random.Random) -> Example:
    """Builds the example of a rule for a payload, with one of the rule's instructions."""
    return Example(f"{rng.choice(rule.instructions)}:{payload}", rule.apply(payload))


def pretraining_batch(seed: int, step: int, size: int) -> list[Example]:
    """Returns `size` examples of random pretraining rules, which depend on `seed` and `step`."""
    rng = random.Random(f"pretraining-{seed}-{step}")
    rules = list(PRETRAINING_RULES.values())
    return [make_example(rng.choice(rules), random_payload(rng), rng) for _ in range(size)]


def make_demo_tasks(
    seed: int = 0, *, train_rows: int = 512, dev_rows: int = 128, test_rows: int = 128
) -> list[DemoTask]:
    """Returns the six demo tasks in learning order.

    A task's examples depend only on `seed`, the task and the numbers of examples. No payload occurs
    twice within a task, so train, dev and test are disjoint.

    Args:
        seed: the seed of the examples.
        train_rows, dev_rows, test_rows: numbers of examples per split.

    Raises:
        ValueError: if a number of examples is less than 1.
    """
    counts = {"train_rows": train_rows, "dev_rows": dev_rows, "test_rows": test_rows}
    for argument, count in counts.items():
        if count < 1:
            raise ValueError(f"{argument}: got {count}, expected at least 1")
    tasks = []
    for name, rule in DEMO_RULES.items():
        rng = random.Random(f"demo-{seed}-{name}")
        payloads: dict[str, None] = {}
        while len(payloads) < sum(counts.values()):
            payloads[random_payload(rng)] = None
        rows = [make_example(rule, payload, rng) for payload in payloads]
        dev_start, test_start = train_rows, train_rows + dev_rows
        tasks.append(
            DemoTask(
                name=name,
                instruction=rule.instructions[0],
                train=tuple(rows[:dev_start]),
                dev=tuple(rows[dev_start:test_start]),
                test=tuple(rows[test_start:]),
            )
        )
    return tasks
