"""What prompts of a run are looked up by, from files: `methods.edits.keys` and `.projector`."""

from __future__ import annotations

import re
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sapt_fast.checks import require_count
from sapt_fast.continual.data.models import check_folder
from sapt_fast.editing.data import Reader
from sapt_fast.editing.editors.registry import EDITORS, editor_type
from sapt_fast.methods.edits.keys import HiddenKeys, SentenceKeys
from sapt_fast.methods.edits.projector import ProjectedKeys
from sapt_fast.sites.features import HiddenMean

__all__ = ["KeyOptions"]

_KINDS = ("encoder", "key_prompts", "key_groups")
_LAYER, _WIDTH = 2, 64


@dataclass(frozen=True)
class KeyOptions:
    """How to compute what prompts are looked up by; without any, the method does it.

    Raises:
        ValueError: if options do not fit together.
    """

    encoder: Path | None = field(
        default=None,
        metadata={
            "help": "Folder of a sentence encoder, by which prompts are looked up; sets --keys "
            "function."
        },
    )
    encoder_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression whose first group is the part of a prompt that is looked "
            "up; with --encoder, --key-prompts or --key-groups.",
            "default": "all of it",
        },
    )
    key_groups: Path | None = field(
        default=None,
        metadata={
            "help": "JSONL, a group a line: same, a list of two or more prompts that ask the same, "
            "and an optional list others, which ask something else in similar words. Prompts are "
            "looked up by a linear map that is trained on them (ProjectedKeys), over --encoder or, "
            "without it, the model's low blocks; sets --keys function."
        },
    )
    key_prompts: Path | None = field(
        default=None,
        metadata={
            "help": "JSONL, a line for each prompt, other ones than the edits: prompts are looked "
            "up by the model's low blocks, centred at the mean of these and cut to their first "
            "principal components (HiddenKeys); sets --keys function."
        },
    )
    key_layer: int | None = field(
        default=None,
        metadata={
            "help": "Blocks of the model that --key-prompts and --key-groups run.",
            "default": str(_LAYER),
        },
    )
    key_width: int | None = field(
        default=None,
        metadata={
            "help": "Width of the keys of --key-prompts and --key-groups.",
            "default": str(_WIDTH),
        },
    )

    def __post_init__(self) -> None:
        for name in ("key_layer", "key_width"):
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name))
        if self.key_prompts is not None:
            for name in ("encoder", "key_groups"):
                if getattr(self, name) is not None:
                    raise ValueError(f"key_prompts: got {_flag(name)} too, expected one of them")
        for name, others in (
            ("encoder_pattern", _KINDS),
            ("key_layer", _KINDS[1:]),
            ("key_width", _KINDS[1:]),
        ):
            if getattr(self, name) is not None and not any(getattr(self, o) for o in others):
                expected = " or ".join(map(_flag, others))
                raise ValueError(f"{name}: expected {expected} with it")
        if self.encoder is not None and self.key_layer is not None:
            raise ValueError("key_layer: got --encoder too, whose vectors are used; expected one")

    @property
    def given(self) -> str | None:
        """The name of the option that says what prompts are looked up by; None for none."""
        return next((name for name in _KINDS if getattr(self, name) is not None), None)

    def complete(self, options: MutableMapping[str, Any], method: str) -> None:
        """Sets the option `keys` of a method.

        Args:
            options: those of the method that are given.
            method: its name.

        Raises:
            ValueError: if the method looks nothing up, or by other keys.
        """
        name, keys = self.given, options.get("keys")
        if name is None:
            if keys == "function":
                expected = ", ".join(map(_flag, _KINDS))
                raise ValueError(f"keys: got 'function', expected one of {expected} with it")
            return
        able = [m for m in EDITORS if "keys" in {f.name for f in fields(editor_type(m).Options)}]
        if method not in able:
            raise ValueError(
                f"{name}: method {method!r} has no keys to choose, expected {' or '.join(able)}"
            )
        if keys not in (None, "function"):
            raise ValueError(f"keys: got {keys!r} with {_flag(name)}, expected function")
        options["keys"] = "function"

    def function(self, reader: Reader, device: str) -> Any:
        """Returns what prompts are looked up by, fitted if it has to be; None for none.

        Args:
            reader: reads the files for the edited model.
            device: where the encoder runs.

        Raises:
            FileNotFoundError: if a file, or the encoder, is missing.
            ValueError, TypeError: if a line of a file does not fit; the message names it.
            ValueError: if the model has no tokenizer or not so many blocks, the pattern is no
                regular expression, or there are too few prompts.
        """
        width = self.key_width or _WIDTH
        layer = self.key_layer or _LAYER
        pattern, model, tokenizer = self.encoder_pattern, reader.model, reader.tokenizer
        with _named_as_given(self.given):
            if self.key_prompts is not None:
                prompts = [probe.prompt for probe in reader.probes(self.key_prompts)]
                return HiddenKeys(model, layer, tokenizer, pattern).fit(prompts, width)
            groups = None if self.key_groups is None else reader.groups(self.key_groups)
            features: Any = None
            if self.encoder is not None:
                features = _sentence_keys(self.encoder, tokenizer, pattern, device)
            elif groups is not None:
                features = HiddenMean(model, layer, tokenizer, pattern)
            return features if groups is None else ProjectedKeys(features, width).fit(*groups)


def _sentence_keys(folder: Path, tokenizer: Any, pattern: str | None, device: str) -> SentenceKeys:
    if tokenizer is None:
        raise ValueError("encoder: the edited model has no tokenizer, which decodes its prompts")
    check_folder("encoder", folder, "a folder that contains a transformers model")
    import transformers

    encoder = transformers.AutoModel.from_pretrained(folder).to(device)
    own = transformers.AutoTokenizer.from_pretrained(folder)
    try:
        return SentenceKeys(encoder, own, tokenizer, pattern)
    except re.error as error:
        raise ValueError(f"pattern: got {pattern!r}: {error}") from None


@contextmanager
def _named_as_given(given: str | None) -> Iterator[None]:
    """Lets errors about an argument name the option that it is from."""
    names = {
        "pattern": "encoder_pattern",
        "layer": "key_layer",
        "width": "key_width",
        "components": "key_width",
        **dict.fromkeys(("vectors", "groups", "features"), str(given)),
    }
    try:
        yield
    except ValueError as error:
        name, _, rest = str(error).partition(": ")
        if name not in names:
            raise
        raise ValueError(f"{names[name]}: {rest}") from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
