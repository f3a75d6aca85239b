"""What a continual run is asked to do."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

from sapt_fast.checks import MOST_SEED, require_choice, require_count, require_number
from sapt_fast.continual.registry import strategies
from sapt_fast.methods.sapt import SaptConfig

__all__ = ["PRESETS", "ContinualSettings", "GeneratorSettings", "differences", "parse_values"]

PRESETS = {
    f"{model}-{benchmark}": (model, benchmark)
    for model in ("t5", "llama")
    for benchmark in ("superni", "long_sequence")
}

_METRICS = (None, "rouge_l", "exact_match")
_DEVICES = (None, "cpu", "cuda")
# These change where and how a run computes, not what it comes to.
_FREE = ("device", "progress")
_POSITIVE = ("learning_rate", "epochs", "save_steps", "label_temperature")
_POSITIVE_OR_NONE = ("key_learning_rate", "query_learning_rate")
_COUNTS = (
    "batch_size", "accumulation", "eval_batch_size", "max_source_length", "max_target_length",
)  # fmt: skip
_COUNTS_OR_NONE = ("steps", "replay_batch_size")
_BELOW_ONE = math.nextafter(1.0, 0.0)
_FLAGS = ("kl_per_micro_batch", "load_best", "bf16", "gradient_checkpointing", "progress")


@dataclass(frozen=True)
class GeneratorSettings:
    """How generators of pseudo-samples are trained and sampled; the defaults are the release's.

    `max_length`, `tries` and `answers` are ours.
    """

    r: int = field(default=8, metadata={"help": "Rank of the generator's LoRA."})
    lora_alpha: float = field(default=32, metadata={"help": "Scaling is lora_alpha / r."})
    lora_dropout: float = field(default=0.1, metadata={"help": "Dropout before the LoRA."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate, constant."})
    steps: int = field(default=5000, metadata={"help": "Optimizer steps."})
    batch_size: int = field(
        default=16, metadata={"help": "Rows of a step, and samples drawn together."}
    )
    max_length: int = field(default=512, metadata={"help": "Tokens of a sample."})
    top_k: int = field(default=20, metadata={"help": "Likeliest tokens that are sampled from."})
    repetition_penalty: float = field(
        default=2.5, metadata={"help": "Divisor of the scores of tokens that were there before."}
    )
    share: float = field(
        default=0.02, metadata={"help": "Samples kept, as a share of the training rows."}
    )
    tries: int = field(
        default=4, metadata={"help": "Draw at most so many times the samples that are kept."}
    )
    answers: bool = field(
        default=False, metadata={"help": 'Generate " __ans__ {output}" after the input too.'}
    )

    def __post_init__(self) -> None:
        for name in ("r", "steps", "batch_size", "max_length", "top_k", "tries"):
            require_count(f"generator.{name}", getattr(self, name))
        for name in ("lora_alpha", "learning_rate", "repetition_penalty"):
            require_number(f"generator.{name}", getattr(self, name), positive=True)
        require_number("generator.lora_dropout", self.lora_dropout, most=_BELOW_ONE)
        require_number("generator.share", self.share, most=1, positive=True)
        require_choice("generator.answers", self.answers, (True, False))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GeneratorSettings:
        """Raises ValueError on an unknown field."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"generator: got unknown fields {unknown}")
        return cls(**values)


