"""A method of ours in a model's place: it takes what the model's own takes, by the same names."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import GenerationMixin

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class StandIn:
    """Calls `method`, and shows the name, the docstring and the signature of another.

    Not a plain function: a copied model has to call the method of its own copy.

    Args:
        method: what is called; a bound method.
        shown: what it looks like, the model's own method.
        own: gives `shown` again, later and in a copy. (Its signature alone cannot be pickled.)
    """

    def __init__(
        self,
        method: Callable[..., Any],
        shown: Callable[..., Any],
        own: Callable[[], Callable[..., Any]],
    ) -> None:
        for name in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(self, name, getattr(shown, name, None))
        self._method = method
        self._own = own

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._own())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._method(*args, **kwargs)


def positional_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a bound method's positional parameters."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind in _POSITIONAL)


def generation_arguments(
    generate: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call of a model's `generate`, by the names that it has for them."""
    if not args:
        return dict(kwargs)
    names = positional_names(generate)
    if not names:  # one that hands all of them on
        names = positional_names(GenerationMixin.generate)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}
