"""Methods that stand in for a model's own: they take what the own takes, by the same names."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import GenerationMixin

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class StandIn:
    """Calls `method` in place of the model's own, and shows that one's name and signature.

    Several may stand in for one method, each calling the one below it, and may be removed in any
    order. Not a plain function: a copied model has to call the method of its own copy.

    Args:
        model: whose attribute `name` it becomes by `install`.
        name: of the method.
        method: called as method(own, *args, **kwargs), where `own` is the method below it.

    Attributes:
        before: the instance attribute that it replaced; None if the method is the class's.
    """

    def __init__(self, model: Any, name: str, method: Callable[..., Any]) -> None:
        shown = getattr(model, name, None)
        for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(self, attribute, getattr(shown, attribute, None))
        self.before: Any = None
        self._model = model
        self._of = name
        self._method = method

    def install(self) -> None:
        """Puts it on top of what is there."""
        own = vars(self._model)
        self.before = own.get(self._of)
        own[self._of] = self

    def own(self) -> Any:
        """Returns the method below it, bound; None if the model has none."""
        if self.before is not None:
            return self.before
        kind = type(self._model)
        method = inspect.getattr_static(kind, self._of, None)
        return None if method is None else method.__get__(self._model, kind)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._method(self.own(), *args, **kwargs)

    def above(self) -> "StandIn | None":
        """Returns the stand-in directly above it; None if it is on top.

        Raises:
            ValueError: if another library has replaced it.
        """
        top = vars(self._model).get(self._of)
        if top is self:
            return None
        found = top
        while isinstance(found, StandIn) and found.before is not self:
            found = found.before
        if not isinstance(found, StandIn):
            raise ValueError(
                f"{self._of}: the method that sapt_fast.patch put on this "
                f"{type(self._model).__name__} was replaced by {top!r}; undo first what another "
                "library did to the model since"
            )
        return found

    def remove(self) -> None:
        """Leaves what is above and below it as if it had never been there; errors as `above`."""
        above = self.above()
        if above is not None:
            above.before = self.before
        elif self.before is not None:
            vars(self._model)[self._of] = self.before
        else:
            del vars(self._model)[self._of]


def positional_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the names of a bound method's positional parameters."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind in _POSITIONAL)


def generation_arguments(
    generate: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the arguments of a call of a model's `generate`, by the names of its parameters."""
    if not args:
        return dict(kwargs)
    names = positional_names(generate)
    if not names:  # one that hands all of them on
        names = positional_names(GenerationMixin.generate)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}
