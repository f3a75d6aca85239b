"""Which backend runs an op: the only place that decides.

A backend is a folder of kernels with one module per op, and every module of an op has the same
functions: ``<op>_fwd``, ``<op>_bwd``. To admit a new kernel, add its row to ``_TABLE``.
"""

import importlib
import importlib.util
import logging
import os
from functools import cache
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "cpu", "triton", "cuda")
ENV_VARIABLE = "SAPT_FAST_BACKEND"

_FOLDERS = {
    "reference": "sapt_fast.ops",
    "cpu": "sapt_fast.cpu_kernels",
    "triton": "sapt_fast.triton_kernels",
    "cuda": "sapt_fast.cuda_kernels",
}

# Backends of each op, the preferred one first; "cuda" comes before them for `_FEW_ROWS`.
_TABLE: dict[str, tuple[str, ...]] = {
    "mixed_lora": ("triton", "cpu", "cuda", "reference"),
    "own_lora": ("cpu", "reference"),
    "nearest_key": ("triton", "cpu", "cuda", "reference"),
    "topk_keys": ("triton", "cpu", "cuda", "reference"),
    "pool_tokens": ("triton", "cpu", "reference"),
    "router": ("triton", "cuda", "reference"),
    "mix_experts": ("triton", "cpu", "reference"),
    "mix_prompts": ("triton", "cuda", "reference"),
}

# Up to so many rows, of 16-bit and of wider tensors, a call that wants no gradient takes the CUDA
# kernels: where a launch costs more than the work. Assumed, until a GPU has measured them.
_FEW_ROWS = {
    "mixed_lora": (64, 64),
    "nearest_key": (16, 4),
    "topk_keys": (16, 4),
    "router": (4, 4),
    "mix_prompts": (4, 4),
}


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why and what to do."""


def ops() -> tuple[str, ...]:
    """The names of all ops that are dispatched."""
    return tuple(_TABLE)


def unavailable(
    op: str, backend: str, device_type: str, dtype: torch.dtype | None = None
) -> str | None:
    """Why `backend` cannot run `op` on tensors of that device and dtype, or None when it can."""
    if backend not in _TABLE[op]:
        return f"op '{op}' has no {backend} kernel (it has: {', '.join(_TABLE[op])})"
    if backend == "cpu":
        if device_type != "cpu":
            return f"the tensors are on '{device_type}': move them to the CPU or choose triton"
        return _import_failure(
            "sapt_fast._C", "reinstall with SAPT_FAST_BUILD=cpu to see the error"
        )
    if backend == "cuda":
        if device_type != "cuda":
            return f"the tensors are on '{device_type}': move them to a GPU"
        if dtype == torch.float64:
            return "float64 runs in the reference and on the CPU only"
        return _cuda_unavailable()
    if backend == "triton":
        if dtype == torch.float64:
            return "float64 runs in the reference and on the CPU only"
        missing = _import_failure("triton", "pip install 'sapt_fast[gpu]'")
        if missing or device_type == "cuda":
            return missing
        if not triton_interpreted():
            return f"the tensors are on '{device_type}' and TRITON_INTERPRET=1 is not set"
    return None


@torch.compiler.assume_constant_result
def resolve(
    op: str,
    device: torch.device,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    rows: int | None = None,
) -> str:
    """The backend that runs `op` on tensors of `device` and `dtype`.

    `backend`, or else the environment variable SAPT_FAST_BACKEND, names one that must work;
    with neither, the first that is available is taken. The variable says nothing about ops that
    have no kernel of that backend. Each choice is logged once.

    `rows` is given by a call that wants no gradient: for few of them the CUDA kernels are taken, if
    their present source has passed its checks on a GPU (`cuda_kernels/recorded.json`).

    Raises:
        ValueError: the name is unknown.
        BackendError: the named backend cannot run this op on this device.
    """
    requested = backend or _from_environment(op)
    few = rows is not None and device.type == "cuda" and _are_few(op, rows, dtype)
    return _resolve(op, device.type, requested, dtype, few)


@torch.compiler.assume_constant_result
def kernels(op: str, backend: str) -> ModuleType:
    """The module that holds the kernels of `op` for `backend`."""
    return _load(f"{_FOLDERS[backend]}.{op}")


def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _from_environment(op: str) -> str | None:
    named = os.environ.get(ENV_VARIABLE) or None
    elsewhere = named not in _TABLE[op] and any(named in row for row in _TABLE.values())
    return None if elsewhere else named


def _are_few(op: str, rows: int, dtype: torch.dtype | None) -> bool:
    narrow, wide = _FEW_ROWS.get(op, (0, 0))
    return rows <= (narrow if dtype in (torch.float16, torch.bfloat16) else wide)


@cache
def _resolve(
    op: str, device_type: str, requested: str | None, dtype: torch.dtype | None, few: bool
) -> str:
    if requested is not None:
        if requested not in BACKENDS:
            raise ValueError(
                f"backend (or {ENV_VARIABLE}): got {requested!r}, expected one of {BACKENDS}"
            )
        reason = unavailable(op, requested, device_type, dtype)
        if reason is not None:
            raise BackendError(f"backend '{requested}' cannot run op '{op}': {reason}")
        chosen = requested
    else:
        interpreted = device_type != "cuda" and triton_interpreted()
        passed_over = {"cuda"} | ({"triton"} if interpreted else set())
        candidates = [b for b in _TABLE[op] if b not in passed_over]
        if few and unchosen(op) is None:
            candidates.insert(0, "cuda")
        chosen = next(b for b in candidates if unavailable(op, b, device_type, dtype) is None)
    logger.info("op %s on %s: backend %s", op, device_type, chosen)
    return chosen


@cache
def _cuda_unavailable() -> str | None:
    return importlib.import_module("sapt_fast.cuda_kernels.common").unavailable()


@cache
def unchosen(op: str) -> str | None:
    """Why the CUDA kernels of an op that has some are not chosen unasked, or None."""
    reason = _cuda_unavailable()
    if reason is not None:
        return reason
    return importlib.import_module("sapt_fast.cuda_kernels.common").unrecorded(op)


@cache
def _load(name: str) -> ModuleType:
    return importlib.import_module(name)


@cache
def _import_failure(module: str, remedy: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed ({remedy})"
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported ({error}); {remedy}"
    return None
