"""The base class of the methods' configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Generic, TypeVar

__all__ = ["MethodConfig"]

_Handle = TypeVar("_Handle")
_Config = TypeVar("_Config", bound="MethodConfig[Any]")


class MethodConfig(Generic[_Handle]):
    """The base class of the methods' configs, which are dataclasses.

    Its parameter is the type of the handle, by which `sapt_fast.handle(model, Config)` is typed.
    """

    @property
    def method(self) -> str:
        """The name of the method, as `sapt_fast.methods.registry.METHODS` has it."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_dict` gives the config back."""
        settings: Any = self
        return asdict(settings)

    @classmethod
    def from_dict(cls: type[_Config], values: Mapping[str, Any]) -> _Config:
        """The config with these values.

        Raises:
            ValueError: if a field is unknown, or a value is out of range.
        """
        settings: Any = cls
        known = {f.name for f in fields(settings)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"{cls.__name__}: got unknown fields {unknown}, expected among {sorted(known)}"
            )
        return cls(**values)
