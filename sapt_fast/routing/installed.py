"""Hooks and stand-ins on a model, which come and go together."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from sapt_fast.routing.recompute import Recomputation
from sapt_fast.routing.running import Running
from sapt_fast.routing.stand_in import StandIn, positional_names

__all__ = ["Installed"]


class Installed(Running):
    """`Running` of a model whose forwards and methods are watched.

    A subclass sets `recomputation` and defines `install`.

    Args:
        model: the transformers model (inside any wrapper).
        active, count: as in `Running`.
    """

    recomputation: Recomputation

    def __init__(self, model: Any, active: Callable[[], bool], count: Callable[[], int]) -> None:
        super().__init__(active, count)
        self.model = model
        self._hooks: list[Any] = []
        self._stand_ins: list[StandIn] = []
        self._argument_names: dict[type[nn.Module], tuple[str, ...]] = {}

    @property
    def installed(self) -> bool:
        """Whether the hooks are there."""
        return bool(self._hooks)

    def remove(self) -> None:
        """Takes hooks and stand-ins away; those of others, from before or since, stay.

        Raises:
            ValueError: if another library has replaced a stand-in; nothing has changed then.
        """
        self.require_removable()
        for stand_in in self._stand_ins:
            stand_in.remove()
        for hook in self._hooks:
            hook.remove()
        if self.installed:
            self.recomputation.remove()
        self._hooks, self._stand_ins = [], []

    def require_removable(self) -> None:
        """Raises ValueError if another library has replaced a stand-in."""
        for stand_in in self._stand_ins:
            stand_in.above()

    # --- for subclasses ---

    def _hook(
        self, module: nn.Module, enter: Callable[..., Any], leave: Callable[..., Any]
    ) -> None:
        """Calls `enter` before the forwards of a module and `leave` after them."""
        self._argument_names[type(module)] = positional_names(module.forward)
        self._hooks += [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True, always_call=True),
        ]

    def _stand_in(self, methods: Mapping[str, Callable[..., Any]]) -> None:
        """Puts methods in the place of the model's own, by name."""
        for name, method in methods.items():
            stand_in = StandIn(self.model, name, method)
            stand_in.install()
            self._stand_ins.append(stand_in)

    def _named(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments of a hooked module's forward by their names."""
        if not args:
            return kwargs
        return {**dict(zip(self._argument_names[type(module)], args, strict=False)), **kwargs}
