"""Methods that change the outputs of layers."""

from __future__ import annotations

from typing import Any

from sapt_fast.methods.base import Handle
from sapt_fast.sites.output import (
    AtOutput,
    attach_output,
    detach_output,
    find_outputs,
    require_output,
)
from sapt_fast.sites.report import PatchReport

__all__ = ["OutputHandle"]


class OutputHandle(Handle):
    """The base class of handles whose method changes the outputs of `config.target_modules`.

    A subclass defines `make`, `grow`, `stored` and `restore`.
    """

    site = "output"

    def make(self, path: str) -> AtOutput:
        """Returns the module that is given the output of the layer at `path`."""
        raise NotImplementedError

    @classmethod
    def sites(cls, model: Any, config: Any) -> PatchReport:
        """Finds the modules that `config.target_modules` names; raises ValueError if none match."""
        return find_outputs(model, config.target_modules)

    def attach(self, path: str) -> None:
        """Puts the module that `make` returns at the output of a layer."""
        attach_output(self._model, path, self.slot, self.make(path))

    def detach(self, path: str) -> None:
        """Removes the module from the layer."""
        detach_output(self._model, path, self.slot)

    def require_own(self) -> None:
        """Raises ValueError if another library has replaced a layer."""
        for path in self.report.patched:
            require_output(self._model, path, self.slot)

    def modules_at(self) -> dict[str, Any]:
        """Returns the module at each layer, by the layer's path."""
        layers = {path: self._model.get_submodule(path) for path in self.report.patched}
        return {path: getattr(layer, self.slot) for path, layer in layers.items()}
