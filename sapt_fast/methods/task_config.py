"""The config of methods with one adapter per task: SAPT and methods built on it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

from sapt_fast.methods.config import MethodConfig

__all__ = ["FIELDS", "TaskConfig", "list_names", "require", "require_fields"]

_Handle = TypeVar("_Handle")


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST_COUNT


def _number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # neither NaN nor an integer beyond floats


def _names(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    listed = isinstance(names, (list, tuple)) and len(names) > 0
    return value is None or (listed and all(isinstance(name, str) and name for name in names))


def _loss_weight(value: Any) -> bool:
    return _number(value) and 0 <= value <= _MOST


_MOST = 2**31 - 1  # far larger numbers would overflow in float16 or float32 without an error
_INITS, _KEY_INITS = ("linear", "normal"), ("uniform", "mean_query")
_ADAPTERS = ("lora", "prompt")
_QUERY_POOLINGS = (None, "cls", "mean")
_POOLINGS = ("mean", "max")  # as in ops.pool_tokens, which would be slow to import here
_FLAG = (lambda v: isinstance(v, bool), "True or False")
_MOST_COUNT = 2**16  # memory is reserved by these
_COUNT = (_count, f"an integer, at least 1 and at most {_MOST_COUNT}")
_WEIGHT = (lambda v: _number(v) and v >= 0, "a number, at least 0")
# The check of each field, and the words for what it expects.
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": _COUNT,
    "lora_alpha": (lambda v: _number(v) and 0 < v <= _MOST, f"a positive number, at most {_MOST}"),
    "lora_dropout": (lambda v: _number(v) and 0 <= v < 1, "[0, 1)"),
    "target_modules": (_names, "names, one regular expression, or None"),
    "modules_to_save": (_names, "names, or None"),
    "modules_per_task": _FLAG,
    "adapter": (lambda v: v in _ADAPTERS, f"one of {_ADAPTERS}"),
    "prompt_length": _COUNT,
    "query_hidden_dim": _COUNT,
    "query_init": (lambda v: v in _INITS, f"one of {_INITS}"),
    "temperature": (
        lambda v: v is None or (_number(v) and 1e-6 <= v <= _MOST),
        f"a number from 1e-6 to {_MOST}, or None",
    ),
    "pooling": (lambda v: v in _POOLINGS, f"one of {_POOLINGS}"),
    "standardize_query": _FLAG,
    "query_layer": (lambda v: v is None or _count(v), "an integer, at least 1, or None"),
    "query_pooling": (lambda v: v in _QUERY_POOLINGS, f"one of {_QUERY_POOLINGS}"),
    "key_init": (lambda v: v in _KEY_INITS, f"one of {_KEY_INITS}"),
    "own_key_loss": (_loss_weight, f"{_WEIGHT[1]} and at most {_MOST}"),
    "kl_ratio": (_loss_weight, f"{_WEIGHT[1]} and at most {_MOST}"),
    "mask_padding": _FLAG,
    "grad_through_frozen": _FLAG,
    "autocast_adapter_dtype": _FLAG,
    "top_k": (lambda v: v is None or _count(v), "an integer, at least 1, or None"),
    "threshold": (lambda v: v is None or (_number(v) and 0 <= v <= 1), "[0, 1] or None"),
    "reserve_tasks": _COUNT,
}


@dataclass
class TaskConfig(MethodConfig[_Handle]):
    """Shape, placement and routing of a model's adapters, one adapter per task.

    `SaptConfig` has an example. Methods that do not use a field ignore it.
    """

    r: int = field(default=8, metadata={"help": "Rank of each new adapter."})
    lora_alpha: float = field(
        default=32, metadata={"help": "Adapters are scaled by lora_alpha / r."}
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout rate on the adapters' input while training."}
    )
    target_modules: Sequence[str] | str | None = field(
        default=None,
        metadata={
            "help": "Linear layers to adapt: names (last parts of the path), one regular "
            "expression for the whole path, or 'all-linear' for all but the output head; None "
            "for query and value, as in PEFT."
        },
    )
    modules_to_save: Sequence[str] | None = field(
        default=None,
        metadata={
            "help": "Modules to train in full and save with the adapters, such as a "
            "classification head: names (last parts of the path); None for no module."
        },
    )
    modules_per_task: bool = field(
        default=False,
        metadata={
            "help": "Give each task its own copy of modules_to_save and mix the copies' outputs "
            "with the adapters' weights; otherwise all tasks train the same modules."
        },
    )
    adapter: str = field(
        default="lora",
        metadata={
            "help": "Kind of adapter: 'lora', a low-rank update of linear layers, or 'prompt', "
            "rows before the input embeddings (r, lora_alpha, grad_through_frozen and "
            "target_modules then have no effect)."
        },
    )
    prompt_length: int = field(
        default=10, metadata={"help": "Number of rows of each prompt, with adapter='prompt'."}
    )
    query_hidden_dim: int = field(
        default=100, metadata={"help": "Hidden size of the query projection."}
    )
    query_init: str = field(
        default="linear",
        metadata={
            "help": "Initialisation of the query projection: 'linear' (nn.Linear's default) or "
            "'normal' (standard deviation: the model's initializer_range)."
        },
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Divisor of the attention scores; None for sqrt(d)."}
    )
    pooling: str = field(
        default="mean",
        metadata={"help": "Pooling of the embeddings over the tokens: 'mean' or 'max'."},
    )
    standardize_query: bool = field(
        default=False,
        metadata={
            "help": "Standardise the pooled embedding by the mean and standard deviation of random "
            "token sequences, which makes inputs easier to distinguish."
        },
    )
    query_layer: int | None = field(
        default=None,
        metadata={
            "help": "For images: number of frozen layers that compute the query; None for all, and "
            "the last norm."
        },
    )
    query_pooling: str | None = field(
        default=None,
        metadata={
            "help": "For images: 'cls' or 'mean' (over the patches); None for 'cls' if the model "
            "has it."
        },
    )
    key_init: str = field(
        default="uniform",
        metadata={
            "help": "Initialisation of a task's key: 'uniform' in (-1, 1), or 'mean_query', the "
            "mean query of the task's first inputs."
        },
    )
    own_key_loss: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the own-key loss, -log(weight of the task's own adapter), which is "
            "added in training."
        },
    )
    kl_ratio: float = field(default=0.5, metadata={"help": "Weight of the reflection loss."})
    mask_padding: bool = field(default=True, metadata={"help": "Exclude padding from the pooling."})
    grad_through_frozen: bool = field(
        default=True,
        metadata={"help": "Pass gradients to inputs through earlier tasks' adapters."},
    )
    autocast_adapter_dtype: bool = field(
        default=False,
        metadata={
            "help": "Keep adapters, keys and router in float32 if the model's weights are "
            "float16 or bfloat16, like PEFT's option of this name; otherwise they have the "
            "weights' dtype."
        },
    )
    top_k: int | None = field(
        default=None, metadata={"help": "Keep only the k largest weights; None keeps all."}
    )
    threshold: float | None = field(
        default=None, metadata={"help": "Set weights below this value to zero; None keeps all."}
    )
    reserve_tasks: int = field(
        default=16,
        metadata={"help": "Number of tasks to preallocate; the pool doubles when full."},
    )

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range; converts names to lists, as in JSON."""
        require_fields(self, FIELDS)
        sparse = self.top_k is not None or self.threshold is not None
        require(
            not (self.own_key_loss and sparse), "own_key_loss", self.own_key_loss,
            "0 with top_k or threshold, which may remove the own adapter and its gradient",
        )  # fmt: skip
        if self.adapter == "prompt":
            for name, without in (("target_modules", None), ("lora_dropout", 0)):
                value = getattr(self, name)
                require(value == without, name, value, f"{without} with adapter='prompt'")
        list_names(self)
        require(
            not self.modules_per_task or self.modules_to_save is not None,
            "modules_per_task", True, "False without modules_to_save",
        )  # fmt: skip

    def adapter_dtype(self, base: torch.dtype) -> torch.dtype:
        """Returns the dtype of adapters, keys and router for base weights of dtype `base`."""
        import torch

        return torch.promote_types(base, torch.float32) if self.autocast_adapter_dtype else base


def require_fields(config: object, checks: Mapping[str, tuple[Callable[[Any], bool], str]]) -> None:
    """Raises ValueError unless each field of a config fits its check."""
    for name, (fits, expected) in checks.items():
        value = getattr(config, name)
        require(fits(value), name, value, expected)


def list_names(config: Any) -> None:
    """Converts `target_modules` and `modules_to_save` to lists, as in JSON."""
    if config.target_modules is not None and not isinstance(config.target_modules, str):
        config.target_modules = list(config.target_modules)
    named = config.modules_to_save
    if named is not None:
        config.modules_to_save = [named] if isinstance(named, str) else list(named)


def require(holds: bool, name: str, got: object, expected: str) -> None:
    """Raises ValueError with the field's name, value and expectation unless `holds`."""
    if not holds:
        raise ValueError(f"{name}: got {got!r}, expected {expected}")
