"""The protocol of an editing method in a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Tensor

__all__ = ["GIVEN", "MADE", "Editor", "Pair"]

Pair = tuple[Tensor, Tensor]  # tokens [T] int64 of a prompt and a target, on the CPU

MADE = "made"
GIVEN = "given already"


class Editor:
    """The base class of the methods: changes a model by edits, and restores it afterwards.

    What an edit comes to may depend on the model, the edits so far, the pairs and torch's random
    state alone; then a resumed run ends like one that was not interrupted.

    Args:
        model: the transformers model, in evaluation mode.
        options: an instance of `Options`.

    Attributes:
        Options: a dataclass with the method's options; each field has a "help".
    """

    Options: ClassVar[type]

    def __init__(self, model: Any, options: Any) -> None:
        self.model, self.options = model, options

    def edit(self, pairs: Sequence[Pair]) -> list[str]:
        """Makes edits together.

        Args:
            pairs: one or more; equal prompts have equal targets.

        Returns:
            For each `MADE`, or `GIVEN` if the model gave the target before; else why it failed.
        """
        raise NotImplementedError

    def undo(self, edit: int) -> None:
        """Takes an edit back.

        Args:
            edit: its number, from 0, in the order in which edits were made.

        Raises:
            NotImplementedError: if the method cannot.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot take an edit back")

    def state(self) -> dict[str, Tensor]:
        """Returns all that the edits so far have changed, by name."""
        raise NotImplementedError

    def restore(self, tensors: Mapping[str, Tensor], history: Sequence[Pair]) -> None:
        """Continues from a saved state.

        Args:
            tensors: what `state` returned.
            history: the edits until then, those that failed among them.

        Raises:
            ValueError: if the tensors do not fit.
        """
        raise NotImplementedError

    def measuring(self) -> AbstractContextManager[Any]:
        """A context in which questions to the model leave no trace in the state."""
        return nullcontext()

    def look_up_by(self, function: Callable[[list[Tensor]], Tensor]) -> None:
        """Sets what prompts are looked up by, for options with `keys="function"`.

        Args:
            function: returns one vector per prompt, [B, D], for the tokens [T_b] of each.

        Raises:
            ValueError: if the method looks nothing up, or by other keys.
        """
        raise ValueError("look_up_by: the method looks nothing up; expected None")

    def size(self) -> dict[str, int]:
        """Returns numbers for the report, such as how many values the edits take."""
        return {"values": sum(tensor.numel() for tensor in self.state().values())}

    def export(self, folder: str | os.PathLike[str]) -> bool:
        """Saves the edits so that `sapt_fast.load_pretrained` reads them; False if it cannot."""
        return False

    def close(self) -> None:
        """Restores the model."""
        raise NotImplementedError
