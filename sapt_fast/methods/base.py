"""What a method is: the protocol that patching, saving and training see, whatever it computes.

A method has a config (a dataclass) and a handle (a module of the model, `model.<attribute>`). The
handle says where the method touches the model, puts its pools there, computes its weights once
above the layers if it has any, grows, and hands out what a saved folder must hold. To add one,
write both in one file and name the handle in `sapt_fast.methods.registry.METHODS`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sapt_fast.methods.config import MethodConfig
from sapt_fast.pools.own import Own
from sapt_fast.routing.hooks import Routing
from sapt_fast.sites.report import PatchReport
from sapt_fast.storage.method_files import config_file, write_method
from sapt_fast.storage.pretrained_files import PretrainedFiles

__all__ = ["Handle", "follow", "handles", "require_held"]


class Handle(Own, nn.Module):
    """What a user holds of a method on a model: `model.<attribute>`.

    Args:
        model: not changed before `attach` and `install`.
        config: of the method.
        report: what `sites` returned.

    Attributes:
        Config: the class of the config.
        method: the name by which folders and messages know the method.
        attribute: the name of the handle on the model, no other method's.
        site: the kind of place that it touches. Two methods may not touch one place in one way.
        freezes: whether the base model's parameters are frozen while it is patched.
        unfrozen_before: the names of those that were not frozen before.
        routing: the weights of the running forward; None for a method whose layers look up by
            themselves.
    """

    Config: ClassVar[type[MethodConfig[Any]]]
    method: ClassVar[str]
    attribute: ClassVar[str]
    site: ClassVar[str]
    freezes: ClassVar[bool] = True
    config: Any
    routing: Routing | None = None
    files: Any
    _model: Any

    def __init__(self, model: Any, config: Any, report: PatchReport) -> None:
        super().__init__()
        object.__setattr__(self, "_model", model)  # not a submodule: it is the model's
        self.config = config
        self._report = report
        self._tasks: list[str] = []
        self.unfrozen_before: list[str] = []
        self.files = PretrainedFiles(self)

    @property
    def report(self) -> PatchReport:
        """What was patched, what was not and why."""
        return self._report

    @property
    def tasks(self) -> list[str]:
        """Names of what was added, oldest first."""
        return self._tasks

    # --- the protocol ---

    @classmethod
    def sites(cls, model: Any, config: Any) -> PatchReport:
        """The places that the method touches, and the reason for each that it skips.

        Nothing changes.

        Raises:
            ValueError: if the method cannot work on this model.
        """
        raise NotImplementedError

    def attach(self, path: str) -> None:
        """Puts the method's pool, codebook or bank at one of the places in `report.patched`."""
        raise NotImplementedError

    def detach(self, path: str) -> None:
        """Undoes `attach`; the model is as before there."""
        raise NotImplementedError

    def signal(self, **inputs: Tensor | None) -> Tensor | None:
        """What is computed once above the layers, for all of them: mixture weights [B, K].

        Args:
            **inputs: input_ids, inputs_embeds, attention_mask and labels of a forward.

        Returns:
            None for methods whose layers look up by themselves.
        """
        return None

    def grow(self, name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Adds what the next task, edit or expert needs; it trains, what was there freezes.

        Args:
            name: of what is added.
            optimizer: gets the new parameters, with fresh state, in place of those before.
        """
        raise NotImplementedError

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a saved folder holds: named tensors, and values that JSON can express."""
        raise NotImplementedError

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Takes over what `stored` gave, into a handle without tasks.

        Raises:
            ValueError: if something is missing or has another shape; nothing has changed then.
        """
        raise NotImplementedError

    # --- what all methods have ---

    @property
    def slot(self) -> str:
        """The name that modules which `attach` adds to a layer have there."""
        return f"sapt_{self.attribute}"

    @property
    def config_file(self) -> str:
        """The file of a saved folder that describes the method."""
        return config_file(self.attribute)

    def install(self) -> None:
        """Adds hooks; called by `patch` once everything is attached."""
        self.files.install()

    def remove(self) -> None:
        """Takes the hooks away; called by `unpatch` before anything is detached."""
        self.files.remove()

    def places(self) -> list[str]:
        """Where `attach` was called, as far as the model still has it."""
        return self.report.patched

    def require_own(self) -> None:
        """Raises ValueError if another library has replaced what `attach` put there."""

    def require_removable(self) -> None:
        """Raises ValueError if another library has replaced a method that `install` put there."""
        if self.routing is not None:
            self.routing.require_removable()

    def leave(self) -> None:
        """Takes the method off the model: hooks, what was attached, and this handle."""
        places = self.places()
        self.remove()
        for path in places:
            self.detach(path)
        delattr(self._model, self.attribute)

    def require_unmerged(self) -> None:
        """Raises RuntimeError if a mixture is merged into the base weights."""
        if self.routing is not None:
            self.routing.require_unmerged()

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that training updates."""
        return (p for p in self._model.parameters() if p.requires_grad)

    def save_pretrained(
        self, directory: str | os.PathLike[str], *, is_main_process: bool | None = None
    ) -> None:
        """Saves the method's tensors and settings into a folder, beside those of other methods.

        Args:
            directory: what an earlier call wrote there is replaced as a whole, other files stay.
            is_main_process: whether this process writes; None if it calls (of a sharded model, for
                which all processes must call: rank 0 alone).

        Raises:
            ValueError: if the directory cannot be replaced or holds damaged files.
            FileExistsError: if a file that this method has not written is in the way.
            OSError: if it cannot be written; it is then as it was.
        """
        self.save(directory, is_main_process=is_main_process)

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        is_main_process: bool | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`save_pretrained`, with values from a state_dict of the model if one is given."""
        for one in handles(self._model):  # the base model is recognised by its weights
            one.require_unmerged()
        tensors, values = self.stored()
        write_method(self, directory, tensors, values, is_main_process)

    def restore_values(self, directory: str | os.PathLike[str]) -> None:
        """Gives the tasks that the model has the values that they have in a saved folder."""
        raise RuntimeError(
            f"{directory}: holds {self.method} beside the model; load both by from_pretrained and "
            "sapt_fast.load_pretrained"
        )


def handles(model: nn.Module) -> list[Handle]:
    """The handles of a model, in the order in which its methods were patched."""
    return [child for child in model.children() if isinstance(child, Handle)]


def require_held(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Raises ValueError unless an optimizer has one of these parameters."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(map(id, parameters)):
        raise ValueError(
            "optimizer: contains none of the previous task's parameters; pass the optimizer that "
            "trained them"
        )


def follow(
    optimizer: torch.optim.Optimizer, before: list[nn.Parameter], after: list[nn.Parameter]
) -> None:
    """Puts parameters in the place of those that they follow, with fresh state.

    Args:
        before: parameters of which the optimizer may hold some.
        after: those that follow them, in the same order; further ones go to the first group.
    """
    successor = {id(old): new for old, new in zip(before, after, strict=False)}
    for group in optimizer.param_groups:
        for old in group["params"]:
            if id(old) in successor:
                optimizer.state.pop(old, None)
        group["params"] = [successor.pop(id(p), p) for p in group["params"]]
    # The first task's copies of modules follow none.
    optimizer.param_groups[0]["params"] += after[len(before) :]
