"""The strategies by name, for modules that the strategies themselves import."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

__all__ = ["STRATEGIES", "StrategyKind", "strategies"]

_PACKAGE = "sapt_fast.continual.strategies"  # fills the registry when it is imported


class StrategyKind(Protocol):
    """What settings ask of a strategy's class."""

    def options_of(self, name: str, values: Mapping[str, Any]) -> Any:
        """The strategy's options, a dataclass; raises ValueError for values that do not fit."""

    def check(self, settings: Any) -> None:
        """Raises ValueError if the settings do not fit the strategy."""


# By name; the strategies package fills it, and users may add their own.
STRATEGIES: dict[str, Any] = {}


def strategies() -> Mapping[str, StrategyKind]:
    """All strategies by name, those of `continual.strategies` included."""
    importlib.import_module(_PACKAGE)
    return STRATEGIES
