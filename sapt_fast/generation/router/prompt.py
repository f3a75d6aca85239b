"""The router by prompt: the model itself is asked how it would answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sapt_fast.generation.router.decision import Decision, require_question
from sapt_fast.generation.settings import SkeletonSettings
from sapt_fast.generation.skeleton import skeleton_of_thought

__all__ = ["PromptRouter"]

_REPLY_TOKENS = 8
_PROMPT = """\
Below is a question. Do not answer it. Decide which form suits its answer.

A: a list of points, each of which can be written without having read the other points.
B: a list of points or steps, some of which need the points before them.
C: no list of points.

Question: {question}

Reply with one letter, A, B or C."""
_REASONS = {
    "A": "the model says: independent points",
    "B": "the model says: points that need earlier ones",
    "C": "the model says: no list of points",
}
# One letter and the marks around it; anything else is not a choice.
_CHOICE = re.compile(r"[\s*_`\"'(\[]*([ABC])[\s*_`\"')\].:]*", re.IGNORECASE)


class PromptRouter:
    """Asks a language model whether a question can be answered in independent points.

    The reply must be one letter. Any other reply means ordinary decoding, and `Decision.reason`
    quotes it. The three choices are those of Skeleton-of-Thought (Ning et al., ICLR 2024, SoT-R).

    Args:
        ask: returns the model's reply to a prompt; `of_model` asks a model, by greedy search.

    Example:
        >>> from sapt_fast.generation.router.prompt import PromptRouter
        >>> router = PromptRouter(lambda prompt: "A.")
        >>> router.decide("How can I sleep better?").skeleton
        True
    """

    def __init__(self, ask: Callable[[str], str]) -> None:
        self.ask = ask

    @classmethod
    def of_model(cls, model: Any, tokenizer: Any) -> PromptRouter:
        """Returns the router that asks a model.

        Args:
            model, tokenizer: as in `skeleton_of_thought`; a `ServerModel` and None for a server.
        """
        short = SkeletonSettings(max_plain_tokens=_REPLY_TOKENS)

        def ask(prompt: str) -> str:
            return skeleton_of_thought(model, tokenizer, prompt, settings=short, mode="plain").text

        return cls(ask)

    def decide(self, question: str) -> Decision:
        """Returns the decision for one question; the score is None.

        Raises:
            TypeError, ValueError: if the question is not text, or blank.
        """
        require_question(question)
        reply = self.ask(_PROMPT.format(question=question.strip()))
        found = _CHOICE.fullmatch(reply)
        if found is None:
            return Decision(
                False, None, f"the model's reply is not A, B or C: {reply.strip()[:60]!r}"
            )
        choice = found.group(1).upper()
        return Decision(choice == "A", None, _REASONS[choice])
