"""What `model.mome` says about facts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sapt_fast.methods.edits.inputs import as_text

__all__ = ["Fact", "Memorised", "Recalled"]


@dataclass(frozen=True)
class Fact:
    """One fact that is memorised.

    Attributes:
        fact: its number.
        prompt, target: their tokens.
        experts: the experts that were trained on it.
    """

    fact: int
    prompt: tuple[int, ...]
    target: tuple[int, ...]
    experts: tuple[int, ...]
    _tokenizer: Any = field(default=None, repr=False, compare=False)

    @property
    def text(self) -> tuple[str, str]:
        """Prompt and target as text.

        Raises:
            ValueError: if the handle has no tokenizer.
        """
        return as_text(self._tokenizer, self.prompt, self.target, "model.mome.tokenizer")


@dataclass(frozen=True)
class Memorised:
    """The result of `memorise`.

    Attributes:
        facts: the number of each fact, in the order in which they were given.
        losses: the mean cross-entropy of each fact's target; NaN for a fact that was there before.
        unfitted: the numbers of facts that training did not reach: the loss is larger than `until`,
            or a token of the target is not the likeliest. They keep their experts.
        epochs: the largest number of passes over a fact.
        collisions: the share of facts with an expert that another fact has, in the whole memory.
        seconds: the time that it took, without what an interruption lost.
    """

    facts: list[int]
    losses: list[float]
    unfitted: list[int]
    epochs: int
    collisions: float
    seconds: float


@dataclass(frozen=True)
class Recalled:
    """What a memory finds for a prompt.

    Attributes:
        fact: the number of the fact whose key is nearest; None without facts, or with keys that
            belong to experts.
        score: of the best key; minus infinity without keys.
        acts: whether it is large enough for the experts to act.
        experts: those found, best first.
        weights: of these.
    """

    fact: int | None
    score: float
    acts: bool
    experts: tuple[int, ...]
    weights: tuple[float, ...]
