"""Writes several texts side by side: tokens by row, ends, and texts that wait for a place."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sapt_fast.generation.choosing import Chooser
from sapt_fast.generation.pieces import Pieces
from sapt_fast.generation.rows import Rows


@dataclass(frozen=True)
class Piece:
    """What one text gained.

    Attributes:
        index: of the text.
        text: the piece.
        ended: whether the text is complete.
    """

    index: int
    text: str
    ended: bool


@dataclass
class Text:
    """A text to write.

    Attributes:
        index: names it, also for its random numbers.
        prompt: its tokens.
        pieces: its text.
        most: new tokens that it may have.
        mixture: [1, K], weights of its own.
        tokens: those written, without the one that ended it.
        complete: whether it ended by itself.
    """

    index: int
    prompt: list[int]
    pieces: Pieces
    most: int
    mixture: Tensor | None = None
    tokens: list[int] = field(default_factory=list)
    complete: bool = False
    unread: list[int] = field(default_factory=list)
    generator: Any = None

    def all_tokens(self) -> list[int]:
        return self.prompt + self.tokens


class Writer:
    """Writes texts.

    Args:
        rows: of the model.
        chooser: chooses tokens.
        batch: texts at a time.
        refill: whether a waiting text begins as soon as another ends.

    Attributes:
        generated: tokens that were chosen.
    """

    def __init__(self, rows: Rows, chooser: Chooser, batch: int, refill: bool) -> None:
        self._rows = rows
        self._chooser = chooser
        self._batch = batch
        self._refill = refill and rows.joins
        self.generated = 0

    def write(self, texts: Sequence[Text]) -> Iterator[Piece]:
        """Writes all texts; yields what each gains, in the order in which it is written."""
        waiting = list(texts)
        batch = min(self._batch, len(texts))
        self._rows.open([text.prompt for text in texts], batch, max(t.most for t in texts))
        running: list[Text] = []
        tokens: list[int] = []
        while waiting or running:
            if running:
                logits = self._rows.step(tokens)
                tokens = yield from self._advance(logits, running)
            room = batch - len(running)
            if waiting and room and (self._refill or not running):
                joining, waiting = waiting[:room], waiting[room:]
                logits = self._join(joining)
                new = yield from self._advance(logits, joining, len(running))
                running, tokens = running + joining, tokens + new

    def _join(self, texts: Sequence[Text]) -> Tensor:
        mixtures = [text.mixture for text in texts if text.mixture is not None]
        mixture = torch.cat(mixtures) if mixtures else None
        logits, unread = self._rows.add([text.prompt for text in texts], mixture)
        for text, rest in zip(texts, unread, strict=True):
            text.unread = rest
            text.generator = self._chooser.generator(text.index, logits.device)
        return logits

    def _advance(
        self, logits: Tensor, texts: list[Text], first: int = 0
    ) -> Generator[Piece, None, list[int]]:
        """Chooses a token for each text, and lets those leave that ended.

        Args:
            logits: [n, V].
            texts: of these rows; those that ended are removed.
            first: the row of the first; those before are kept.

        Yields:
            Piece: of each text that gained one.

        Returns:
            The tokens of the texts that stay.
        """
        chosen = self._choose(logits, texts)
        stays: list[tuple[int, Text, int]] = []
        for row, text in enumerate(texts, first):
            if text.unread:  # a token of its prompt comes next
                stays.append((row, text, text.unread.pop(0)))
                continue
            token = next(chosen)
            piece = self._take(text, token)
            if piece.text or piece.ended:
                yield piece
            if not piece.ended:
                stays.append((row, text, token))
        if len(stays) < len(texts):
            stays = _filled(stays, first)
            self._rows.keep([*range(first), *(row for row, _, _ in stays)])
        texts[:] = [text for _, text, _ in stays]
        return [token for _, _, token in stays]

    def _choose(self, logits: Tensor, texts: Sequence[Text]) -> Iterator[int]:
        """Chooses a token for each text whose prompt is read; the others draw no random numbers."""
        rows = [row for row, text in enumerate(texts) if not text.unread]
        ready = [texts[row] for row in rows]
        if len(ready) < len(texts):
            logits = logits[torch.tensor(rows, dtype=torch.long, device=logits.device)]
        tokens = self._chooser.choose(
            logits,
            [text.all_tokens for text in ready],
            [len(text.tokens) for text in ready],
            [text.generator for text in ready],
        )
        return iter(tokens)

    def _take(self, text: Text, token: int) -> Piece:
        self.generated += 1
        if token in self._chooser.ends:
            text.complete = True
            return Piece(text.index, text.pieces.finish(), True)
        text.tokens.append(token)
        piece = text.pieces.add(token)
        if text.pieces.stopped:
            text.complete = True
            return Piece(text.index, piece, True)
        if len(text.tokens) >= text.most:
            return Piece(text.index, piece + text.pieces.finish(), True)
        return Piece(text.index, piece, False)


def _filled(stays: list[tuple[int, Text, int]], first: int) -> list[tuple[int, Text, int]]:
    """Fills the places of rows that left by the last rows, so that few rows move."""
    last = first + len(stays)
    moving = [one for one in stays if one[0] >= last]
    places = {one[0]: one for one in stays if one[0] < last}
    return [places.get(row) or moving.pop() for row in range(first, last)]
