"""Concurrent requests that may fail, stall or finish in any order."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal, NamedTuple

# Answers of a server that another try does not change.
_FINAL = {400, 401, 402, 403, 404, 405, 413, 422}
_LONGEST_PAUSE = 60.0

# Starts one request; returns what it yields.
Request = Callable[[], Iterable[Any]]


class News(NamedTuple):
    """What became of one of several requests.

    Attributes:
        key: the request.
        kind: "item": it yielded `value`; "end": it is complete; "restart": a try failed and the
            next one will follow; "failed": the last try failed. `value` is then the error.
        value: see kind.
    """

    key: int
    kind: Literal["item", "end", "restart", "failed"]
    value: Any = None


class _Try:
    """One try of a request, in a thread of its own."""

    def __init__(self, key: int, number: int, request: Request, out: queue.Queue[Any]) -> None:
        self.key, self.number = key, number
        self.dropped = False
        self.heard = time.monotonic()
        self._request, self._out = request, out
        # A daemon: one that stalls for good keeps no process alive.
        threading.Thread(target=self._run, name=f"request-{key}", daemon=True).start()

    def _run(self) -> None:
        try:
            items = self._request()
            try:
                for item in items:
                    if self.dropped:
                        return
                    self.heard = time.monotonic()
                    self._out.put((self, "item", item))
            finally:
                close = getattr(items, "close", None)
                if close is not None:
                    close()
        except Exception as error:
            self._out.put((self, "error", error))
        else:
            self._out.put((self, "end", None))


class Requests:
    """Runs requests side by side.

    Args:
        concurrency: at most so many at a time.
        timeout: seconds without news after which a try counts as failed.
        retries: further tries of a request after the first.
        backoff: seconds before the first of them; each further one waits twice as long, up to 60 s.
    """

    def __init__(self, concurrency: int, timeout: float, retries: int, backoff: float) -> None:
        self._concurrency = concurrency
        self._timeout = timeout
        self._retries = retries
        self._backoff = backoff

    def run(self, requests: Mapping[int, Request]) -> Iterator[News]:
        """Yields the news of all requests until each has ended or failed for good.

        Args:
            requests: by key; they begin in this order.
        """
        out: queue.Queue[Any] = queue.Queue()
        waiting = [(0.0, key, 0) for key in requests]  # not before, key, number of the try
        running: dict[int, _Try] = {}
        try:
            while waiting or running:
                now = time.monotonic()
                for entry in [one for one in waiting if one[0] <= now]:
                    if len(running) < self._concurrency:
                        waiting.remove(entry)
                        _, key, number = entry
                        running[key] = _Try(key, number, requests[key], out)
                one: _Try | None = None
                with suppress(queue.Empty):
                    one, kind, value = out.get(timeout=self._pause(waiting, running))
                # While news waits to be read, nobody knows who has none.
                stalled = self._stalled(running) if one is None and out.empty() else []
                if one is not None and running.get(one.key) is one:
                    if kind == "item":
                        yield News(one.key, "item", value)
                    elif kind == "end":
                        del running[one.key]
                        yield News(one.key, "end")
                    else:
                        yield self._failed(one, value, running, waiting)
                for late in stalled:
                    error = TimeoutError(f"no answer within {self._timeout:g} s")
                    yield self._failed(late, error, running, waiting)
        finally:
            for each in running.values():
                each.dropped = True

    def _pause(self, waiting: list[tuple[float, int, int]], running: dict[int, _Try]) -> float:
        """Seconds until something is due without news."""
        due = [one.heard + self._timeout for one in running.values()]
        if len(running) < self._concurrency:
            due += [begin for begin, _, _ in waiting]
        return max(0.001, min(due) - time.monotonic())

    def _stalled(self, running: dict[int, _Try]) -> list[_Try]:
        limit = time.monotonic() - self._timeout
        return [one for one in running.values() if one.heard <= limit]

    def _failed(
        self,
        one: _Try,
        error: Exception,
        running: dict[int, _Try],
        waiting: list[tuple[float, int, int]],
    ) -> News:
        del running[one.key]
        one.dropped = True
        if one.number >= self._retries or getattr(error, "status_code", None) in _FINAL:
            return News(one.key, "failed", error)
        pause = min(_LONGEST_PAUSE, self._backoff * 2**one.number) * random.uniform(0.5, 1.0)
        pause = max(pause, _asked_for(error))
        waiting.append((time.monotonic() + pause, one.key, one.number + 1))
        return News(one.key, "restart", error)


def _asked_for(error: Exception) -> float:
    """Seconds that a server asks to wait for, at most 60."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    try:
        return min(_LONGEST_PAUSE, max(0.0, float(headers.get("retry-after", 0))))
    except (TypeError, ValueError):  # a date
        return 0.0
