"""What the methods of continual learning have in common, and where they differ."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from sapt_fast.continual.data.rows import TaskData
from sapt_fast.continual.objective import Step, forward, prompt_mask, supervised
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.trainer import Replay
from sapt_fast.continual.workbench import Workbench
from sapt_fast.methods.task_config import TaskConfig

__all__ = ["NoOptions", "Strategy", "options_from", "require"]


@dataclass(frozen=True)
class NoOptions:
    """The options of a method that has none of its own."""


class Strategy:
    """One method: which adapters a task trains, what is added to its loss, who answers.

    Model, trainer and loop are the same for all methods. The loop makes an instance for a run and
    calls, for each task, `begin_task`, then `reflection`, `mixture` and `objective` in training,
    `end_task`, and `mixture` for every batch that is answered. What a method has to remember
    beyond the adapters goes through `state` and `load_state` and lies in each checkpoint.

    Args:
        bench: the run's model, tokenizer and settings.
        options: an instance of `Options`.

    Attributes:
        Options: dataclass of the method's own settings.
        alone: every task starts from the base model and is scored on itself only.
        together: all tasks are learned at once, in one stage.
        pseudo: earlier tasks are remembered through what `settings.replay` keeps of them.
        routes: an input chooses among adapters of which there is one for each task.
        generates: the model must be one that generates text, not an encoder.
    """

    Options: ClassVar[Any] = NoOptions
    alone: ClassVar[bool] = False
    together: ClassVar[bool] = False
    pseudo: ClassVar[bool] = False
    routes: ClassVar[bool] = False
    generates: ClassVar[bool] = False

    def __init__(self, bench: Workbench, options: Any) -> None:
        self.bench, self.options = bench, options

    @classmethod
    def options_of(cls, name: str, values: Mapping[str, Any]) -> Any:
        """The `Options` with these values.

        Raises:
            ValueError: an unknown option, or a value of another type or out of range.
        """
        known = {field.name: field for field in fields(cls.Options)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"strategy_options: {name!r} has no {', '.join(map(repr, unknown))}, "
                f"it has {', '.join(known) or 'none'}"
            )
        checked = {}
        for key, value in values.items():
            default = known[key].default
            assert default is not MISSING
            checked[key] = _like(default, value, f"{name}.{key}")
        try:
            return cls.Options(**checked)
        except ValueError as error:
            raise ValueError(f"strategy_options: {name}.{error}") from error

    def configure(self, config: TaskConfig[Any]) -> Any:
        """The config of the method that the model is patched with, from the one asked for."""
        return config

    @classmethod
    def check(cls, settings: ContinualSettings) -> None:
        """Raises ValueError where settings do not fit the method."""

    # --- what a method does ---

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        """Readies the patched model for training on a task, after those in `learned`."""
        raise NotImplementedError

    def reflection(self, learned: Sequence[TaskData]) -> list[Replay]:
        """What the trainer holds the router to (SAPT's reflection loss)."""
        return []

    def mixture(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
        """Weights of the adapters, [B, K] or [1, K] for all inputs; None for the router's.

        Args:
            input_ids, attention_mask: [B, T], on the device; the mask covers the prompt alone.
        """
        return None

    def objective(self, step: Step) -> Tensor:
        """The loss of a micro-batch, a scalar: what the method's equation says."""
        return step.loss

    def end_task(self, task: TaskData) -> None:
        """Called when the task has been trained."""

    def state(self) -> dict[str, Tensor]:
        """What must outlive the process, beside the adapters and the router."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave; an empty one before the first task."""

    # --- what methods are made of ---

    @property
    def model(self) -> Any:
        """The run's model."""
        return self.bench.model

    @property
    def handle(self) -> Any:
        """The handle of the method on the run's model."""
        return self.bench.handle

    def freeze_router(self) -> None:
        """Leaves the query projection and the keys out of training."""
        self.handle.router.requires_grad_(False)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that a task trains."""
        return ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)

    def token_logits(self, batch: Mapping[str, Tensor], model: Any = None) -> tuple[Tensor, Tensor]:
        """Logits [N, V] and labels [N] of a batch's target tokens; `model` as in `forward`."""
        weights = self.mixture(batch["input_ids"], prompt_mask(batch, self.bench.causal))
        called = self.model if model is None else model
        outputs = forward(called, batch, weights, base=self.model, space=self.bench.space)
        return supervised(outputs.logits, batch["labels"], self.bench.causal)

    def token_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean token loss of a batch."""
        return F.cross_entropy(*self.token_logits(batch))


def options_from(name: str, config: type[Any], *names: str) -> type[Any]:
    """A dataclass of options that are fields of a method's config, with its defaults and checks.

    Args:
        name: of the dataclass.
        config: the config's class.
        names: of the fields.
    """
    chosen = [f for f in fields(config) if f.name in names]

    def check(options: Any) -> None:
        config(**{f.name: getattr(options, f.name) for f in chosen})

    return make_dataclass(
        name,
        [(f.name, f.type, field(default=f.default, metadata=f.metadata)) for f in chosen],
        namespace={
            "__doc__": f"Options that are fields of {config.__name__}.",
            "__post_init__": check,
        },
        frozen=True,
    )


def require(holds: bool, name: str, got: object, expected: str) -> None:
    """Raises ValueError, which `Strategy.options_of` puts the method's name before."""
    if not holds:
        raise ValueError(f"{name}: got {got!r}, expected {expected}")


def _like(default: Any, value: Any, name: str) -> Any:
    """`value` as the type of the option's default."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    number = number and abs(value) <= sys.float_info.max  # no NaN, no integer beyond floats
    if isinstance(default, bool):
        fits, expected = isinstance(value, bool), "True or False"
    elif isinstance(default, int):
        fits = number and value == int(value)
        expected = "a whole number"
    elif isinstance(default, float):
        fits, expected = number, "a number"
    else:
        fits, expected = isinstance(value, str), "a word"
    if not fits:
        raise ValueError(f"strategy_options: {name}: got {value!r}, expected {expected}")
    return type(default)(value)
