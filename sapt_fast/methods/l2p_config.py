"""The config of L2P."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sapt_fast.methods.concatenated import ConcatenatedConfig
from sapt_fast.methods.task_config import require

__all__ = ["L2PConfig"]

_CHOICES = ("sample", "batch", "random", "fixed")
_STARTS = ("uniform", "uniform01", "normal", "patches")
_KEYS = ("uniform", "uniform01", "queries")


@dataclass
class L2PConfig(ConcatenatedConfig[Any]):  # the handle's class depends on the model
    """The pool of prompts, and how texts or images pick from it.

    Of texts, `pooling`, `standardize_query` and `mask_padding` apply to the query; of images,
    `query_layer` and `query_pooling`. Other fields of LoRA and of SAPT's router have no effect.
    `prompt_length` is derived: `prompts * length`.

    `prompts=1, top=1` is one prompt that all inputs share.

    Raises:
        ValueError: if a value is out of range, or does not fit another one.

    Example:
        >>> from sapt_fast import L2PConfig
        >>> L2PConfig(prompts=10, top=4, length=10, strength=0.5).prompt_length
        100
        >>> L2PConfig(prompts=3)
        Traceback (most recent call last):
        ValueError: top: got 5, expected 1 to 3 (prompts)
    """

    prompts: int = field(default=10, metadata={"help": "M, number of prompts in the pool."})
    top: int = field(default=5, metadata={"help": "N, number of prompts per input."})
    length: int = field(default=5, metadata={"help": "L_p, number of rows of a prompt."})
    strength: float = field(
        default=0.1,
        metadata={"help": "lambda, weight of the loss that moves selected keys to their queries."},
    )
    diversified: bool = field(
        default=True,
        metadata={"help": "While training, prefer prompts that past tasks selected less often."},
    )
    choice: str = field(
        default="sample",
        metadata={
            "help": "Which prompts an input gets: 'sample', those of the nearest keys; 'batch', "
            "the N that most inputs of the batch would choose, in evaluation too; 'random', N "
            "drawn anew in each forward; or 'fixed', the first N."
        },
    )
    task_prompts: bool = field(
        default=False,
        metadata={
            "help": "While training, task t uses and trains prompts t * N to (t + 1) * N, as the "
            "original code's use_prompt_mask; prediction chooses among all."
        },
    )
    shared_pool_copy: bool = field(
        default=False,
        metadata={"help": "With task_prompts: a task's prompts start as a copy of the last's."},
    )
    centre_queries: bool = field(
        default=False,
        metadata={
            "help": "Subtract the mean query of the first task from all queries, so that not all "
            "inputs choose the same prompts; needs `start_from`."
        },
    )
    keys_start: str = field(
        default="uniform",
        metadata={
            "help": "Initialisation of the keys: 'uniform' in (-1, 1), 'uniform01' in (0, 1) as "
            "in the PyTorch port, or 'queries', random queries of the first task (`start_from`)."
        },
    )
    prompt_start: str | None = field(
        default=None,
        metadata={
            "help": "Initialisation of the prompts: 'uniform' in (-1, 1), 'uniform01' in (0, 1) as "
            "in the PyTorch port, 'normal' with standard deviation 0.02, or 'patches', normal with "
            "mean and deviation of the first task's patches (`start_from`, images only). None: "
            "'uniform' for images, random rows of the vocabulary for texts."
        },
    )
    layer: int = field(
        default=0,
        metadata={"help": "Images: the encoder layer before which prompts enter, from 0."},
    )
    head: str | None = field(
        default=None,
        metadata={
            "help": "Images: what the classifier reads: 'prompts', the mean of the prompts' "
            "outputs in place of CLS; or 'model', the model's own rule. None: 'prompts' if the "
            "model has a classifier."
        },
    )

    def __post_init__(self) -> None:
        for name in ("prompts", "top", "length"):
            value = getattr(self, name)
            require(type(value) is int and value >= 1, name, value, "an integer, at least 1")
        require(self.top <= self.prompts, "top", self.top, f"1 to {self.prompts} (prompts)")
        finite = 0 <= self.strength < float("inf")
        require(finite, "strength", self.strength, "a finite number, at least 0")
        for name in ("diversified", "task_prompts", "shared_pool_copy", "centre_queries"):
            value = getattr(self, name)
            require(isinstance(value, bool), name, value, "True or False")
        named = {
            "choice": _CHOICES,
            "keys_start": _KEYS,
            "prompt_start": (None, *_STARTS),
            "head": (None, "prompts", "model"),
        }
        for name, known in named.items():
            value = getattr(self, name)
            require(value in known, name, value, f"one of {known}")
        require(type(self.layer) is int and self.layer >= 0, "layer", self.layer, "at least 0")
        alone = self.task_prompts or not self.shared_pool_copy
        require(alone, "shared_pool_copy", True, "False without task_prompts")
        nearest = self.choice == "sample" or not self.task_prompts
        require(nearest, "task_prompts", True, f"False with choice={self.choice!r}")
        self.prompt_length = self.prompts * self.length
        super().__post_init__()

    @property
    def method(self) -> str:
        """The name of the method."""
        return "l2p"

    @property
    def looks_up(self) -> bool:
        """Whether keys and queries decide the choice."""
        return self.choice in ("sample", "batch")

    @property
    def needs_start(self) -> list[str]:
        """The fields whose values come from inputs of the first task, by `start_from`."""
        wanted = {
            "centre_queries": self.centre_queries,
            "keys_start='queries'": self.keys_start == "queries",
            "prompt_start='patches'": self.prompt_start == "patches",
        }
        return [name for name, needed in wanted.items() if needed]
