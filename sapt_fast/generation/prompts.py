"""Makes the prompts of each stage, as tokens of a model or as messages to a server."""

from collections.abc import Sequence
from typing import Any

from sapt_fast.generation.settings import SkeletonPrompts

Message = dict[str, str]


def skeleton_messages(prompts: SkeletonPrompts, question: str) -> list[Message]:
    """Returns the conversation that asks for the skeleton."""
    return [*_system(prompts), _user(prompts.skeleton.format(question=question))]


def plain_messages(prompts: SkeletonPrompts, question: str) -> list[Message]:
    """Returns the conversation that asks for the whole answer."""
    return [*_system(prompts), _user(prompts.plain.format(question=question))]


def point_messages(
    prompts: SkeletonPrompts, question: str, skeleton: str, number: int, title: str
) -> list[Message]:
    """Returns the conversation that asks for one point.

    Args:
        prompts: the templates.
        question: the question.
        skeleton: as the model wrote it, with its opening.
        number: of the point, from 1.
        title: of the point.
    """
    asks = prompts.point.format(question=question, skeleton=skeleton, number=number, title=title)
    if not prompts.conversation:
        return [*_system(prompts), _user(asks)]
    said = {"role": "assistant", "content": skeleton}
    return [*skeleton_messages(prompts, question), said, _user(asks)]


def opening(prompts: SkeletonPrompts, number: int, title: str) -> str:
    """Returns the first characters of a point."""
    return prompts.point_opening.format(number=number, title=title)


class TokenPrompts:
    """Prompts as tokens.

    Args:
        tokenizer: of the model. Without a chat template, prompts are plain text.
        prompts: the templates.
    """

    def __init__(self, tokenizer: Any, prompts: SkeletonPrompts) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self.has_template = bool(getattr(tokenizer, "chat_template", None))

    def of(self, messages: Sequence[Message], opening: str = "") -> list[int]:
        """Returns the tokens of a conversation and of the beginning of the model's answer."""
        if self.has_template:
            text = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=False
            )
        else:
            text = "".join(message["content"] + "\n\n" for message in messages)
            text = text if opening else text.rstrip()
        return self._ids(text + opening, special=not self.has_template)

    def encoder(self, text: str) -> list[int]:
        """Returns the tokens of an encoder's input."""
        return self._ids(text, special=True)

    def decoder(self, start: Sequence[int], opening: str) -> list[int]:
        """Returns the tokens with which a decoder begins."""
        return [*start, *(self._ids(opening, special=False) if opening else ())]

    def _ids(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        return list(ids)


def decoder_start(config: Any) -> list[int]:
    """Returns the tokens with which the decoder of an encoder-decoder model begins.

    Args:
        config: the model's generation config.

    Raises:
        ValueError: if it names none.
    """
    start = config.decoder_start_token_id
    start = config.bos_token_id if start is None else start
    if start is None:
        raise ValueError("model: its generation config has no decoder_start_token_id")
    forced = config.forced_bos_token_id
    return [start] if forced is None else [start, forced]


def _system(prompts: SkeletonPrompts) -> list[Message]:
    return [] if prompts.system is None else [{"role": "system", "content": prompts.system}]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
