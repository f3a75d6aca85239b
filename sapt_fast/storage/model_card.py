"""Writes a model card, README.md, into a saved folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor

from sapt_fast.version import __version__

__all__ = ["CARD_FILE", "card_of", "is_own_card", "own_card", "write_card"]

CARD_FILE = "README.md"
_MARK = "<!-- Written by sapt_fast; saving again replaces this file unless it was edited: "

_MOST = 100  # tasks that a card lists
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def write_card(folder: Path, directory: str | os.PathLike[str], handle: Any) -> None:
    """Writes the model card, unless the folder that is replaced has a README.md of the user.

    Args:
        folder: the new folder, which contains all other files.
        directory: the folder that it replaces.
        handle: the handle of the method that is saved.
    """
    taken = (Path(directory) / CARD_FILE).exists() or (folder / CARD_FILE).exists()
    if not taken or own_card(Path(directory)):
        saved = [one for one in _handles(handle) if (Path(directory) / one.config_file).is_file()]
        others = [one for one in saved if one is not handle]
        with_base = (Path(directory) / "config.json").is_file()
        text = card_of([handle, *others], None, with_base=with_base)
        (folder / CARD_FILE).write_text(text, encoding="utf-8")


def own_card(folder: Path) -> list[str]:
    """Returns the name of a folder's model card if it is an unedited one of sapt_fast."""
    return [CARD_FILE] if is_own_card(folder / CARD_FILE) else []


def is_own_card(path: Path) -> bool:
    """Returns whether a file is a model card of sapt_fast that nobody has edited."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    content, mark, digest = text.partition(_MARK)
    return mark != "" and digest == _digest(content) + " -->\n"


def card_of(handles: Sequence[Any], place: str | None, *, with_base: bool = False) -> str:
    """Returns the text of a model card.

    Args:
        handles: the handles of the methods in the folder.
        place: the folder's name on the Hub; None if it is not known.
        with_base: whether the folder contains the base model too.
    """
    model = handles[0]._model
    kind = type(model).__name__.removeprefix("FSDP")
    name = _hub_name(model)
    base = place if with_base and place else ("this/folder" if with_base else name)
    here = place or "this/folder"
    methods = ", ".join(one.method for one in handles)
    tags = ["sapt_fast", *(one.method for one in handles)]
    data = ModelCardData(base_model=name, library_name="sapt_fast", tags=tags)
    parts = [
        f"# {methods} for {name or kind}",
        f"Saved by sapt_fast {__version__}. The base model is a `{kind}`"
        f"{f' (`{name}`)' if name else ''}.",
        "## Load",
        f"```python\nimport sapt_fast\nfrom transformers import {kind}\n\n"
        f'model = {kind}.from_pretrained("{base or "the/base/model"}")\n'
        f'model = sapt_fast.load_pretrained(model, "{here}")\n```',
    ]
    for one in handles:
        parts += _sections(one)
    content = str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts))) + "\n\n"
    return f"{content}{_MARK}{_digest(content)} -->\n"


def _sections(handle: Any) -> list[str]:
    names, heading = list(handle.tasks), f"## {handle.method}"
    config = json.dumps(handle.config.to_dict(), indent=2, default=str)
    parts = [heading]
    if names and isinstance(names[0], str):
        parts.append("Tasks, in learning order:")
        lines = [f"{k}. {_code(name)}" for k, name in enumerate(names[:_MOST], 1)]
        more = len(names) - _MOST
        parts.append("\n".join(lines) + (f"\n\nand {more} more." if more > 0 else ""))
    elif names:
        parts.append(f"Entries: {len(names)}.")
    targets: Mapping[str, Tensor] = getattr(handle, "targets", {})
    if targets:
        parts.append(
            "Mean weight of each task's adapter (column) for the inputs of a task (row), when the "
            "row's task had been learned:"
        )
        parts.append(_attention(names, targets))
    parts.append(f"Settings:\n\n```json\n{config}\n```")
    return parts


def _attention(names: Sequence[str], targets: Mapping[str, Tensor]) -> str:
    lines = ["| task | " + " | ".join(str(k) for k in range(1, len(names) + 1)) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for name in names:
        if name in targets:
            weights = [f"{weight:.3f}" for weight in targets[name].tolist()]
            weights += [""] * (len(names) - len(weights))
            lines.append(f"| {_code(name)} | " + " | ".join(weights) + " |")
    return "\n".join(lines)


def _code(name: str) -> str:
    return "`" + name.replace("`", "'").replace("|", "\\|") + "`"


def _hub_name(model: Any) -> str | None:
    """Returns the base model's name on the Hub; None if it came from a folder or from nowhere."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    return name if _HUB_NAME.fullmatch(name) and not os.path.exists(name) else None


def _handles(handle: Any) -> list[Any]:
    return [child for child in handle._model.children() if hasattr(child, "config_file")]


def _digest(content: str) -> str:
    return sha256(content.encode()).hexdigest()
