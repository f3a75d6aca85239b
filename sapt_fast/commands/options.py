"""Options of the command line, made from the fields of dataclasses.

A field gives its option the name, the type, the default and the help text. The tables below hold
what only the command line has: headings, more names, and fields whose value is given as text.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer

__all__ = ["PANELS", "given", "is_from_file", "is_given", "option", "with_fields"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

# The options of `train` and `compare` under their headings, in the order of the help.
PANELS: dict[str, tuple[str, ...]] = {
    "Data": ("benchmark", "data", "order", "orders", "tasks", "dev", "max_train", "max_eval"),
    "Images": (
        "split", "classes_per_task", "class_order", "image_size", "convert_images", "augmentation",
        "mask_classes", "head", "head_features", "lda_shrinkage", "ridge_strength", "query_layer",
        "query_pooling",
    ),
    "Training": (
        "strategy", "strategy_options", "strategies", "seeds", "preset", "values", "fwt", "alone",
        "learning_rate", "key_learning_rate", "query_learning_rate", "epochs", "steps",
        "batch_size", "accumulation", "weight_decay", "max_grad_norm", "max_source_length",
        "instruction_tokens", "label_temperature", "max_target_length", "save_steps", "load_best",
        "metric", "scored", "eval_batch_size", "seed",
    ),
    "Adapters and router": (
        "adapter", "prompt_length", "r", "lora_alpha", "lora_dropout", "target_modules",
        "autocast_adapter_dtype", "pooling", "standardize_query", "temperature", "key_init",
        "own_key_loss",
    ),
    "Replay": (
        "kl_ratio", "replay", "generator", "replay_share", "limit_pseudo_samples",
        "replay_batch_size",
    ),
    "Machine": (
        "resume", "tensorboard", "device", "dtype", "attention", "bf16", "gradient_checkpointing",
        "progress",
    ),
}  # fmt: skip

_NAMES = {
    "strategy_options": ("--strategy-option",),
    "learning_rate": ("--learning-rate", "--lr"),
    "r": ("--r",),
    "lora_alpha": ("--alpha",),
    "lora_dropout": ("--dropout",),
    "replay": ("--replay", "--replay-source"),
}
_TYPES: dict[str, Any] = {
    "data": Path,
    "strategy_options": list[str],
    "generator": list[str],
    "target_modules": str,
}
_HELP = {
    "strategy_options": "NAME=VALUE, an option of the strategy, such as strength=100; may be "
    "repeated.",
    "generator": "NAME=VALUE, a setting of the generators, such as steps=5000; may be repeated.",
    "target_modules": "Names of the linear layers to adapt, separated by commas.",
}
_DEFAULTS = {"benchmark": "superni", "dev": None}
# The meaning of a default of None; other fields name it in their metadata, as "default".
_SHOWN = {
    "dev": "from_train; released with --preset",
    "target_modules": "query and value",
}


def option(help: str, *names: str, panel: str | None = None, default: str | None = None) -> Any:
    """Returns an option of a command.

    Args:
        help: its help text.
        names: "--name" and others; by default made from the parameter's name.
        panel: the heading in the help.
        default: shown as the default, if it is not the parameter's own.
    """
    shown = True if default is None else default
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=shown)


def with_fields(
    names: Iterable[str], *classes: type, panels: Mapping[str, Sequence[str]] | None = None
) -> Callable[[_Function], _Function]:
    """A decorator that replaces `**values` of a command by options made from dataclass fields.

    Args:
        names: the fields to offer; those that the command declares itself are left to it.
        classes: the dataclasses; a field that several have is taken from the first one.
        panels: names by heading; they order all options of the command.
    """
    panel_of = {name: panel for panel, listed in (panels or {}).items() for name in listed}
    places = {name: place for place, name in enumerate(panel_of)}
    hints = [get_type_hints(kind) for kind in classes]

    def made(name: str) -> inspect.Parameter:
        for kind, types in zip(classes, hints, strict=True):
            for field in dataclasses.fields(kind):
                if field.name == name:
                    return _parameter(field, types[name], panel_of.get(name))
        raise ValueError(f"names: got {name!r}, which no dataclass has")

    def decorate(function: _Function) -> _Function:
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(function, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        declared = {parameter.name for parameter in own}
        parameters = [*(made(name) for name in names if name not in declared), *own]
        parameters.sort(key=lambda parameter: places.get(parameter.name, -1))
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return function

    return decorate


def _parameter(field: dataclasses.Field[Any], hint: Any, panel: str | None) -> inspect.Parameter:
    name = field.name
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    default = None if field.default is dataclasses.MISSING else field.default
    default = _DEFAULTS.get(name, default)
    kind = _TYPES.get(name, hint)
    if not required and default is None and NoneType not in get_args(kind):
        kind = kind | None
    info = option(
        _HELP.get(name, field.metadata["help"]),
        *_NAMES.get(name, ()),
        panel=panel,
        default=_SHOWN.get(name, field.metadata.get("default")),
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required and name not in _DEFAULTS else default,
        annotation=Annotated[kind, info],
    )


def is_given(context: typer.Context, name: str) -> bool:
    """Returns whether the command line has the option."""
    return _source(context, name) == "COMMANDLINE"


def is_from_file(context: typer.Context, name: str) -> bool:
    """Returns whether the file of --config has the option, and the command line does not."""
    return _source(context, name) == "DEFAULT_MAP"


def given(context: typer.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of `values` that the command line or the file of --config sets."""
    return {
        name: value
        for name, value in values.items()
        if value is not None and (is_given(context, name) or is_from_file(context, name))
    }


def _source(context: typer.Context, name: str) -> str | None:
    source = context.get_parameter_source(name)
    return None if source is None else source.name
