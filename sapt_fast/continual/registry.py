"""The strategies by name, for modules that the strategies themselves import."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

__all__ = ["STRATEGIES", "StrategyKind", "strategies"]

_PACKAGE = "sapt_fast.continual.strategies"  # fills the registry when it is imported


class StrategyKind(Protocol):
    """The members of a strategy's class that settings use."""

    def options_of(self, name: str, values: Mapping[str, Any]) -> Any:
        """Builds the strategy's options, a dataclass; raises ValueError for invalid values."""

    def check(self, settings: Any) -> None:
        """Raises ValueError if the settings do not fit the strategy."""


# By name; the strategies package fills it, and users may add their own.
STRATEGIES: dict[str, Any] = {}


def strategies() -> Mapping[str, StrategyKind]:
    """Returns all strategies by name, including those of `continual.strategies`."""
    importlib.import_module(_PACKAGE)
    return STRATEGIES
