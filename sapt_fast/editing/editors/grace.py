"""GRACE and MELO in a run: methods that keep their edits in a handle of the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from sapt_fast.editing.editors.base import GIVEN, MADE, Editor, Pair
from sapt_fast.methods.edits.inputs import EditError
from sapt_fast.methods.edits.sites import default_targets
from sapt_fast.methods.edits.texts import kind_of
from sapt_fast.methods.grace import GraceConfig
from sapt_fast.methods.melo import MeloConfig
from sapt_fast.patching import patch, unpatch

__all__ = ["GraceEditor", "HandleEditor", "MeloEditor", "ReleasedGraceEditor"]


class HandleEditor(Editor):
    """A method whose handle is an `EditHandle`.

    Attributes:
        handle: `model.<method>`.
    """

    def __init__(self, model: Any, options: Any) -> None:
        super().__init__(model, options)
        config = self.config()
        patch(model, config)
        self.handle: Any = getattr(model, config.method)

    def config(self) -> Any:
        """Returns the method's config."""
        return self.options

    def edit(self, pairs: Sequence[Pair]) -> list[str]:
        """Makes edits together; those that do not fit are left out, and the others made anew."""
        given: list[tuple[Any, Any]] = [*pairs]
        if kind_of(self.model) == "classifier":
            given = [(prompt, int(target)) for prompt, target in pairs]
        try:
            made = self.handle.edit(given, batch_size=len(given))
        except EditError as error:
            failed = f"does not fit after {self.handle.config.steps} steps"
            missed = dict.fromkeys(error.unfitted, failed)
        except (ValueError, FloatingPointError) as error:
            if len(pairs) == 1:
                return [str(error)]
            return [outcome for pair in pairs for outcome in self.edit([pair])]
        else:
            return [GIVEN if edit is None else MADE for edit in made]
        others = [pair for place, pair in enumerate(pairs) if place not in missed]
        outcomes = iter(self.edit(others) if others else [])
        return [missed[place] if place in missed else next(outcomes) for place in range(len(pairs))]

    def undo(self, edit: int) -> None:
        """Takes an edit back."""
        self.handle.undo(edit)

    def state(self) -> dict[str, Tensor]:
        """Returns the state of the layers and the log."""
        tensors, _ = self.handle.stored()
        return dict(tensors)

    def restore(self, tensors: Mapping[str, Tensor], history: Sequence[Pair]) -> None:
        """Restores the state of the layers and the log."""
        count = len(tensors["log:edits"]) if "log:edits" in tensors else 0
        self.handle.restore(tensors, {"edits": count})

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """A context in which prompts on which an edit acts are not counted."""
        counted = [part.hits for part in self.handle.parts().values() if hasattr(part, "hits")]
        before = [hits.clone() for hits in counted]
        try:
            yield
        finally:
            for hits, count in zip(counted, before, strict=True):
                hits.copy_(count)

    def size(self) -> dict[str, int]:
        """Returns the number of edits, and of the floating-point values at the layers."""
        tensors = [t for part in self.handle.parts().values() for t in part.state_dict().values()]
        values = sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
        return {"edits": len(self.handle.tasks), "values": values}

    def look_up_by(self, function: Callable[[list[Tensor]], Tensor]) -> None:
        """Sets what prompts are looked up by."""
        self.handle.look_up_by(function)

    def export(self, folder: str | os.PathLike[str]) -> bool:
        """Saves the edits."""
        self.handle.save_pretrained(folder)
        return True

    def close(self) -> None:
        """Removes the method from the model."""
        unpatch(self.model, self.handle.attribute)


class GraceEditor(HandleEditor):
    """GRACE with the options of `GraceConfig`."""

    Options: ClassVar[type] = GraceConfig

    def size(self) -> dict[str, int]:
        """Returns the number of edits, of keys, and of the floating-point values."""
        keys = sum(len(book) for book in self.handle.books().values())
        return {**super().size(), "keys": keys}


class MeloEditor(HandleEditor):
    """MELO with the options of `MeloConfig`; the edits of a batch share a block."""

    Options = MeloConfig


@dataclass
class ReleasedOptions:
    """The options of GRACE as released; defaults are those of `GraceConfig.released`."""

    target_modules: tuple[str, ...] | list[str] | str | None = field(
        default=None,
        metadata={
            "help": "The layer to edit. None: that of `GraceConfig`, for T5 the last projection of "
            "the encoder's last block but one."
        },
    )
    rule: str = field(
        default="coverage", metadata={"help": "How radii change: coverage or moving_average."}
    )
    replacement: str = field(
        default="replace_last",
        metadata={"help": "The tokens whose output is replaced."},
    )
    radius: float = field(default=1.0, metadata={"help": "eps, the radius of a new key."})
    steps: int = field(default=100, metadata={"help": "Training steps, all of which are taken."})
    learning_rate: float = field(default=1.0, metadata={"help": "Adam's learning rate."})
    cold: bool = field(default=False, metadata={"help": "Whether values start at random."})

    def __post_init__(self) -> None:
        self.config(("layer",))  # raises if a value does not fit

    def config(self, targets: tuple[str, ...] | list[str] | str) -> GraceConfig:
        """Returns the config for these layers."""
        return GraceConfig.released(**{**asdict(self), "target_modules": targets})


class ReleasedGraceEditor(GraceEditor):
    """GRACE as its released code behaves: see `GraceConfig.released`."""

    Options = ReleasedOptions

    def config(self) -> Any:
        """Returns the released settings."""
        return self.options.config(self.options.target_modules or _released_targets(self.model))


def _released_targets(model: Any) -> tuple[str, ...]:
    """The layer that the released code edits in a T5; else that of `GraceConfig`."""
    if model.config.model_type != "t5":
        return default_targets(model)
    block = max(0, model.config.num_layers - 2)
    return (f"encoder.block.{block}.layer.1.DenseReluDense.wo",)
