"""Turns tokens into text piece by piece, up to a stop."""

from collections.abc import Sequence
from typing import Any

_CONTEXT = 4  # tokens of the prompt, by which a tokenizer knows whether a space comes first


class Pieces:
    """The text of one answer while it is written.

    Args:
        tokenizer: of the model.
        prompt: tokens before the answer.
        stops: strings that end it and are not part of it.

    Attributes:
        text: all that is certain.
        stopped: whether a stop was found.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])
        self._begin, self._read = 0, len(self._ids)
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Takes a token; returns the text that became certain."""
        self._ids.append(token)
        before, now = self._decoded(self._read), self._decoded(None)
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return self._pass(now[len(before) :])

    def finish(self) -> str:
        """Returns the rest at the end of the answer."""
        if self.stopped:
            return ""
        before, now = self._decoded(self._read), self._decoded(None)
        self._read = len(self._ids)
        piece = self._pass(now[len(before) :])
        rest = "" if self.stopped else self._held
        self._held = ""
        self.text += rest
        return piece + rest

    def _decoded(self, stop: int | None) -> str:
        text: str = self._tokenizer.decode(self._ids[self._begin : stop], skip_special_tokens=True)
        return text

    def _pass(self, piece: str) -> str:
        """Holds back what may be the beginning of a stop."""
        text = self._held + piece
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, text, self._held = True, text[: min(found)], ""
        else:
            longest = max(map(len, self._stops), default=1) - 1
            held = next(
                (
                    n
                    for n in range(min(longest, len(text)), 0, -1)
                    if any(stop.startswith(text[-n:]) for stop in self._stops)
                ),
                0,
            )
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += text
        return text
