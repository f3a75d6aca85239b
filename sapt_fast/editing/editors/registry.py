"""The editing methods by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from sapt_fast.editing.editors.base import Editor

__all__ = ["EDITORS", "editor_type", "options_of"]

# The module and class of each method. A new method needs one file and one line here.
EDITORS: dict[str, str] = {
    "grace": "sapt_fast.editing.editors.grace:GraceEditor",
    "grace-released": "sapt_fast.editing.editors.grace:ReleasedGraceEditor",
    "melo": "sapt_fast.editing.editors.grace:MeloEditor",
    "ft": "sapt_fast.editing.editors.finetune:FineTuneEditor",
    "ft-l2": "sapt_fast.editing.editors.finetune:FineTuneL2Editor",
    "retrain": "sapt_fast.editing.editors.retrain:RetrainEditor",
    "defer": "sapt_fast.editing.editors.defer:DeferEditor",
    "ultraedit": "sapt_fast.editing.editors.ultraedit:UltraEditEditor",
}


def editor_type(name: str) -> type[Editor]:
    """Returns the class of a method; raises ValueError if there is none of this name."""
    if name not in EDITORS:
        raise ValueError(f"method: got {name!r}, expected one of {', '.join(EDITORS)}")
    module, _, kind = EDITORS[name].partition(":")
    found: Any = getattr(importlib.import_module(module), kind)
    return found


def options_of(name: str, values: Mapping[str, Any] | None = None) -> Any:
    """Returns the options of a method.

    Args:
        name: the method.
        values: those that differ from the defaults.

    Raises:
        ValueError: if the method lacks an option, or a value does not fit.
    """
    kind = editor_type(name).Options
    known = {field.name for field in fields(kind)}
    unknown = sorted(set(values or {}) - known)
    if unknown:
        raise ValueError(
            f"{unknown[0]}: method {name!r} has no such option, expected among "
            f"{', '.join(sorted(known))}"
        )
    return kind(**(values or {}))
