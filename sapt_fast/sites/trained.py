"""What is trained of the base model, beside a method's own parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.sites.modules import (
    Changes,
    base_tensors,
    find_modules,
    heads,
    require_present,
    trained_tensors,
)
from sapt_fast.sites.report import PatchReport

__all__ = ["Trained", "saved_modules"]


def saved_modules(model: Any, config: Any, report: PatchReport, what: str) -> list[str]:
    """Returns the paths of `config.modules_to_save`, and notes in the report which heads stay.

    Args:
        model: the model.
        config: of the method.
        report: of `patch`.
        what: what such a module would be saved with, for the note.

    Raises:
        ValueError: as `find_modules`.
    """
    saved = find_modules(model, config.modules_to_save or (), report.patched)
    unsaved = [path for path in heads(model) if path not in saved]
    if unsaved:
        report.notes.append(
            f"{', '.join(unsaved)} is frozen and will not train; to train a head and save it with "
            f"{what}, set modules_to_save={unsaved} in the config"
        )
    return saved


class Trained:
    """Modules of a base model that train in full, and other tensors of it that have changed.

    Args:
        model: the model.
        paths: paths of the modules, which train while the method is installed.

    Attributes:
        changes: the changes of the base model since `patch`.
    """

    def __init__(self, model: Any, paths: Sequence[str]) -> None:
        self.changes = Changes(model)
        self._model = model
        self._paths = list(paths)
        self._parameters = [p for path in paths for p in model.get_submodule(path).parameters()]
        self._hooks: list[Any] = []

    def install(self) -> None:
        """Lets the modules train; values loaded from a state_dict do not count as trained."""
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        self._hooks = [
            self._model.register_load_state_dict_pre_hook(self._before_load),
            self._model.register_load_state_dict_post_hook(self._after_load),
        ]

    def remove(self) -> None:
        """Undoes `install`."""
        for parameter in self._parameters:
            parameter.requires_grad_(False)
        for hook in self._hooks:
            hook.remove()

    def tensors(self) -> dict[str, Tensor]:
        """Returns the base model's tensors that a checkpoint must contain, by name.

        They are those of the modules, and all others that require a gradient or have changed.
        """
        return trained_tensors(self._model, self._paths, self.changes)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies trained tensors into the base model; its parameters among them then train.

        Args:
            tensors: the return value of `tensors`.

        Raises:
            ValueError: if the model lacks a tensor, or has one of another shape; nothing has
                changed then.
        """
        require_present("tensors", tensors, self._model)
        own = base_tensors(self._model)
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
        for name in tensors:
            parameter = own[name]
            if isinstance(parameter, nn.Parameter):
                self._parameters.append(parameter.requires_grad_(True))

    def _before_load(self, *args: Any) -> None:
        self.changes.settle(self._model)

    def _after_load(self, *args: Any) -> None:
        self.changes.restart(self._model)
