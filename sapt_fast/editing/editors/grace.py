"""GRACE in a run, and methods like it that keep their edits in a handle of the model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from sapt_fast.editing.editors.base import GIVEN, MADE, Editor, Pair
from sapt_fast.methods.edit_sites import default_targets
from sapt_fast.methods.edit_texts import kind_of
from sapt_fast.methods.grace import EditError, GraceConfig
from sapt_fast.patching import patch, unpatch

__all__ = ["GraceEditor", "ReleasedGraceEditor"]


class HandleEditor(Editor):
    """A method whose handle has `edit(list)`, `undo`, `layers`, `stored` and `restore`.

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
        """Returns the codebooks and the log."""
        tensors, _ = self.handle.stored()
        return dict(tensors)

    def restore(self, tensors: Mapping[str, Tensor], history: Sequence[Pair]) -> None:
        """Restores the codebooks."""
        device = self.model.device
        self.handle.restore({name: tensor.to(device) for name, tensor in tensors.items()}, {})

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """A context in which prompts on which an edit acts are not counted."""
        layers = self.handle.layers.values()
        for layer in layers:
            layer.counting = False
        try:
            yield
        finally:
            for layer in layers:
                layer.counting = True

    def size(self) -> dict[str, int]:
        """Returns the number of edits, of keys, and of the numbers in keys and values."""
        books = [layer.codebook for layer in self.handle.layers.values()]
        numbers = sum(book.keys.numel() + book.values.numel() for book in books)
        return {
            "edits": len(self.handle.tasks),
            "keys": sum(map(len, books)),
            "values": numbers,
        }

    def export(self, folder: str | os.PathLike[str]) -> bool:
        """Saves the edits."""
        self.handle.save_pretrained(folder)
        return True

    def close(self) -> None:
        """Removes the method from the model."""
        unpatch(self.model, self.handle.attribute)


class GraceEditor(HandleEditor):
    """GRACE with the options of `GraceConfig`."""

    Options = GraceConfig

    def __init__(self, model: Any, options: GraceConfig) -> None:
        if options.keys == "function":
            raise ValueError(
                "keys: got 'function', which a run cannot set; expected 'last' or 'mean'"
            )
        super().__init__(model, options)


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


class ReleasedGraceEditor(HandleEditor):
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
