"""The base class of the methods of continual learning."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from sapt_fast.continual.data.rows import TaskData
from sapt_fast.continual.objective import Step, forward, routed_inputs, supervised
from sapt_fast.continual.reflection import Replay
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.workbench import Workbench
from sapt_fast.methods.task_config import TaskConfig

__all__ = ["NoOptions", "Strategy", "options_from", "require"]


@dataclass(frozen=True)
class NoOptions:
    """The options of a method without options."""


class Strategy:
    """One method: which adapters a task trains, which terms its loss adds, which adapters predict.

    Model, trainer and loop are the same for all methods. The loop creates an instance for a run.
    For each task, it calls `begin_task`; then `reflection`, `mixture`, `objective` and `after_step`
    in training; then `end_task`; and `mixture` for every batch in prediction. What a method stores
    in addition to the adapters is saved in each checkpoint by `state` and `load_state`.

    Args:
        bench: the run's model, tokenizer and settings.
        options: an instance of `Options`.

    Attributes:
        Options: dataclass of the method's own settings.
        alone: whether every task starts from the base model and is scored only on itself.
        together: whether all tasks are learned at once, in one stage.
        pseudo: whether the method trains on the inputs of earlier tasks that `settings.replay`
            keeps.
        routes: whether each input selects among adapters, one per task.
        trains: whether a task trains parameters at all.
        head: the head that predicts, instead of `settings.head`; for images.
        own_classes_only: whether the adapter with the largest weight predicts among the classes of
            its task alone; for images.
        data: "text" and "images", the data that the method supports.
        generates: whether the model must generate text, so that encoders are not supported.
    """

    Options: ClassVar[Any] = NoOptions
    alone: ClassVar[bool] = False
    together: ClassVar[bool] = False
    pseudo: ClassVar[bool] = False
    routes: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    head: ClassVar[str | None] = None
    own_classes_only: ClassVar[bool] = False
    data: ClassVar[tuple[str, ...]] = ("text",)

    def __init__(self, bench: Workbench, options: Any) -> None:
        self.bench, self.options = bench, options

    @classmethod
    def options_of(cls, name: str, values: Mapping[str, Any]) -> Any:
        """Builds the `Options` from values.

        Args:
            name: the strategy's name, for messages.
            values: option values by name; missing options have their defaults.

        Raises:
            ValueError: if an option is unknown.
            ValueError: if a value has another type or is out of range.
        """
        known = {field.name: field for field in fields(cls.Options)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"strategy_options: got {', '.join(map(repr, unknown))}, which {name!r} does not "
                f"have, expected among: {', '.join(known) or 'none'}"
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

    @classmethod
    def adds_to_loss(cls, options: Any) -> bool:
        """Returns whether `objective` is more than the token loss.

        Args:
            options: an instance of `Options`.
        """
        return cls.objective is not Strategy.objective

    def configure(self, config: TaskConfig[Any]) -> Any:
        """Returns the config with which the model is patched, from the requested one."""
        return config

    @classmethod
    def check(cls, settings: ContinualSettings) -> None:
        """Raises ValueError if settings do not fit the method."""

    # --- what a method does ---

    def begin_task(self, task: TaskData, learned: Sequence[TaskData]) -> None:
        """Prepares the patched model for training on a task.

        Args:
            task: the new task.
            learned: the earlier tasks, in learning order.
        """
        raise NotImplementedError

    def reflection(self, learned: Sequence[TaskData]) -> list[Replay]:
        """Returns the inputs and targets of SAPT's reflection loss.

        Args:
            learned: the earlier tasks, in learning order.
        """
        return []

    def mixture(self, inputs: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """Returns the adapters' weights, [B, K] or [1, K] for all inputs; None for the router's.

        Args:
            inputs: token ids [B, T], or images [B, C, H, W]; on the device.
            attention_mask: [B, T], covers only the prompt; None for images.
        """
        return None

    def objective(self, step: Step) -> Tensor:
        """Returns the loss of a micro-batch, a scalar, by the method's equation."""
        return step.loss

    def after_step(self) -> None:
        """Changes parameters after an optimizer step, before the model is evaluated or saved."""

    def end_task(self, task: TaskData) -> None:
        """Ends the training of a task."""

    def state(self) -> dict[str, Tensor]:
        """Returns the tensors to save in addition to the adapters and the router, by name."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state` returned; the state is empty before the first task."""

    # --- helpers of the methods ---

    @property
    def model(self) -> Any:
        """The run's model."""
        return self.bench.model

    @property
    def handle(self) -> Any:
        """The handle of the method on the run's model."""
        return self.bench.handle

    def freeze_router(self) -> None:
        """Freezes the query projection and the keys."""
        self.handle.router.requires_grad_(False)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the names and parameters that a task trains."""
        return ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)

    def token_logits(self, batch: Mapping[str, Tensor], model: Any = None) -> tuple[Tensor, Tensor]:
        """Returns logits [N, V] and labels [N] of a batch's N target tokens.

        Args:
            batch: `input_ids` and `attention_mask` [B, T], `labels` [B, T'].
            model: the model to call, as in `forward`; None for the run's model.
        """
        weights = self.mixture(*routed_inputs(batch, self.bench.causal))
        called = self.model if model is None else model
        outputs = forward(called, batch, weights, base=self.model, space=self.bench.space)
        return supervised(outputs.logits, batch["labels"], self.bench.causal)

    def token_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the mean token loss of a batch, a scalar."""
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
    """Raises ValueError unless `holds`; `Strategy.options_of` prepends the method's name."""
    if not holds:
        raise ValueError(f"{name}: got {got!r}, expected {expected}")


def _like(default: Any, value: Any, name: str) -> Any:
    """Converts a value to the type of the option's default."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    number = number and abs(value) <= sys.float_info.max  # neither NaN nor too large for a float
    if isinstance(default, bool):
        fits, expected = isinstance(value, bool), "True or False"
    elif isinstance(default, int):
        fits = number and value == int(value)
        expected = "a whole number"
    elif isinstance(default, float):
        fits, expected = number, "a number"
    elif isinstance(default, (list, tuple)):
        if isinstance(value, (list, tuple)) and all(type(part) is int for part in value):
            return tuple(value)
        fits, expected = False, "a list of whole numbers"
    elif default is None:
        if value is None or isinstance(value, str):
            return value
        fits, expected = False, "a string, or null"
    else:
        fits, expected = isinstance(value, str), "a string"
    if not fits:
        raise ValueError(f"strategy_options: {name}: got {value!r}, expected {expected}")
    return type(default)(value)
