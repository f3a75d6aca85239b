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
    """One finished run of a comparison.

    Attributes:
        row: name of the strategy's row in the table.
        order: name of the order of tasks.
        seed: seed of the run and its data.
        folder: the run's folder.
        results: content of its results.json.
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
    """The runs of a comparison.

    Attributes:
        rows: names of the rows, in the order of the table.
        cells: all runs, grouped by row, then by order.
        folder: has the runs and the report.
    """

    rows: tuple[str, ...]
    cells: tuple[Cell, ...]
    folder: Path

    def of(self, row: str) -> list[Cell]:
        """Returns the runs of one row."""
        return [cell for cell in self.cells if cell.row == row]
