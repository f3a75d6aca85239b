"""Selects the backend that runs an op.

An op is a module of `sapt_fast.ops` with an `Op` named `DISPATCH`. A backend is a package
`sapt_fast.<name>_kernels`. It has an op if it has a module of the op's name, with the functions
`<op>_fwd` and `<op>_bwd`. The package implements `Backend`: it reports whether its kernels can run,
and whether they may be selected by default. So a new op or kernel needs no change here, and a new
backend only its name in `BACKENDS`.
"""

import importlib
import importlib.util
import inspect
import logging
import os
import pkgutil
from functools import cache
from types import ModuleType
from typing import NamedTuple, Protocol, cast

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "cpu", "triton", "cuda")  # later ones are preferred
ENV_VARIABLE = "SAPT_FAST_BACKEND"


class Op(NamedTuple):
    """The dispatch settings of an op, its module's `DISPATCH`.

    Attributes:
        few_rows: the largest numbers of rows, for 16-bit and for wider dtypes, for which a call
            without gradient may use kernels for few rows, where a launch costs more than the work.
            The numbers are assumptions; no GPU has measured them.
        most_row_ranks: the largest product of rows and ranks for such a call, where the work grows
            with both. Estimated, too.
    """

    few_rows: tuple[int, int] = (0, 0)
    most_row_ranks: int | None = None

    def are_few(self, rows: int, dtype: torch.dtype | None, ranks: int) -> bool:
        """Returns whether kernels for few rows may run a call without gradient."""
        narrow, wide = self.few_rows
        most = narrow if dtype in (torch.float16, torch.bfloat16) else wide
        return rows <= most and (self.most_row_ranks is None or rows * ranks <= self.most_row_ranks)


