"""Settings of Skeleton-of-Thought, and its prompts."""

import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sapt_fast.checks import require_choice, require_count, require_number

_SKELETON = """\
Give only the skeleton of an answer: a numbered list of 3 to 10 points of 3 to 5 words each.

Question: {question}"""

# The opening tells which point, so that all of this is read once.
_POINT = "Now write one of these points, in one or two sentences. No other points."

_POINTS = """\
Question: {question}

The answer in points, with one or two sentences for each:
{skeleton}

Write one point of the answer, in one or two sentences."""

# The prompts of Ning et al., 2023.
_PUBLISHED_SKELETON = """\
You're an organizer responsible for only giving the skeleton (not the full content) for answering \
the question. Provide the skeleton in a list of points (numbered 1., 2., 3., etc.) to answer the \
question. Instead of writing a full sentence, each skeleton point should be very short with only \
3~5 words. Generally, the skeleton should have 3~10 points. Now, please provide the skeleton for \
the following question.
{question}
Skeleton:"""

_PUBLISHED_POINT = """\
You're responsible for continuing the writing of one and only one point in the overall answer to \
the following question.

{question}

The skeleton of the answer is

{skeleton}

Continue and only continue the writing of point {number}. Write it **very shortly** in 1~2 \
sentence and do not continue with other points!"""


@dataclass(frozen=True)
class SkeletonPrompts:
    """The prompts. In braces stand fields: {question}, and in prompts for points also {skeleton},
    {number} (from 1) and {title}.

    Attributes:
        skeleton: asks for the skeleton.
        skeleton_opening: the first characters of the model's answer to it.
        point: asks for one point. What all points have in common is best put first: the model
            reads it once.
        point_opening: the first characters of the model's answer to it, and of the point in the
            joined answer. A server cannot be given them; it is asked to begin with them.
        conversation: whether `point` is the next turn of the conversation that began with
            `skeleton`, so that its keys and values are used again; else it begins a new one.
        encoder: what an encoder-decoder model reads, once for all points.
        plain: asks for the whole answer.
        system: a message that comes first.
        separator: comes between the points of the joined answer.
    """

    skeleton: str = _SKELETON
    skeleton_opening: str = "1."
    point: str = _POINT
    point_opening: str = "{number}. {title}:"
    conversation: bool = True
    encoder: str = _POINTS
    plain: str = "{question}"
    system: str | None = None
    separator: str = "\n\n"

    def __post_init__(self) -> None:
        allowed = {"question", "skeleton", "number", "title"}
        for name, fields in {
            "skeleton": {"question"},
            "point": allowed,
            "point_opening": {"number", "title"},
            "encoder": {"question", "skeleton"},
            "plain": {"question"},
        }.items():
            given = {field for _, field, _, _ in string.Formatter().parse(getattr(self, name))}
            if unknown := given - fields - {None}:
                raise ValueError(
                    f"{name}: got the fields {sorted(map(str, unknown))}, expected of "
                    f"{sorted(fields)}; write {{{{ and }}}} for braces"
                )

    @classmethod
    def published(cls) -> "SkeletonPrompts":
        """Returns the prompts of the paper, each of which begins a conversation of its own."""
        return cls(
            skeleton=_PUBLISHED_SKELETON,
            point=_PUBLISHED_POINT,
            point_opening="{number}. {title}",
            conversation=False,
        )


@dataclass(frozen=True)
class SkeletonSettings:
    """Settings of `skeleton_of_thought`.

    Attributes:
        max_skeleton_tokens: tokens that the skeleton may have.
        max_point_tokens: tokens that each point may have.
        max_plain_tokens: tokens of an answer by ordinary decoding.
        max_points: further points of a skeleton are left out.
        min_tokens: tokens before which no point and no answer by ordinary decoding chooses to end.
        batch: points that are decoded at a time; "auto" takes as many as fit into half of the free
            memory.
        order: "as written", or "longest first": points with longer titles begin earlier, which
            shortens the end if there are more points than `batch`.
        refill: whether a waiting point begins as soon as another ends; else when all have ended.
        do_sample: whether to sample; else greedy search.
        temperature, top_k, top_p: of sampling; default to the model's generation config.
        seed: of sampling. Each point has its own random numbers, whatever it is decoded with.
            Defaults to a number from torch's generator.
        stop: strings at which a point ends, whatever `min_tokens` is; they are not part of it.
        stop_at_next: whether a point of a transformers model also ends at a line that begins with
            the number of the next.
        processors: logits processors of transformers, called with the tokens of one text [1, T].
        skeleton_processors: the same for the skeleton; defaults to none.
        static_cache: whether each step reads keys and values of one constant shape.
        routing: of a model that SAPT has patched. "question": weights are computed once, for the
            prompt of the skeleton, and hold for all. "point": each point has those of its own
            prompt; what the points share is read with the question's.
        prompts: the prompts.
    """

    max_skeleton_tokens: int = 160
    max_point_tokens: int = 128
    max_plain_tokens: int = 512
    max_points: int = 20
    min_tokens: int = 0
    batch: int | Literal["auto"] = "auto"
    order: Literal["as written", "longest first"] = "as written"
    refill: bool = True
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_at_next: bool = True
    processors: Sequence[Any] = ()
    skeleton_processors: Sequence[Any] = ()
    static_cache: bool = False
    routing: Literal["question", "point"] = "question"
    prompts: SkeletonPrompts = field(default_factory=SkeletonPrompts)

    def __post_init__(self) -> None:
        for name in ("max_skeleton_tokens", "max_point_tokens", "max_plain_tokens", "max_points"):
            require_count(name, getattr(self, name))
        require_count("min_tokens", self.min_tokens, least=0)
        if self.batch != "auto":
            require_count("batch", self.batch)
        require_choice("order", self.order, ("as written", "longest first"))
        require_choice("routing", self.routing, ("question", "point"))
        if self.temperature is not None:
            require_number("temperature", self.temperature, positive=True)
        if self.top_k is not None:
            require_count("top_k", self.top_k)
        if self.top_p is not None:
            require_number("top_p", self.top_p, most=1.0, positive=True)
        if self.seed is not None:
            require_count("seed", self.seed, least=0)
        if isinstance(self.stop, str):
            raise ValueError(f"stop: got {self.stop!r}, expected a list of strings")
