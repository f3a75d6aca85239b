"""Comparison of a stored run's settings with those of a new one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sapt_fast.continual.registry import strategies
from sapt_fast.continual.settings import IMAGE_SETTINGS
from sapt_fast.methods.sapt import SaptConfig

__all__ = ["differences"]

# Further settings that runs of earlier versions lack, with their defaults.
_LATER = {"limit_pseudo_samples": False}
# These change where a run computes and what it shows, not its results.
_FREE = ("device", "progress")


def differences(stored: Any, asked: Mapping[str, Any]) -> list[str]:
    """Compares two JSON-ready descriptions of a run.

    A field of SaptConfig, a setting of images, an option of a strategy or another later setting
    that `stored` lacks was added later and counts as its default. A digest that `stored` lacks is
    not compared.

    Args:
        stored: the description in a run's folder.
        asked: the description of the new run.

    Returns:
        A text for each entry that differs, such as "r was 8, now 4".
    """
    if not isinstance(stored, Mapping):
        return [f"got {str(stored)[:80]!r}, expected entries by name"]
    before, now = _flat(stored), _flat(asked)
    added = {**IMAGE_SETTINGS, **_LATER, **_flat({"sapt": SaptConfig().to_dict()})}
    name = now.get("settings.strategy", now.get("strategy"))
    if isinstance(name, str) and name in strategies():
        options = asdict(strategies()[name].options_of(name, {}))
        added |= {f"strategy_options.{option}": value for option, value in options.items()}
    for name, value in added.items():
        for place in (name, f"settings.{name}"):
            if place in now:
                before.setdefault(place, value)
    ignored = {name for name in {**before, **now} if name.split(".")[-1] in _FREE}
    ignored |= {name for name in now if name.split(".")[-1] == "digest" and name not in before}
    different = [
        name
        for name in {**before, **now}
        if before.get(name, ...) != now.get(name, ...) and name not in ignored
    ]
    return [
        f"{name.removeprefix('settings.').removeprefix('sapt.')} was "
        f"{before.get(name, 'absent')!r}, now {now.get(name, 'absent')!r}"
        for name in different
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