class Backend(Protocol):
    """The members that the package of a backend must have."""

    BACKWARD: str
    """The backend that computes the gradients of ops whose module has no `<op>_bwd`."""

    def unavailable(self, op: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
        """Returns why the backend cannot run one of its ops on such tensors, or None.

        A device without an index stands for any of its type.
        """

    def unchosen(
        self, op: str, device: torch.device, few: int | None, dtype: torch.dtype | None = None
    ) -> str | None:
        """Returns why the backend is not selected by default, or None.

        Args:
            op: the op's name.
            device: of the tensors.
            few: the number of rows if they are few, else None.
            dtype: of the tensors. Defaults to any.
        """


class BackendError(RuntimeError):
    """Raised if a backend requested by name cannot run; the message has the reason and a remedy."""


def ops() -> tuple[str, ...]:
    """Returns the names of all ops that are dispatched."""
    return tuple(_rows())


@cache
def backends(op: str) -> tuple[str, ...]:
    """Returns the backends that have an op, the preferred one first.

    Raises:
        KeyError: if the op is unknown.
    """
    _rows()[op]
    return tuple(b for b in reversed(BACKENDS) if b == "reference" or _has(b, op))


def unavailable(
    op: str, backend: str, device: torch.device | str, dtype: torch.dtype | None = None
) -> str | None:
    """Returns why a backend cannot run an op on tensors of a device and dtype; None if it can."""
    if backend not in backends(op):
        return f"op '{op}' has no {backend} kernel (it has: {', '.join(backends(op))})"
    if backend == "reference":
        return None
    return _backend(backend).unavailable(op, torch.device(device), dtype)


@torch.compiler.assume_constant_result
def resolve(
    op: str,
    device: torch.device,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    rows: int | None = None,
    ranks: int = 0,
    feature: str | None = None,
) -> str:
    """Returns the backend that runs an op.

    A backend requested by name must be able to run. By default, the first backend that supports the
    tensors is used. Each choice is logged once, with the reasons against preferred backends.

    Args:
        op: the op's name.
        device: of the tensors.
        backend: the requested backend. Defaults to the environment variable SAPT_FAST_BACKEND,
            which has no effect on ops that have no kernel of that backend.
        dtype: of the tensors.
        rows: the number of rows of a call without gradient, else None. For few rows the CUDA
            kernels are used, if their current source has passed such calls on a GPU
            (`cuda_kernels/recorded.json`).
        ranks: the most ranks that the adapters of a projection have together, where there are any.
        feature: an argument of the kernels that some backends' kernels lack and the call needs,
            such as "dropout". The environment variable has no effect if the backend's lack it.

    Raises:
        ValueError: if the requested name is unknown.
        BackendError: if the requested backend cannot run this op on this device.
    """
    requested = backend or _from_environment(op, device, feature)
    is_few = (
        rows is not None and _kind(device) == "cuda" and _rows()[op].are_few(rows, dtype, ranks)
    )
    return _resolve(op, device, requested, dtype, rows if is_few else None, feature)


@torch.compiler.assume_constant_result
def kernels(op: str, backend: str) -> ModuleType:
    """Returns the module with the kernels of an op for a backend."""
    return _load("sapt_fast.ops" if backend == "reference" else _package(backend), op)


@torch.compiler.assume_constant_result
def backward(op: str, backend: str) -> str:
    """Returns the backend that computes the gradients for `backend`: itself, if it can."""
    if hasattr(kernels(op, backend), f"{op}_bwd"):
        return backend
    return _backend(backend).BACKWARD


def unchosen(op: str) -> str | None:
    """Returns why an op's CUDA kernels are not selected by default for few rows, or None."""
    return _backend("cuda").unchosen(op, torch.device("cuda"), 1)


def triton_interpreted() -> bool:
    """Returns whether Triton kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@cache
def import_failure(module: str, remedy: str) -> str | None:
    """Returns why a module that a backend needs cannot be imported, and the remedy; or None."""
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed ({remedy})"
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported ({error}); {remedy}"
    return None


def _from_environment(op: str, device: torch.device, feature: str | None) -> str | None:
    named = os.environ.get(ENV_VARIABLE)
    if not named:
        return None
    elsewhere = named in BACKENDS and named not in backends(op)
    if not elsewhere and feature is not None and named in BACKENDS:
        runs = unavailable(op, named, device) is None  # so that its kernels can be imported
        elsewhere = runs and _lacks(op, named, feature) is not None
    return None if elsewhere else named


@cache
def _lacks(op: str, backend: str, feature: str | None) -> str | None:
    """Returns why the kernels of an op cannot do what a call needs, or None."""
    if feature is None:
        return None
    forward = getattr(kernels(op, backend), f"{op}_fwd")
    has = feature in inspect.signature(forward).parameters
    return None if has else f"its kernels have no {feature}"


@cache
def _kind(device: torch.device) -> str:
    """Returns the device's type; torch makes the string anew at each access, which takes longer."""
    return device.type


@cache
def _resolve(
    op: str,
    device: torch.device,
    requested: str | None,
    dtype: torch.dtype | None,
    few: int | None,
    feature: str | None,
) -> str:
    passed_over = []
    if requested is not None:
        if requested not in BACKENDS:
            raise ValueError(
                f"backend (or {ENV_VARIABLE}): got {requested!r}, expected one of {BACKENDS}"
            )
        reason = unavailable(op, requested, device, dtype) or _lacks(op, requested, feature)
        if reason is not None:
            raise BackendError(f"backend '{requested}' cannot run op '{op}': {reason}")
        chosen = requested
    else:
        for chosen in backends(op):
            reason = _not_by_default(op, chosen, device, dtype, few)
            reason = reason or _lacks(op, chosen, feature)
            if reason is None:
                break
            passed_over.append(f"; not {chosen}: {reason}")
    logger.info("op %s on %s: backend %s%s", op, device, chosen, "".join(passed_over))
    return chosen


def _not_by_default(
    op: str, backend: str, device: torch.device, dtype: torch.dtype | None, few: int | None
) -> str | None:
    if backend == "reference":
        return None
    reason = _backend(backend).unchosen(op, device, few, dtype)
    return unavailable(op, backend, device, dtype) if reason is None else reason


@cache
def _rows() -> dict[str, Op]:
    """Returns the `Op` of every op, by name."""
    folder = importlib.import_module("sapt_fast.ops").__path__
    modules = {m.name: _load("sapt_fast.ops", m.name) for m in pkgutil.iter_modules(folder)}
    return {name: m.DISPATCH for name, m in modules.items() if hasattr(m, "DISPATCH")}


def _package(backend: str) -> str:
    return f"sapt_fast.{backend}_kernels"


def _backend(name: str) -> Backend:
    return cast(Backend, importlib.import_module(_package(name)))


def _has(backend: str, op: str) -> bool:
    return importlib.util.find_spec(f"{_package(backend)}.{op}") is not None


@cache
def _load(package: str, op: str) -> ModuleType:
    return importlib.import_module(f"{package}.{op}")