@dataclass
class ContinualSettings:
    """Settings of `run_continual`, the same for every task of a run."""

    strategy: str = field(
        default="sapt",
        metadata={"help": "The method, a name in continual.strategies.STRATEGIES."},
    )
    strategy_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Options of the method by name; what is not given is its default."},
    )
    sapt: SaptConfig = field(
        default_factory=SaptConfig, metadata={"help": "Adapters and router of the model."}
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate, constant."})
    key_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the key; none for learning_rate."}
    )
    query_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the query projection; none for learning_rate."},
    )
    epochs: float = field(default=10.0, metadata={"help": "Passes over each task's rows."})
    steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps for each task, in place of epochs."}
    )
    batch_size: int = field(
        default=8, metadata={"help": "Rows of a micro-batch, over all processes."}
    )
    accumulation: int = field(
        default=4, metadata={"help": "Micro-batches whose gradients make one optimizer step."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay."})
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "Clip gradients to this norm; 0 for no clipping."}
    )
    max_source_length: int = field(default=512, metadata={"help": "Tokens of a prompt."})
    instruction_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens of the instruction that an encoder reads; none for all."},
    )
    label_temperature: float = field(
        default=0.05,
        metadata={"help": "Divisor of the cosines by which an encoder matches labels."},
    )
    max_target_length: int = field(default=50, metadata={"help": "Tokens of an answer."})
    replay: str = field(
        default="real",
        metadata={
            "help": "Inputs for the reflection loss: 'real' (a share of the training inputs), "
            "'none', 'generated' (pseudo-samples by a generator for each task), or a folder of "
            "pseudo-samples in the CL_Benchmark layout."
        },
    )
    generator: GeneratorSettings = field(
        default_factory=GeneratorSettings,
        metadata={"help": "Training and sampling of the generators for replay 'generated'."},
    )
    replay_share: float = field(
        default=0.02, metadata={"help": "Share of a task's inputs kept for replay; at least one."}
    )
    replay_batch_size: int | None = field(
        default=None,
        metadata={"help": "Replayed rows of each task per micro-batch; none for batch_size."},
    )
    kl_per_micro_batch: bool = field(
        default=False,
        metadata={"help": "Add the whole reflection loss in every micro-batch, as released."},
    )
    metric: str | None = field(
        default=None,
        metadata={"help": "'rouge_l' or 'exact_match'; none for the benchmark's own."},
    )
    scored: str = field(
        default="test", metadata={"help": "Rows that are scored; 'dev' to choose settings by."}
    )
    eval_batch_size: int = field(default=16, metadata={"help": "Rows of a batch in evaluation."})
    save_steps: float = field(
        default=0.1,
        metadata={
            "help": "Steps between checkpoints within a task; below 1, a share of its steps."
        },
    )
    load_best: bool = field(
        default=False,
        metadata={"help": "Keep the checkpoint with the least loss on dev, not the last one."},
    )
    bf16: bool = field(default=False, metadata={"help": "Train under bfloat16 autocast."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of everything that is drawn."})
    device: str | None = field(
        default=None, metadata={"help": "'cpu' or 'cuda'; none for a GPU where there is one."}
    )
    progress: bool = field(default=True, metadata={"help": "Show progress bars."})

    def __post_init__(self) -> None:
        kinds = strategies()
        require_choice("strategy", self.strategy, kinds)
        kind = kinds[self.strategy]
        self.strategy_options = asdict(kind.options_of(self.strategy, self.strategy_options))
        require_choice("metric", self.metric, _METRICS)
        require_choice("scored", self.scored, ("test", "dev"))
        require_choice("device", self.device, _DEVICES)
        for name in _FLAGS:
            require_choice(name, getattr(self, name), (True, False))
        for name in (*_COUNTS, *_COUNTS_OR_NONE):
            value = getattr(self, name)
            if value is not None or name in _COUNTS:
                require_count(name, value)
        for name in (*_POSITIVE, *_POSITIVE_OR_NONE):
            value = getattr(self, name)
            if value is not None or name in _POSITIVE:
                require_number(name, value, positive=True)
        for name in ("weight_decay", "max_grad_norm"):
            require_number(name, getattr(self, name))
        if self.instruction_tokens is not None:
            require_count("instruction_tokens", self.instruction_tokens, least=0)
        require_count("seed", self.seed, least=0, most=MOST_SEED)
        if isinstance(self.generator, Mapping):
            self.generator = GeneratorSettings.from_dict(self.generator)
        if not isinstance(self.replay, str) or not self.replay or "\0" in self.replay:
            raise ValueError(
                f"replay: got {self.replay!r}, expected 'real', 'generated', 'none' or a folder"
            )
        require_number("replay_share", self.replay_share, most=1, positive=True)
        kind.check(self)

    @classmethod
    def official(cls, model: str, benchmark: str) -> ContinualSettings:
        """The released hyperparameters, quirks included.

        The LLaMA runs used four GPUs with two rows each; here that is one micro-batch of eight.

        Args:
            model: "t5" or "llama".
            benchmark: "superni" or "long_sequence".

        Raises:
            ValueError: there is no such preset.
        """
        config = SaptConfig.official(model, benchmark)
        epochs = {
            ("t5", "superni"): 100,
            ("t5", "long_sequence"): 10,
            ("llama", "superni"): 50,
            ("llama", "long_sequence"): 20,
        }[model, benchmark]
        long_t5 = (model, benchmark) == ("t5", "long_sequence")
        return cls(
            sapt=config,
            learning_rate=3e-4 if model == "t5" else 5e-5,
            epochs=epochs,
            batch_size=16 if long_t5 else 8,
            accumulation=2 if long_t5 else 4,
            max_source_length=512 if model == "t5" else 1024,
            kl_per_micro_batch=True,
            save_steps=5 / epochs,
            load_best=True,
            bf16=True,
        )

    @classmethod
    def of(cls, preset: str | None = None, **values: Any) -> ContinualSettings:
        """Settings by name, those of the adapters and the router among them.

        Args:
            preset: where to start: None for the defaults, or a name in `PRESETS`.
            **values: fields of ContinualSettings or SaptConfig; None leaves one as it is.

        Raises:
            ValueError: an unknown preset or field, or a value that does not fit.

        Example:
            >>> ContinualSettings.of("t5-superni", r=8, steps=100).sapt.r
            8
        """
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"preset: got {preset!r}, expected one of {', '.join(PRESETS)}")
        base = cls() if preset is None else cls.official(*PRESETS[preset])
        return base.but(**values)

    def but(self, **values: Any) -> ContinualSettings:
        """These settings with other values; arguments and errors as `of`.

        The options of another strategy start from its defaults.
        """
        given = {name: value for name, value in values.items() if value is not None}
        unknown = sorted(set(given) - set(self.names()))
        if unknown:
            raise ValueError(f"ContinualSettings: got unknown fields {unknown}")
        if given.get("strategy", self.strategy) != self.strategy:
            given.setdefault("strategy_options", {})
        router = {f.name for f in fields(SaptConfig)}
        config = replace(self.sapt, **{n: v for n, v in given.items() if n in router})
        return replace(self, sapt=config, **{n: v for n, v in given.items() if n not in router})

    def autocast(self, device: torch.device) -> torch.autocast:
        """The bfloat16 autocast of training, or none, for forwards that are not of generation."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)

    @classmethod
    def names(cls) -> list[str]:
        """What `of` takes."""
        own = [f.name for f in fields(cls) if f.name != "sapt"]
        return own + [f.name for f in fields(SaptConfig)]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_dict` gives the settings back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ContinualSettings:
        """Raises ValueError on an unknown field."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"ContinualSettings: got unknown fields {unknown}")
        return cls(**{**values, "sapt": SaptConfig.from_dict(values["sapt"])})


def differences(stored: Any, asked: Mapping[str, Any]) -> list[str]:
    """What differs between two JSON-ready descriptions of a run, one line for each entry.

    A field of SaptConfig that the stored one lacks came later and had its default then; a digest
    that it lacks is not compared.
    """
    if not isinstance(stored, Mapping):
        return [f"got {str(stored)[:80]!r} there, expected entries by name"]
    before, now = _flat(stored), _flat(asked)
    for name, value in _flat({"sapt": SaptConfig().to_dict()}).items():
        for place in (name, f"settings.{name}"):
            if place in now:
                before.setdefault(place, value)
    ignored = {name for name in {**before, **now} if name.split(".")[-1] in _FREE}
    ignored |= {name for name in now if name.split(".")[-1] == "digest" and name not in before}
    return [
        f"{name}: {before.get(name, 'absent')!r} there, {now.get(name, 'absent')!r} now"
        for name in {**before, **now}
        if before.get(name, ...) != now.get(name, ...) and name not in ignored
    ]


def parse_values(texts: Iterable[str], option: str) -> dict[str, Any]:
    """NAME=VALUE texts of a command line; a value that is no JSON is a word.

    Args:
        option: their name, for the error.

    Raises:
        ValueError: a text without "=" or a name, or a name given twice.

    Example:
        >>> parse_values(["strength=100", "buffer=reservoir"], "strategy-option")
        {'strength': 100, 'buffer': 'reservoir'}
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name or name in values:
            raise ValueError(f"{option}: got {text!r}, expected NAME=VALUE, each name once")
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            values[name] = value.strip()
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{option}: {name}: got a value that is no JSON of ours") from error
    return values


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
