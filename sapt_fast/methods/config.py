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

    The type parameter is the handle's class, which `sapt_fast.handle(model, Config)` returns.
    """

    @property
    def method(self) -> str:
        """The name of the method in `sapt_fast.methods.registry.METHODS`."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a JSON-ready dict, which `from_dict` reads."""
        settings: Any = self
        return asdict(settings)

    @classmethod
    def from_dict(cls: type[_Config], values: Mapping[str, Any]) -> _Config:
        """Builds a config from a dict of its fields.

        Args:
            values: field values by name; missing fields have their defaults.

        Raises:
            ValueError: if a field is unknown.
            ValueError: if a value is out of range.
        """
        settings: Any = cls
        known = {f.name for f in fields(settings)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"{cls.__name__}: got unknown fields {unknown}, expected among {sorted(known)}"
            )
        return cls(**values)
