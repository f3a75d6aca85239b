"""Skeleton-of-Thought with a transformers model."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sapt_fast.generation.answering import Answering, Written
from sapt_fast.generation.choosing import Chooser, not_applied
from sapt_fast.generation.events import Event, PointDone, PointToken
from sapt_fast.generation.forwards import Forwards
from sapt_fast.generation.pieces import Pieces
from sapt_fast.generation.prompts import (
    Message,
    TokenPrompts,
    decoder_start,
    plain_messages,
    point_messages,
    skeleton_messages,
)
from sapt_fast.generation.row_cache import row_bytes
from sapt_fast.generation.rows import rows_of
from sapt_fast.generation.settings import SkeletonSettings
from sapt_fast.generation.writing import Piece, Text, Writer

_SKELETON, _PLAIN = -1, -2  # indices of texts, beside those of points


class ContextTooShortError(ValueError):
    """The model's context has no room for an answer."""


class LocalAnswer(Answering):
    """One answer of a transformers model.

    Args:
        model: the model, patched or not.
        tokenizer: its tokenizer.
        question: the question.
        settings: the settings.

    Attributes:
        texts: those that were written last, with their tokens.
    """

    texts: Sequence[Text] = ()

    def __init__(
        self, model: Any, tokenizer: Any, question: str, settings: SkeletonSettings
    ) -> None:
        super().__init__(question, settings)
        self._forwards = Forwards(model)
        if settings.routing == "point" and not self._forwards.routes:
            raise ValueError(
                "routing: got 'point' for a model without LoRA adapters that a router of sapt_fast "
                "mixes; expected 'question'"
            )
        self._tokenizer = tokenizer
        self._config = self._forwards.base.generation_config
        self._tokens = TokenPrompts(tokenizer, settings.prompts)
        self._rows = rows_of(self._forwards, settings.static_cache)
        self._generated = 0
        seed = settings.seed
        if seed is None:  # from torch's generator, which the caller may have seeded
            seed = int(torch.randint(2**31, ())) if settings.do_sample else 0
        self._seed = seed
        if ignored := not_applied(self._config):
            self.notes.append(f"not applied: {', '.join(ignored)} of the generation config")
        if not self._forwards.shares:
            self.notes.append("edits are looked up at the end of each prompt: one point at a time")
        if not self._tokens.has_template and not self._forwards.encodes:
            self.notes.append("the tokenizer has no chat template: prompts are plain text")

    def counts(self) -> tuple[int, int]:
        return self._rows.prefilled, self._generated

    def write_skeleton(self) -> Generator[str, None, Written]:
        settings, begin = self.settings, self.settings.prompts.skeleton_opening
        messages = skeleton_messages(settings.prompts, self.question)
        text = self._alone(_SKELETON, messages, begin, settings.max_skeleton_tokens)
        yield begin
        for piece in self._write([text], "skeleton", settings.skeleton_processors):
            yield piece.text
        return Written(begin + text.pieces.text, text.complete)

    def write_plain(self) -> Generator[str, None, Written]:
        settings = self.settings
        messages = plain_messages(settings.prompts, self.question)
        text = self._alone(_PLAIN, messages, "", settings.max_plain_tokens, settings.stop)
        for piece in self._write([text], "plain", settings.processors):
            yield piece.text
        return Written(text.pieces.text, text.complete)

    def write_points(
        self, skeleton: str, titles: list[str], openings: list[str]
    ) -> Generator[Event, None, list[str]]:
        settings = self.settings
        texts = self._points(skeleton, titles, openings)
        pieces = [text.pieces for text in texts]
        batch = self._batch(texts)
        if settings.order == "longest first":
            texts.sort(key=lambda text: -len(titles[text.index]))
        for piece in self._write(texts, "points", settings.processors, batch):
            if piece.text:
                yield PointToken(piece.index, piece.text)
            if piece.ended:
                yield PointDone(piece.index, pieces[piece.index].text)
        return [written.text for written in pieces]

    def _points(self, skeleton: str, titles: list[str], openings: list[str]) -> list[Text]:
        """The points, with what is read before each."""
        prompts, settings = self.settings.prompts, self.settings
        if self._forwards.encodes:
            asks = prompts.encoder.format(question=self.question, skeleton=skeleton)
            self._encode(asks)
            start = decoder_start(self._config)
            ids = [self._tokens.decoder(start, begin) for begin in openings]
            routed = [self._tokens.encoder(f"{asks}\n{begin}") for begin in openings]
        else:
            ids = [
                self._tokens.of(
                    point_messages(prompts, self.question, skeleton, number, title), begin
                )
                for number, (title, begin) in enumerate(zip(titles, openings, strict=True), 1)
            ]
            routed = ids
        most = self._room(max(map(len, ids)), settings.max_point_tokens, "a point")
        texts = []
        for index, tokens in enumerate(ids):
            stops = [*settings.stop, f"\n{index + 2}.", f"\n{index + 2})"]
            texts.append(Text(index, tokens, Pieces(self._tokenizer, tokens, stops), most))
        if settings.routing == "point":
            for text, weights in zip(texts, self._forwards.route(routed), strict=True):
                text.mixture = weights[None]
        return texts

    def _alone(
        self, index: int, messages: list[Message], begin: str, most: int, stops: Any = ()
    ) -> Text:
        """A text that is written alone; the encoder reads its prompt if there is one."""
        if self._forwards.encodes:
            self._encode("\n\n".join(message["content"] for message in messages))
            ids = self._tokens.decoder(decoder_start(self._config), begin)
        else:
            ids = self._tokens.of(messages, begin)
        most = self._room(len(ids), most, "the skeleton" if index == _SKELETON else "the answer")
        return Text(index, ids, Pieces(self._tokenizer, ids, stops), most)

    def _encode(self, text: str) -> None:
        ids, rows = self._tokens.encoder(text), self._rows
        self._room(len(ids), 0, "the encoder")
        self._forwards.encode(ids, rows.mixture)
        rows.prefilled += len(ids)
        if rows.mixture is None:
            rows.mixture = self._forwards.encoder_outputs.get("routing_weights")

    def _room(self, prompt: int, most: int, what: str) -> int:
        """Returns how many tokens fit behind a prompt.

        Raises:
            ContextTooShortError: if none.
        """
        limit = getattr(self._forwards.config, "max_position_embeddings", None)
        if limit is None or prompt + most <= limit:
            return most
        room = int(limit) - prompt
        if room < 1:
            raise ContextTooShortError(
                f"context: got a prompt of {prompt} tokens for {what}, expected fewer than the "
                f"{limit} that the model can read"
            )
        self.notes.append(f"context: {what} has room for {room} tokens, not {most}")
        return room

    def _batch(self, texts: list[Text]) -> int:
        """Returns how many points are written at a time."""
        if self.settings.batch != "auto":
            return self.settings.batch
        columns = max(len(text.prompt) + text.most for text in texts)
        size = row_bytes(self._forwards.config, columns, self._forwards.base.dtype)
        fits = max(1, free_bytes(self._forwards.device) // 2 // size)
        if fits < len(texts):
            self.notes.append(f"memory: {fits} points at a time")
        return fits

    def _write(
        self, texts: list[Text], stage: str, processors: Any, batch: int = 1
    ) -> Iterator[Piece]:
        least = 0 if stage == "skeleton" else self.settings.min_tokens
        chooser = Chooser(self._config, self.settings, processors, least, self._seed)
        writer = Writer(self._rows, chooser, batch, self.settings.refill)
        self.texts, begin = texts, time.perf_counter()
        shared = [texts] if self._forwards.shares else [[text] for text in texts]
        for together in shared:
            yield from writer.write(together)
        self.seconds[stage] = time.perf_counter() - begin
        self._generated += writer.generated


def free_bytes(device: torch.device) -> int:
    """Returns the memory of a device that is free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(line for line in lines if line.startswith("MemAvailable:"))
    return int(available.split()[1]) * 1024
