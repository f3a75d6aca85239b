"""Settings of a sequential run."""

from __future__ import annotations

from dataclasses import dataclass, field

from sapt_fast.checks import MOST_SEED, require_count

__all__ = ["EditingSettings"]


@dataclass(frozen=True)
class EditingSettings:
    """How edits are made, one after another, and how often the model is measured and saved.

    Raises:
        ValueError: if a value is out of range.
    """

    batch: int = field(default=1, metadata={"help": "Edits that are made together."})
    limit: int | None = field(
        default=None, metadata={"help": "Make the first N edits only.", "default": "all"}
    )
    order_seed: int | None = field(
        default=None,
        metadata={
            "help": "Seed by which the edits are shuffled first.",
            "default": "the order of the file",
        },
    )
    every: int = field(
        default=50, metadata={"help": "Measure after every N edits; at the end in any case."}
    )
    save_every: int = field(default=10, metadata={"help": "Save the run after every N edits."})
    eval_batch: int = field(default=32, metadata={"help": "Prompts that are answered together."})
    answer_tokens: int = field(
        default=16,
        metadata={
            "help": "The largest number of tokens of an answer; longer if a target is longer."
        },
    )
    teacher_forcing: bool = field(
        default=True,
        metadata={"help": "Also compute the metrics by teacher forcing, at twice the time."},
    )
    window: int = field(
        default=512, metadata={"help": "Tokens of the windows in which perplexity is computed."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of what methods draw at random."})

    def __post_init__(self) -> None:
        for name in ("batch", "every", "save_every", "eval_batch", "answer_tokens"):
            require_count(name, getattr(self, name))
        require_count("window", self.window, least=2)
        require_count("seed", self.seed, least=0, most=MOST_SEED)
        if self.limit is not None:
            require_count("limit", self.limit)
        if self.order_seed is not None:
            require_count("order_seed", self.order_seed, least=0, most=MOST_SEED)
