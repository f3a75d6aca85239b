"""Skeleton-of-Thought with an OpenAI-compatible server."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator
from typing import Any

from sapt_fast.checks import require_count, require_number
from sapt_fast.generation.answering import Answering, Written
from sapt_fast.generation.events import (
    Event,
    PointDone,
    PointFailed,
    PointRestarted,
    PointToken,
)
from sapt_fast.generation.prompts import (
    Message,
    plain_messages,
    point_messages,
    skeleton_messages,
)
from sapt_fast.generation.requests import Request, Requests
from sapt_fast.generation.settings import SkeletonSettings


class ServerError(RuntimeError):
    """A server did not answer; the last error of the client is its cause."""


class ServerModel:
    """A model behind an OpenAI-compatible server, in place of a transformers model.

    Args:
        client_or_url: the base URL of the server, such as "http://localhost:8000/v1", for which the
            package `openai` is needed; or a client with `chat.completions.create`.
        model: its name on the server.
        api_key: for a URL; defaults to the variable OPENAI_API_KEY.
        concurrency: requests at a time.
        timeout: seconds without news from the server after which a request counts as failed.
        retries: further tries of a request that failed.
        backoff: seconds before the first of them; each further one waits twice as long.

    Raises:
        ValueError: if a number is out of range.
        ImportError: if a URL is given and `openai` is not installed.
    """

    def __init__(
        self,
        client_or_url: Any,
        model: str,
        *,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
    ) -> None:
        require_count("concurrency", concurrency)
        require_number("timeout", timeout, positive=True)
        require_count("retries", retries, least=0)
        require_number("backoff", backoff)
        self.model = model
        self.client = client_or_url
        if isinstance(client_or_url, str):
            self.client = _client(client_or_url, api_key, timeout)
        self.requests = Requests(concurrency, timeout, retries, backoff)


class ServerAnswer(Answering):
    """One answer of a server's model.

    Args:
        server: the server.
        question: the question.
        settings: the settings; those of batches and logits do not apply.
    """

    def __init__(self, server: ServerModel, question: str, settings: SkeletonSettings) -> None:
        super().__init__(question, settings)
        self._server = server
        self._prefilled = self._generated = 0
        ignored = [
            name
            for name in ("processors", "skeleton_processors", "top_k", "min_tokens")
            if getattr(settings, name)
        ]
        if ignored:
            self.notes.append(f"not sent to the server: {', '.join(ignored)}")

    def counts(self) -> tuple[int, int]:
        return self._prefilled, self._generated

    def write_skeleton(self) -> Generator[str, None, Written]:
        messages = skeleton_messages(self.settings.prompts, self.question)
        return self._alone("skeleton", messages, self.settings.max_skeleton_tokens)

    def write_plain(self) -> Generator[str, None, Written]:
        messages = plain_messages(self.settings.prompts, self.question)
        return self._alone("plain", messages, self.settings.max_plain_tokens)

    def write_points(
        self, skeleton: str, titles: list[str], openings: list[str]
    ) -> Generator[Event, None, list[str]]:
        settings, most = self.settings, self.settings.max_point_tokens
        requests = {}
        for index, title in enumerate(titles):
            messages = point_messages(settings.prompts, self.question, skeleton, index + 1, title)
            messages[-1]["content"] += f'\n\nBegin with "{openings[index]}"'
            requests[index] = self._request(messages, most, index)
        replies = [_Reply(begin) for begin in openings]
        begin = time.perf_counter()
        for news in self._server.requests.run(requests):
            index = news.key
            if news.kind == "item":
                piece = replies[index].add(self._read(news.value))
                if piece:
                    yield PointToken(index, piece)
            elif news.kind == "end":
                rest = replies[index].finish()
                if rest:
                    yield PointToken(index, rest)
                yield PointDone(index, replies[index].text)
            else:
                replies[index] = _Reply(openings[index])
                error = _named(news.value)
                if news.kind == "restart":
                    yield PointRestarted(index, error)
                else:
                    self.failed[index] = error
                    yield PointFailed(index, error)
        self.seconds["points"] = time.perf_counter() - begin
        return [reply.text for reply in replies]

    def _alone(
        self, stage: str, messages: list[Message], most: int
    ) -> Generator[str, None, Written]:
        """One request, whose text is passed on when it is complete, as another try may follow."""
        begin, text, complete = time.perf_counter(), "", True
        for news in self._server.requests.run({0: self._request(messages, most, -1)}):
            if news.kind == "item":
                text += self._read(news.value)
                complete = complete and _finish_reason(news.value) != "length"
            elif news.kind == "restart":
                text, complete = "", True
            elif news.kind == "failed":
                raise ServerError(f"{stage}: {_named(news.value)}") from news.value
        self.seconds[stage] = time.perf_counter() - begin
        yield text
        return Written(text, complete)

    def _request(self, messages: list[Message], most: int, index: int) -> Request:
        settings = self.settings
        options: dict[str, Any] = {
            "model": self._server.model,
            "messages": messages,
            "max_tokens": most,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if settings.do_sample:
            given = {"temperature": settings.temperature, "top_p": settings.top_p}
            options |= {name: value for name, value in given.items() if value is not None}
            if settings.temperature is None:
                del options["temperature"]
            if settings.seed is not None:
                options["seed"] = settings.seed + index + 1
        if settings.stop and index >= 0:
            options["stop"] = list(settings.stop)
        return lambda: _whole(self._server.client.chat.completions.create(**options))

    def _read(self, chunk: Any) -> str:
        """Counts the tokens of a chunk of a reply, and returns its text."""
        usage = getattr(chunk, "usage", None)
        if usage is not None:
            self._prefilled += int(getattr(usage, "prompt_tokens", 0) or 0)
            self._generated += int(getattr(usage, "completion_tokens", 0) or 0)
        choices = getattr(chunk, "choices", None)
        delta = getattr(choices[0], "delta", None) if choices else None
        return getattr(delta, "content", None) or ""


class _Reply:
    """The text of a point, without the opening that the model may have written itself.

    Args:
        opening: of the point.
    """

    def __init__(self, opening: str) -> None:
        self._opening = opening.strip()
        self._held: str | None = ""
        self.text = ""

    def add(self, piece: str) -> str:
        """Takes a piece; returns what is certain to be the point's text."""
        if self._held is None:
            self.text += piece
            return piece
        self._held += piece
        begun = self._held.lstrip()
        if len(begun) < len(self._opening) and self._opening.startswith(begun):
            return ""
        return self.finish()

    def finish(self) -> str:
        """Returns what was held back, at the end of the reply at the latest."""
        held, self._held = self._held or "", None
        text = held.lstrip().removeprefix(self._opening)
        self.text += text and " " + text.lstrip()
        return text and " " + text.lstrip()


def _whole(chunks: Any) -> Iterator[Any]:
    """Yields the chunks of a reply.

    Raises:
        ConnectionError: if it breaks off without saying why it ends.
    """
    ended = False
    try:
        for chunk in chunks:
            ended = ended or _finish_reason(chunk) is not None
            yield chunk
    finally:
        close = getattr(chunks, "close", None)
        if close is not None:
            close()
    if not ended:
        raise ConnectionError("the reply broke off without a finish_reason")


def _finish_reason(chunk: Any) -> Any:
    choices: Any = getattr(chunk, "choices", None)
    return getattr(choices[0], "finish_reason", None) if choices else None


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _client(url: str, api_key: str | None, timeout: float) -> Any:
    try:
        from openai import OpenAI
    except ImportError as error:
        raise ImportError(
            "a server's URL needs the package openai: pip install 'sapt-fast[openai]'"
        ) from error
    key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
    return OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=0)
