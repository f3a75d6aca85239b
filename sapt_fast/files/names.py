"""Checks names of tasks and runs, which become folders, for all file systems."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

__all__ = ["is_safe_name", "require_folder_name"]

_LONGEST = 255  # bytes of a name in a folder

# Files of ours, of transformers and of its Trainer that are saved beside the tasks' folders. Tensor
# files may have any name with the ending below.
_RESERVED = frozenset(
    {
        "sapt_config.json",
        "adapter_config.json",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "optimizer.bin",
        "optimizer.pt",
        "processor_config.json",
        "pytorch_model.bin",
        "readme.md",
        "rng_state.pth",
        "scaler.pt",
        "scheduler.pt",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "trainer_state.json",
        "training_args.bin",
        "vocab.json",
        "vocab.txt",
    }
)
_RESERVED_END = ".safetensors"


def require_folder_name(
    said: str, name: object, others: Iterable[str] = (), *, appended: int = 0
) -> None:
    """Raises ValueError unless `name` can be a new folder beside `others` on any file system.

    Args:
        said: the beginning of the message, such as "name: got".
        name: the name.
        others: existing names. Names that differ only in case, or in the encoding of an accented
            letter, count as equal, because they are on some file systems.
        appended: number of bytes that will be appended to the name.
    """
    problem = _problem(name, appended)
    if problem is None:
        assert isinstance(name, str)
        taken = {_folded(other): other for other in others}
        same = taken.get(_folded(name))
        if same == name:
            problem = "is taken"
        elif same is not None:
            problem = f"is the same folder as {same!r} on file systems that ignore case or spelling"
    if problem is not None:
        raise ValueError(f"{said} {_shown(name)}, expected a valid folder name: this one {problem}")


def is_safe_name(name: object) -> bool:
    """Returns whether a stored name is a single folder; new names must meet more conditions."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        return False
    try:
        return len(name.encode()) <= _LONGEST
    except UnicodeEncodeError:
        return False


def _problem(name: object, appended: int) -> str | None:
    if not isinstance(name, str):
        return "is not a string"
    if not name.strip():
        return "is empty"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "has characters that UTF-8 cannot encode"
    if size > _LONGEST - appended:
        return f"has {size} bytes in UTF-8, more than {_LONGEST - appended}"
    if "/" in name or "\\" in name:
        return "has a path separator"
    if any(unicodedata.category(letter) == "Cc" for letter in name):
        return "has a control character"
    if name.startswith("."):
        return "begins with a dot, as hidden files do"
    if name[-1] in ". ":
        return "ends with a dot or a space"
    if _folded(name) in _RESERVED or _folded(name).endswith(_RESERVED_END):
        return "is the name of a file that is saved beside it"
    return None


def _folded(name: str) -> str:
    """Returns a form that is equal for names that some file system does not distinguish."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def _shown(name: object) -> str:
    text = repr(name)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
