"""Servers that fail, stall or answer in any order."""

import threading
import time
from types import SimpleNamespace

import pytest

from sapt_fast.generation import (
    PointDone,
    PointFailed,
    PointRestarted,
    ServerError,
    ServerModel,
    skeleton_of_thought,
)
from sapt_fast.generation.requests import Requests

SKELETON = "1. Red\n2. Blue\n3. Green\n4. Sun"


class StatusError(Exception):
    def __init__(self, code, after=None):
        super().__init__(f"status {code}")
        self.status_code = code
        headers = {} if after is None else {"retry-after": after}
        self.response = SimpleNamespace(headers=headers)


def chunk(text, usage=None, reason=None):
    choice = SimpleNamespace(delta=SimpleNamespace(content=text), finish_reason=reason)
    return SimpleNamespace(choices=[choice], usage=usage)


class Server:
    """A client whose answers to points are scripted.

    Args:
        scripts: by number of the point, what each try does: an error to raise, "stall", "break"
            (an error after a piece), "cut" (an end without a reason), or seconds to wait before
            the answer.
    """

    def __init__(self, scripts=None, skeleton=SKELETON):
        self.scripts = scripts or {}
        self.skeleton = skeleton
        self.tries, self.running, self.most = {}, 0, 0
        self.lock, self.released = threading.Lock(), threading.Event()
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))

    def create(self, messages, **options):
        asks = messages[-1]["content"]
        number = int(asks.partition('Begin with "')[2].partition(".")[0] or 0)
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
            place = self.tries[number] = self.tries.get(number, -1) + 1
        return self.reply(number, place)

    def reply(self, number, place):
        try:
            script = self.scripts.get(number, [0])
            does = script[min(place, len(script) - 1)]
            if isinstance(does, Exception):
                raise does
            if does == "stall":
                self.released.wait(20)
                raise RuntimeError("nobody waits any more")
            if does == "break":
                yield chunk("half")
                raise ConnectionError("broken")
            time.sleep(0 if does == "cut" else does)
            if number == 0:
                yield chunk(self.skeleton, reason="stop")
            else:
                title = SKELETON.split("\n")[number - 1]
                for piece in (title[:2], title[2:] + ":", " te", "xt", f" {number}"):
                    yield chunk(piece)
                if does == "cut":
                    return
                yield chunk(None, reason="stop")
            usage = SimpleNamespace(prompt_tokens=10, completion_tokens=5)
            yield SimpleNamespace(choices=[], usage=usage)
        finally:
            with self.lock:
                self.running -= 1


def ask(server, **options):
    options = {"timeout": 0.5, "retries": 2, "backoff": 0.01, **options}
    events = []
    model = ServerModel(server, "m", **options)
    begin = time.monotonic()
    answer = skeleton_of_thought(model, None, "Why?", on_event=events.append)
    assert time.monotonic() - begin < 15
    return answer, events


TEXTS = [f" text {n}" for n in range(1, 5)]


def test_answers_out_of_order():
    server = Server({1: [0.3], 2: [0.2], 3: [0.1], 4: [0.2]})
    answer, events = ask(server)
    assert [text for _, text in answer.points] == TEXTS
    assert answer.text.split("\n\n")[1] == "2. Blue: text 2"
    assert (answer.prefill_tokens, answer.generated_tokens) == (50, 25)
    assert next(e.index for e in events if isinstance(e, PointDone)) != 0
    assert server.most > 1
    limited = Server({n: [0.02] for n in range(1, 5)})
    ask(limited, concurrency=2)
    assert limited.most == 2


def test_failures_and_stalls_lose_no_point():
    scripts = {
        1: [StatusError(500), StatusError(429, "0.01"), 0],
        2: ["stall", 0],
        3: ["break", 0],
        4: ["cut", 0],
    }
    server = Server(scripts)
    answer, events = ask(server)
    assert [text for _, text in answer.points] == TEXTS
    assert not answer.failed
    restarts = sorted(e.index for e in events if isinstance(e, PointRestarted))
    assert restarts == [0, 0, 1, 2, 3]
    server.released.set()


def test_a_point_that_is_never_answered_is_named():
    server = Server({1: [StatusError(400)], 3: ["stall"]})
    answer, events = ask(server, retries=1, timeout=0.2)
    assert [text for _, text in answer.points] == ["", TEXTS[1], "", TEXTS[3]]
    assert answer.failed[0] == (0, "StatusError: status 400")
    assert answer.failed[1][0] == 2
    assert "no answer within 0.2 s" in answer.failed[1][1]
    assert server.tries[1] == 0  # another try would not help
    assert server.tries[3] == 1
    assert sum(isinstance(e, PointFailed) for e in events) == 2
    server.released.set()


def test_without_a_skeleton():
    with pytest.raises(ServerError, match="skeleton: StatusError: status 401"):
        ask(Server({0: [StatusError(401)]}))
    answer, _ = ask(Server(skeleton="I do not know."))
    assert answer.mode == "plain"
    assert answer.reason == "the skeleton has no point"


def test_a_reader_that_leaves_ends_the_requests():
    stopped = threading.Event()

    def endless():
        try:
            while True:
                time.sleep(0.005)
                yield 1
        finally:
            stopped.set()

    news = Requests(4, 1.0, 0, 0.0).run({0: endless})
    next(news)
    news.close()
    assert stopped.wait(5)


def test_bad_numbers_are_named():
    for name, value in {"concurrency": 0, "timeout": 0, "retries": -1, "backoff": -1}.items():
        with pytest.raises(ValueError, match=f"{name}: got"):
            ServerModel(Server(), "m", **{name: value})
    with pytest.raises(ValueError, match="question: got ' '"):
        skeleton_of_thought(ServerModel(Server(), "m"), None, " ")
