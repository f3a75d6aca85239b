"""Settings of a continual run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from sapt_fast.checks import MOST_SEED, require_choice, require_count, require_number
from sapt_fast.continual.registry import strategies
from sapt_fast.methods.task_config import TaskConfig

if TYPE_CHECKING:
    import torch

    from sapt_fast.methods.sapt import SaptConfig

__all__ = [
    "IMAGE_SETTINGS",
    "PRESETS",
    "ContinualSettings",
    "GeneratorSettings",
    "parse_values",
]

PRESETS = {
    f"{model}-{benchmark}": (model, benchmark)
    for model in ("t5", "llama")
    for benchmark in ("superni", "long_sequence")
}

# The settings of images alone, with their defaults. Runs of earlier versions lack them.
IMAGE_SETTINGS: dict[str, Any] = {
    "head": "own",
    "head_features": "method",
    "lda_shrinkage": 0.3,
    "ridge_strength": 10.0,
    "mask_classes": True,
    "augmentation": "none",
}
_HEADS = ("own", "ncm", "lda", "ridge")
_AUGMENTATIONS = ("none", "flip", "crop_flip")
_POSITIVE = ("learning_rate", "epochs", "save_steps", "label_temperature")
_POSITIVE_OR_NONE = ("key_learning_rate", "query_learning_rate")
_COUNTS = (
    "batch_size", "accumulation", "eval_batch_size", "max_source_length", "max_target_length",
)  # fmt: skip
_COUNTS_OR_NONE = ("steps", "replay_batch_size")
_BELOW_ONE = math.nextafter(1.0, 0.0)
_FLAGS = (
    "kl_per_micro_batch", "load_best", "bf16", "gradient_checkpointing", "progress", "mask_classes",
    "limit_pseudo_samples",
)  # fmt: skip


def _sapt_config() -> type[SaptConfig]:
    """SaptConfig, which comes with torch: the options of a command line need it not."""
    from sapt_fast.methods.sapt import SaptConfig

    return SaptConfig


@dataclass(frozen=True)
class GeneratorSettings:
    """How generators of pseudo-samples are trained and sampled.

    The defaults are those of the original SAPT code, which has no `max_length`, `tries` and
    `answers`.

    Raises:
        ValueError: if a value has another type or is out of range.
    """

    r: int = field(default=8, metadata={"help": "Rank of the generator's LoRA."})
    lora_alpha: float = field(
        default=32, metadata={"help": "The LoRA is scaled by lora_alpha / r."}
    )
    lora_dropout: float = field(default=0.1, metadata={"help": "Dropout on the LoRA's input."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Constant learning rate."})
    steps: int = field(default=5000, metadata={"help": "Optimizer steps."})
    batch_size: int = field(
        default=16, metadata={"help": "Rows of a training step, and samples generated together."}
    )
    max_length: int = field(default=512, metadata={"help": "Most tokens of a sample."})
    top_k: int = field(
        default=20, metadata={"help": "Sample from this many of the most likely tokens."}
    )
    repetition_penalty: float = field(
        default=2.5,
        metadata={"help": "Divisor of the scores of tokens that the sample already has."},
    )
    share: float = field(
        default=0.02, metadata={"help": "Samples to keep, as a fraction of the training rows."}
    )
    tries: int = field(
        default=4, metadata={"help": "Draw at most this many samples per sample wanted."}
    )
    answers: bool = field(
        default=False,
        metadata={"help": 'Also generate an answer after the input, as " __ans__ {output}".'},
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
        """Returns the settings with these values.

        Raises:
            ValueError: if a field is unknown or a value does not fit.
        """
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"generator: got unknown fields {unknown}")
        return cls(**values)


@dataclass
class ContinualSettings:
    """Settings of `run_continual`, the same for every task of a run.

    Raises:
        ValueError: if the strategy or an option of it is unknown, if a value has another type or
            is out of range, or if settings do not fit the strategy.
    """

    strategy: str = field(
        default="sapt",
        metadata={
            "help": "Continual-learning method: sapt, sapt_prompt, seqlora, joint, replay, "
            "generative_replay, ewc, lwf, olora, inflora, gainlora, sd_lora, epi, lfpt5, l2p, "
            "progprompt, or single (each task alone); of images: sapt, seqlora, joint, sd_lora, "
            "l2p, dualprompt, coda, head, ncm, lda, ridge, lda_experts, single."
        },
    )
    strategy_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Options of the strategy by name; others keep their defaults."},
    )
    sapt: TaskConfig[Any] = field(
        default_factory=lambda: _sapt_config()(),
        metadata={"help": "Settings of the adapters and the router."},
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "Constant learning rate."})
    key_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the newest key.", "default": "learning_rate"},
    )
    query_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the query projection.", "default": "learning_rate"},
    )
    epochs: float = field(default=10.0, metadata={"help": "Passes over each task's training rows."})
    steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps for each task, instead of epochs."}
    )
    batch_size: int = field(
        default=8, metadata={"help": "Rows of a micro-batch, summed over all processes."}
    )
    accumulation: int = field(
        default=4,
        metadata={"help": "Micro-batches whose gradients are added up for one optimizer step."},
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay."})
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "Clip gradients to this norm; 0 turns clipping off."}
    )
    max_source_length: int = field(
        default=512, metadata={"help": "Most tokens of a prompt; longer prompts are cut."}
    )
    instruction_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Keep this many tokens of the instruction, for an encoder.",
            "default": "all",
        },
    )
    label_temperature: float = field(
        default=0.05,
        metadata={"help": "Divisor of the cosines between an encoder's inputs and the labels."},
    )
    max_target_length: int = field(default=50, metadata={"help": "Most tokens of an answer."})
    replay: str = field(
        default="real",
        metadata={
            "help": "Earlier tasks' inputs for the reflection loss: 'real' (a share of the "
            "training inputs), 'none', 'generated' (pseudo-samples from a generator of each "
            "task), or a folder of pseudo-samples in the CL_Benchmark layout."
        },
    )
    generator: GeneratorSettings = field(
        default_factory=GeneratorSettings,
        metadata={"help": "Settings of the generators of replay 'generated'."},
    )
    replay_share: float = field(
        default=0.02,
        metadata={"help": "Fraction of a task's inputs kept for replay, at least one input."},
    )
    limit_pseudo_samples: bool = field(
        default=False,
        metadata={
            "help": "Keep replay_share of a task's number of inputs of its pseudo-samples too, "
            "drawn by the seed; otherwise all of them."
        },
    )
    replay_batch_size: int | None = field(
        default=None,
        metadata={"help": "Replayed rows of each task in a micro-batch.", "default": "batch_size"},
    )
    kl_per_micro_batch: bool = field(
        default=False,
        metadata={
            "help": "Add the whole reflection loss in every micro-batch, as the original SAPT code "
            "does."
        },
    )
    metric: str | None = field(
        default=None,
        metadata={"help": "'rouge_l' or 'exact_match'.", "default": "the benchmark's own"},
    )
    scored: str = field(
        default="test",
        metadata={"help": "Rows that are scored: 'test', or 'dev' to choose settings."},
    )
    eval_batch_size: int = field(default=16, metadata={"help": "Rows of a batch in evaluation."})
    save_steps: float = field(
        default=0.1,
        metadata={"help": "Steps between checkpoints; below 1, a fraction of the task's steps."},
    )
    load_best: bool = field(
        default=False,
        metadata={"help": "Keep the checkpoint with the lowest dev loss, not the last one."},
    )
    bf16: bool = field(default=False, metadata={"help": "Train under bfloat16 autocast."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass."}
    )
    head: str = field(
        default="own",
        metadata={
            "help": "Which head predicts the class of an image: 'own', the trained one, or one in "
            "closed form from statistics of the features: 'ncm' (nearest class mean), 'lda' or "
            "'ridge'."
        },
    )
    head_features: str = field(
        default="method",
        metadata={
            "help": "Features of a head in closed form: 'method', those of the trained model when "
            "each task had been learned, or 'frozen', those of the base model."
        },
    )
    lda_shrinkage: float = field(
        default=0.3, metadata={"help": "Shrinkage of the covariance of head 'lda', 0 to 1."}
    )
    ridge_strength: float = field(
        default=10.0, metadata={"help": "Strength of the penalty of head 'ridge'."}
    )
    mask_classes: bool = field(
        default=True,
        metadata={
            "help": "For images, train on the logits of the task's own classes alone; prediction "
            "uses those of all classes."
        },
    )
    augmentation: str = field(
        default="none",
        metadata={"help": "Of training images: 'none', 'flip', or 'crop_flip' (a random part)."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of all random choices."})
    device: str | None = field(
        default=None, metadata={"help": "'cpu' or 'cuda'.", "default": "cuda if there is a GPU"}
    )
    progress: bool = field(default=True, metadata={"help": "Show progress bars."})

    def __post_init__(self) -> None:
        kinds = strategies()
        require_choice("strategy", self.strategy, kinds)
        kind = kinds[self.strategy]
        options = asdict(kind.options_of(self.strategy, self.strategy_options))
        # As in JSON, so that settings equal those that are read again.
        self.strategy_options = {
            name: [*value] if isinstance(value, tuple) else value for name, value in options.items()
        }
        require_choice("metric", self.metric, (None, "rouge_l", "exact_match"))
        require_choice("scored", self.scored, ("test", "dev"))
        require_choice("device", self.device, (None, "cpu", "cuda"))
        require_choice("head", self.head, _HEADS)
        require_choice("head_features", self.head_features, ("method", "frozen"))
        require_choice("augmentation", self.augmentation, _AUGMENTATIONS)
        require_number("lda_shrinkage", self.lda_shrinkage, most=1)
        require_number("ridge_strength", self.ridge_strength)
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
        """Returns the hyperparameters of the original SAPT code, quirks included.

        Its LLaMA runs used four GPUs with two rows each; here that is one micro-batch of eight.

        Args:
            model: "t5" or "llama".
            benchmark: "superni" or "long_sequence".

        Raises:
            ValueError: if there are no such settings.
        """
        config = _sapt_config().official(model, benchmark)
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
        """Makes settings from a preset and values by name.

        Args:
            preset: a name in `PRESETS`; None for the defaults.
            **values: fields of ContinualSettings or SaptConfig, which override the preset; None
                keeps the preset's value.

        Raises:
            ValueError: if the preset or a field is unknown, or a value does not fit.

        Example:
            >>> ContinualSettings.of("t5-superni", r=8, steps=100).sapt.r
            8
        """
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"preset: got {preset!r}, expected one of {', '.join(PRESETS)}")
        base = cls() if preset is None else cls.official(*PRESETS[preset])
        return base.but(**values)

    def but(self, **values: Any) -> ContinualSettings:
        """Returns a copy of these settings with other values.

        Args:
            **values: fields of ContinualSettings or SaptConfig; None keeps a field's value. With
                another `strategy`, its options start from their defaults.

        Raises:
            ValueError: if a field is unknown or a value does not fit.
        """
        given = {name: value for name, value in values.items() if value is not None}
        unknown = sorted(set(given) - set(self.names()))
        if unknown:
            raise ValueError(f"ContinualSettings: got unknown fields {unknown}")
        if given.get("strategy", self.strategy) != self.strategy:
            given.setdefault("strategy_options", {})
        router = {f.name for f in fields(TaskConfig)}
        config = replace(self.sapt, **{n: v for n, v in given.items() if n in router})
        return replace(self, sapt=config, **{n: v for n, v in given.items() if n not in router})

    def autocast(self, device: torch.device) -> torch.autocast:
        """The autocast of training, for forwards other than generation: bfloat16 if `bf16`."""
        import torch

        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)

    @classmethod
    def names(cls) -> list[str]:
        """Returns the field names that `of` accepts."""
        own = [f.name for f in fields(cls) if f.name != "sapt"]
        return own + [f.name for f in fields(TaskConfig)]

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dict, from which `from_dict` makes equal settings."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ContinualSettings:
        """Returns the settings of a dict from `to_dict`.

        Raises:
            ValueError: if a field is unknown or a value does not fit.
        """
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"ContinualSettings: got unknown fields {unknown}")
        return cls(**{**values, "sapt": _sapt_config().from_dict(values["sapt"])})


def parse_values(texts: Iterable[str], option: str) -> dict[str, Any]:
    """Reads the NAME=VALUE texts of a command line as JSON.

    Args:
        texts: each "NAME=VALUE"; values that are not valid JSON are kept as strings.
        option: the option's name, for the error.

    Raises:
        ValueError: if a text has no "=" or no name, a name is given twice, or a value is a number
            that is too long or nested too deep.

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
            raise ValueError(
                f"{option}: {name}: got a value that is nested too deep or too long"
            ) from error
    return values
