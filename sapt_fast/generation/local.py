"""Skeleton-of-Thought with a transformers model."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from sapt_fast.generation.choosing import Chooser
from sapt_fast.generation.events import (
    Done,
    Event,
    PlainToken,
    PointDone,
    PointToken,
    SkeletonAnswer,
    SkeletonDone,
    SkeletonToken,
)
from sapt_fast.generation.forwards import Forwards
from sapt_fast.generation.pieces import Pieces
from sapt_fast.generation.points import parse_points
from sapt_fast.generation.prompts import (
    TokenPrompts,
    decoder_start,
    opening,
    plain_messages,
    point_messages,
    skeleton_messages,
)
from sapt_fast.generation.row_cache import row_bytes
from sapt_fast.generation.rows import rows_of
from sapt_fast.generation.settings import SkeletonSettings
from sapt_fast.generation.writing import Text, Writer

_SKELETON, _PLAIN = -1, -2  # indices of texts, beside those of points


class ContextTooShortError(ValueError):
    """The model's context has no room for an answer."""


class LocalAnswer:
    """One answer of a transformers model.

    Args:
        model: the model, patched or not.
        tokenizer: its tokenizer.
        question: the question.
        settings: the settings.
    """

    def __init__(
        self, model: Any, tokenizer: Any, question: str, settings: SkeletonSettings
    ) -> None:
        self._forwards = Forwards(model)
        self._tokenizer = tokenizer
        self._question = question
        self._settings = settings
        self._config = self._forwards.base.generation_config
        self._tokens = TokenPrompts(tokenizer, settings.prompts)
        self._rows = rows_of(self._forwards)
        self._seed = settings.seed
        if self._seed is None and settings.do_sample:
            self._seed = int(torch.randint(2**31, ()))
        self._notes: list[str] = []
        self._seconds: dict[str, float] = {}
        self._generated = 0
        if not self._tokens.has_template and not self._forwards.encodes:
            self._notes.append("the tokenizer has no chat template: prompts are plain text")

    def plain(self, reason: str) -> Iterator[Event]:
        """Answers by ordinary decoding, for this reason."""
        yield from self._plain(reason, "")

    def skeleton(self) -> Iterator[Event]:
        """Answers in points."""
        settings, prompts = self._settings, self._settings.prompts
        messages = skeleton_messages(prompts, self._question)
        text = self._text(
            _SKELETON, messages, prompts.skeleton_opening, settings.max_skeleton_tokens, "skeleton"
        )
        yield SkeletonToken(prompts.skeleton_opening)
        for piece in self._write([text], "skeleton", 1):
            if piece.text:
                yield SkeletonToken(piece.text)
        skeleton = (prompts.skeleton_opening + text.pieces.text).rstrip()
        whole = prompts.skeleton_opening + text.pieces.text
        titles = parse_points(whole, complete=text.complete)
        if len(titles) > settings.max_points:
            self._notes.append(f"{len(titles)} points, of which {settings.max_points} are written")
            titles = titles[: settings.max_points]
        yield SkeletonDone(tuple(titles))
        if len(titles) < 2:
            count = "no point" if not titles else "one point"
            yield from self._plain(f"the skeleton has {count}", skeleton)
            return
        yield from self._points(skeleton, titles)

    def _points(self, skeleton: str, titles: list[str]) -> Iterator[Event]:
        settings, prompts = self._settings, self._settings.prompts
        openings = [opening(prompts, n, title) for n, title in enumerate(titles, 1)]
        texts = self._point_texts(skeleton, titles, openings)
        if settings.order == "longest first":
            texts.sort(key=lambda text: -len(self._tokens.decoder((), openings[text.index])))
        answers = {text.index: text.pieces for text in texts}
        for piece in self._write(texts, "points", self._batch(texts)):
            if piece.text:
                yield PointToken(piece.index, piece.text)
            if piece.ended:
                yield PointDone(piece.index, answers[piece.index].text)
        points = tuple((title, answers[i].text) for i, title in enumerate(titles))
        joined = [o + text for o, (_, text) in zip(openings, points, strict=True)]
        yield Done(
            replace(
                self._answer(prompts.separator.join(part.strip() for part in joined)),
                skeleton=skeleton,
                points=points,
                mode="skeleton",
            )
        )

    def _point_texts(self, skeleton: str, titles: list[str], openings: list[str]) -> list[Text]:
        prompts, settings = self._settings.prompts, self._settings
        if self._forwards.encodes:
            asks = prompts.encoder.format(question=self._question, skeleton=skeleton)
            self._encode(asks)
            start = decoder_start(self._config)
            ids = [self._tokens.decoder(start, begin) for begin in openings]
        else:
            ids = [
                self._tokens.of(
                    point_messages(prompts, self._question, skeleton, number, title), begin
                )
                for number, (title, begin) in enumerate(zip(titles, openings, strict=True), 1)
            ]
        most = self._room(max(map(len, ids)), settings.max_point_tokens, "each point")
        texts = []
        for index, tokens in enumerate(ids):
            stops = [*settings.stop, f"\n{index + 2}.", f"\n{index + 2})"]
            pieces = Pieces(self._tokenizer, tokens, stops)
            texts.append(Text(index, tokens, pieces, most))
        if settings.routing == "point" and self._forwards.routes:
            for text, weights in zip(texts, self._forwards.route(ids), strict=True):
                text.mixture = weights[None]
        return texts

    def _plain(self, reason: str, skeleton: str) -> Iterator[Event]:
        messages = plain_messages(self._settings.prompts, self._question)
        text = self._text(_PLAIN, messages, "", self._settings.max_plain_tokens, "plain")
        for piece in self._write([text], "plain", 1):
            if piece.text:
                yield PlainToken(piece.text)
        answer = self._answer(text.pieces.text.strip())
        yield Done(replace(answer, skeleton=skeleton, reason=reason))

    def _text(self, index: int, messages: Any, begin: str, most: int, what: str) -> Text:
        """A text that is written alone; the encoder reads its prompt if there is one."""
        if self._forwards.encodes:
            self._encode("\n\n".join(message["content"] for message in messages))
            ids = self._tokens.decoder(decoder_start(self._config), begin)
        else:
            ids = self._tokens.of(messages, begin)
        stops = self._settings.stop if index == _PLAIN else ()
        most = self._room(len(ids), most, f"the {what}")
        return Text(index, ids, Pieces(self._tokenizer, ids, stops), most)

    def _encode(self, text: str) -> None:
        ids = self._tokens.encoder(text)
        self._room(len(ids), 0, "the encoder's input")
        self._forwards.encode(ids, self._rows.mixture)
        self._rows.prefilled += len(ids)
        if self._rows.mixture is None:
            self._rows.mixture = self._forwards.encoder_outputs.get("routing_weights")

    def _room(self, prompt: int, most: int, what: str) -> int:
        """Returns how many tokens fit behind a prompt.

        Raises:
            ContextTooShortError: if none.
        """
        limit = getattr(self._forwards.config, "max_position_embeddings", None)
        if limit is None:
            return most
        if prompt + min(most, 1) > limit:
            raise ContextTooShortError(
                f"context: got a prompt of {prompt} tokens for {what}, expected fewer than the "
                f"{limit} that the model reads"
            )
        if prompt + most > limit:
            note = f"context: {what} has room for {limit - prompt} tokens, not {most}"
            self._notes.append(note)
        return int(min(most, limit - prompt))

    def _batch(self, texts: list[Text]) -> int:
        """Returns how many points are written at a time."""
        if self._settings.batch != "auto":
            return min(self._settings.batch, len(texts))
        layers = self._forwards.row_layers()
        columns = max(len(text.prompt) for text in texts) + texts[0].most
        config, dtype = self._forwards.config, self._forwards.base.dtype
        count = layers or config.get_text_config(decoder=True).num_hidden_layers
        fits = max(
            1, free_bytes(self._forwards.device) // 2 // row_bytes(config, count, columns, dtype)
        )
        if fits < len(texts):
            self._notes.append(f"memory: {fits} points at a time")
        return min(fits, len(texts))

    def _write(self, texts: list[Text], stage: str, batch: int) -> Iterator[Any]:
        settings = self._settings
        points = stage == "points"
        chooser = Chooser(
            self._config,
            settings,
            settings.skeleton_processors if stage == "skeleton" else settings.processors,
            settings.min_point_tokens if points else 0,
            self._seed or 0,
        )
        writer = Writer(self._rows, chooser, batch, settings.refill)
        begin = time.perf_counter()
        yield from writer.write(texts)
        self._seconds[stage] = time.perf_counter() - begin
        self._generated += writer.generated

    def _answer(self, text: str) -> SkeletonAnswer:
        return SkeletonAnswer(
            question=self._question,
            skeleton="",
            points=(),
            text=text,
            mode="plain",
            prefill_tokens=self._rows.prefilled,
            generated_tokens=self._generated,
            seconds=self._seconds,
            notes=tuple(self._notes),
        )


def free_bytes(device: torch.device) -> int:
    """Returns the memory of a device that is free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
