"""The finished runs of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Cell", "Comparison"]


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        row: the method's name in the table.
        order: name of the order of tasks.
        seed: of the run and its rows.
        folder: where the run is.
        results: its results.json.
    """

    row: str
    order: str
    seed: int
    folder: Path
    results: Mapping[str, Any]

    @property
    def scores(self) -> NDArray[np.float64]:
        """[T, T], nan above the diagonal."""
        return np.array(self.results["scores"], dtype=np.float64)


@dataclass(frozen=True)
class Comparison:
    """What a comparison came to.

    Attributes:
        rows: the methods, in the order of the table.
        cells: all runs, seeds and orders of a method one after the other.
        folder: where the runs and the report are.
    """

    rows: tuple[str, ...]
    cells: tuple[Cell, ...]
    folder: Path

    def of(self, row: str) -> list[Cell]:
        """The runs of a method."""
        return [cell for cell in self.cells if cell.row == row]
