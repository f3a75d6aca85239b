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

# Backends of each op, the preferred one first.
_TABLE: dict[str, tuple[str, ...]] = {
    "mixed_lora": ("triton", "cpu", "reference"),
    "nearest_key": ("triton", "cpu", "reference"),
    "topk_keys": ("triton", "cpu", "reference"),
    "pool_tokens": ("triton", "cpu", "reference"),
    "router": ("triton", "reference"),
    "mix_experts": ("triton", "cpu", "reference"),
    "mix_prompts": ("triton", "reference"),
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
) -> str:
    """The backend that runs `op` on tensors of `device` and `dtype`.

    `backend`, or else the environment variable SAPT_FAST_BACKEND, names one that must work;
    with neither, the first that is available is taken. The variable says nothing about ops that
    have no kernel of that backend. Each choice is logged once.

    Raises:
        ValueError: the name is unknown.
        BackendError: the named backend cannot run this op on this device.
    """
    requested = backend or _from_environment(op)
    return _resolve(op, device.type, requested, dtype)


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


@cache
def _resolve(op: str, device_type: str, requested: str | None, dtype: torch.dtype | None) -> str:
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
        candidates = [b for b in _TABLE[op] if not (b == "triton" and interpreted)]
        chosen = next(b for b in candidates if unavailable(op, b, device_type, dtype) is None)
    logger.info("op %s on %s: backend %s", op, device_type, chosen)
    return chosen


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
