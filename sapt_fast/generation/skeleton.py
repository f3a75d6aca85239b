"""Skeleton-of-Thought: an answer is sketched as points, and all points are written in parallel.

Ning et al., "Skeleton-of-Thought: Prompting LLMs for Efficient Parallel Generation", ICLR 2024
(arXiv:2307.15337).
"""

from collections.abc import Callable, Iterator
from typing import Any

from sapt_fast.checks import require_choice
from sapt_fast.generation.answering import Answering
from sapt_fast.generation.events import Done, Event, Mode, SkeletonAnswer
from sapt_fast.generation.local import LocalAnswer
from sapt_fast.generation.server import ServerAnswer, ServerModel
from sapt_fast.generation.settings import SkeletonSettings


def stream_skeleton_of_thought(
    model: Any,
    tokenizer: Any,
    question: str,
    *,
    settings: SkeletonSettings | None = None,
    mode: Mode = "skeleton",
    reason: str = "ordinary decoding was asked for",
) -> Iterator[Event]:
    """Answers a question in points; yields what happens. The last event is `Done`.

    Arguments and errors are those of `skeleton_of_thought`. Errors in arguments are raised when
    the first event is asked for.
    """
    require_choice("mode", mode, ("skeleton", "plain"))
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question: got {question!r}, expected a text")
    settings, question = settings or SkeletonSettings(), question.strip()
    answer: Answering
    if isinstance(model, ServerModel):
        answer = ServerAnswer(model, question, settings)
    else:
        answer = LocalAnswer(model, tokenizer, question, settings)
    yield from answer.skeleton() if mode == "skeleton" else answer.plain(reason)


def skeleton_of_thought(
    model: Any,
    tokenizer: Any,
    question: str,
    *,
    settings: SkeletonSettings | None = None,
    on_event: Callable[[Event], None] | None = None,
    mode: Mode = "skeleton",
    reason: str = "ordinary decoding was asked for",
) -> SkeletonAnswer:
    """Answers a question in points that are written in parallel.

    The model first writes a skeleton, a list of short titles. Then all points are decoded as one
    batch. What their prompts have in common is read once. Without two points, the answer is
    written by ordinary decoding.

    Args:
        model: a causal or encoder-decoder model of transformers in eval mode, patched or not, a
            PeftModel of one, or a `ServerModel`.
        tokenizer: its tokenizer; None for a `ServerModel`.
        question: the question.
        settings: prompts, limits and sampling.
        on_event: called with each event as it happens, in this thread.
        mode: "plain" for ordinary decoding.
        reason: what the answer gives as the reason for mode "plain".

    Raises:
        ValueError: if the question is empty, or the model cannot generate with a cache.
        ContextTooShortError: if the model's context has no room for the answer.
        ServerError: if a server does not answer with a skeleton. A point that it does not answer
            is in `failed` of the answer instead.
    """
    events = stream_skeleton_of_thought(
        model, tokenizer, question, settings=settings, mode=mode, reason=reason
    )
    for event in events:
        if on_event is not None:
            on_event(event)
        if isinstance(event, Done):
            return event.answer
    raise AssertionError("the last event is Done")
