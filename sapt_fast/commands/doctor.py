"""`sapt-fast doctor`: what this machine has, which backend each op uses, and why."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from typing import Any

import torch
from rich.table import Table

from sapt_fast import __version__, dispatch

__all__ = ["backend_table", "environment_table"]

_PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "rouge-score", "matplotlib")
_VARIABLES = (dispatch.ENV_VARIABLE, "SAPT_FAST_CPU_CAPABILITY", "TRITON_INTERPRET")


def environment_table() -> Table:
    """A table of versions, processors, the compiled module and the environment variables read."""
    table = Table(title="environment", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in [*_versions(), *_devices(), *_native_module(), *_variables()]:
        table.add_row(name, value)
    return table


def backend_table() -> Table:
    """A table of the backend of each op and kind of device, with the reason for each other one."""
    table = Table(title="backends")
    for name in ("op", "device", "backend", "why"):
        table.add_column(name, overflow="fold")
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for op in dispatch.ops():
        for kind in kinds:
            try:
                chosen = dispatch.resolve(op, torch.device(kind))
            except (dispatch.BackendError, ValueError) as error:
                table.add_row(op, kind, "none", str(error))
                continue
            table.add_row(op, kind, chosen, _why(op, kind, chosen), end_section=True)
    return table


def _why(op: str, kind: str, chosen: str) -> str:
    asked = os.environ.get(dispatch.ENV_VARIABLE)
    lines = [f"set by {dispatch.ENV_VARIABLE}" if asked else "default here"]
    for backend in dispatch.BACKENDS:
        if backend != chosen:
            reason = dispatch.unavailable(op, backend, kind)
            if reason is None and backend == "cuda":
                unchosen = dispatch.unchosen(op)
                reason = (
                    "default for few rows" if unchosen is None else f"on request only: {unchosen}"
                )
            reason = reason or "available on request"
            lines.append(f"{backend}: {reason}")
    return "\n".join(lines)


def _versions() -> list[tuple[str, str]]:
    rows = [("sapt_fast", __version__), ("Python", platform.python_version())]
    for name in _PACKAGES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def _devices() -> list[tuple[str, str]]:
    rows = [
        ("system", f"{platform.system()} {platform.machine()}"),
        ("CPU", f"{os.cpu_count()} logical cores, torch uses {torch.get_num_threads()} threads"),
        ("torch's CPU kernels", torch.backends.cpu.get_cpu_capability()),
        ("CUDA in torch", str(torch.version.cuda or "none (a CPU build)")),
    ]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = f"{found.total_memory / 2**30:.0f} GiB"
        rows.append((f"GPU {index}", f"{found.name}, sm_{found.major}{found.minor}, {memory}"))
    return rows


def _native_module() -> list[tuple[str, str]]:
    try:
        native: Any = importlib.import_module("sapt_fast._C")
    except ImportError as error:
        return [
            (
                "compiled module",
                f"missing ({error}); SAPT_FAST_BUILD=cpu builds it or reports why not",
            )
        ]
    cuda = native.cuda_runtime()
    report = "not compiled" if not cuda["compiled"] else ", ".join(cuda["architectures"])
    if cuda["compiled"] and cuda.get("error"):
        report += f"; {cuda['error']}"
    return [
        ("compiled module", str(native.__file__)),
        ("its CPU kernels", native.cpu_capability()),
        ("its CUDA kernels", report),
    ]


def _variables() -> list[tuple[str, str]]:
    return [(name, os.environ.get(name, "not set")) for name in _VARIABLES]
