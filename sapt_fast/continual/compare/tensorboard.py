"""Writes scores of finished runs for TensorBoard."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from sapt_fast.continual.compare.cells import Cell
from sapt_fast.continual.scores.metrics import continual_metrics

__all__ = ["require_tensorboard", "write_scalars"]


def require_tensorboard() -> Any:
    """Imports torch's SummaryWriter.

    Raises:
        ImportError: if TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard is not installed: pip install tensorboard") from error
    return SummaryWriter


def write_scalars(folder: Path, cell: Cell) -> None:
    """Writes the metrics and each task's score after every task; an existing folder is kept."""
    if folder.exists():
        return
    scores, alone = cell.scores, cell.results.get("alone")
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    with require_tensorboard()(str(unfinished)) as writer:
        for index in range(len(scores)):
            count = index + 1
            seen = None if alone is None else alone[:count]
            metrics = continual_metrics(scores[:count, :count], seen).as_dict()
            values = {
                f"metrics/{name}": value
                for name, value in metrics.items()
                if cell.results["metrics"][name]
                is not None  # a run without a sequence has some None
            }
            for task, value in zip(cell.results["tasks"], scores[index], strict=True):
                values[f"scores/{task}"] = value
            for name, value in values.items():
                if not np.isnan(value):
                    writer.add_scalar(name, value, count)
    unfinished.rename(folder)
