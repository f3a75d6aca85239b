"""What is measured of each op: one file per op, of which every list of the benchmarks is made.

A file of this folder has the name of its op. It may define:

- `CHECKED`, `CHECKED_QUICK`: cases that gpu_check compares with float64 before anything is timed.
- `TIMED`: cases that gpu_check times, in both sizes, with what is asked of them (`op_case.Timed`).
- `CPU_CHECKED`, `CPU_TIMED`, `CPU_TIMED_QUICK`: likewise for the CPU kernels; the timed ones are
  pairs of a case and a dtype.
- `LAUNCHES`: calls whose Triton kernels aot_report compiles (`op_case.LaunchCase`).
- `roofline()`: lines of the table of least times, from formulas of bytes and FLOPs (`passes`).
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any


def modules() -> dict[str, ModuleType]:
    """The case file of every op, by the op's name."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def gathered(name: str) -> tuple[Any, ...]:
    """The entries of one list in all case files."""
    return tuple(entry for module in modules().values() for entry in getattr(module, name, ()))
