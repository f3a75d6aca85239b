"""Converts numbers among the arguments: Python's, numpy's, and tensors or arrays of one element."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sapt_fast.ops._common import FLOATS


def number(name: str, value: Any) -> float:
    """Converts a value to a float; infinities and NaN are allowed.

    Raises:
        TypeError: if it is not a real number (booleans and complex numbers are not).
    """
    if type(value) is float:
        return value
    if not (_is_truth(value) or isinstance(value, (str, bytes, complex)) or _is_complex(value)):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            pass
    raise TypeError(f"{name}: got {value!r}, expected a number")


def integer(name: str, value: Any) -> int:
    """Converts a value to an int.

    Raises:
        TypeError: if it is not an integer (booleans are not).
    """
    if type(value) is int:
        return value
    if not _is_truth(value):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected an int")


def integers(name: str, values: Sequence[Any]) -> tuple[int, ...]:
    """Converts values to ints; raises TypeError if one is not an integer."""
    try:
        return tuple(integer(name, value) for value in values)
    except TypeError:
        raise TypeError(f"{name}: got {values!r}, expected an int or a sequence of ints") from None


def require_float(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless the tensor has a dtype that ops support."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected one of {FLOATS}")


def _is_truth(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dtype == torch.bool
    return isinstance(value, bool) or getattr(_dtype(value), "kind", "") == "b"


def _is_complex(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_complex()
    return getattr(_dtype(value), "kind", "") == "c"


def _dtype(value: Any) -> Any:
    """Returns the dtype of a numpy value; None for any other value."""
    return getattr(value, "dtype", None)
