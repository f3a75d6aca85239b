"""Ways for a forked child to end in the middle of its work."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import forked
import torch

__all__ = ["Ways", "with_file_limit"]

# Files that other libraries write are heard of by Python's audit event "open".
WATCHED = ("fsync", "link", "mkdir", "open", "rename", "replace", "rmdir", "unlink")
PATIENCE = 300.0


class Ways:
    """Kills a call at random: at a moment, or before one of its file system calls.

    Args:
        call: what will be killed; it is measured here, once in vain and once for good.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        seconds = []
        for _ in range(2):
            ended = forked.run(partial(_counted, call), timeout=PATIENCE)
            if ended.problem:
                raise RuntimeError(f"fails without being killed: {ended.problem}")
            seconds.append(ended.seconds)
        self.calls, self.seconds = ended.value, min(seconds)
        self._next = 0

    def kill(self, call: Callable[[], Any], generator: random.Random) -> tuple[forked.Ended, str]:
        """Runs a call until it is killed or done; and where it was killed.

        Every other time before the next of its file system calls, so that all are met in turn.
        """
        self._next += 1
        if self._next % 2:
            number = 1 + (self._next // 2) % self.calls
            ended = forked.run(partial(_counted, call, number), timeout=PATIENCE)
            return ended, f"before file system call {number} of {self.calls}"
        delay = generator.uniform(0, self.seconds)
        child = forked.start(partial(_seeded, call))
        time.sleep(delay)
        child.kill()
        return child.wait(PATIENCE), f"after {delay:.4f} of {self.seconds:.4f} s"


def with_file_limit(call: Callable[[], Any], size: int) -> Any:
    """Runs a call that can write files of at most this size, as if the disk were full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        return _seeded(call)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


def _seeded(call: Callable[[], Any]) -> Any:
    """What is drawn must not depend on what came before."""
    torch.manual_seed(os.getpid())
    random.seed(os.getpid())
    return call()


def _counted(call: Callable[[], Any], last: int | None = None) -> int:
    """Runs a call; SIGKILL before its `last`-th file system call, else how many there were."""
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            count()
            return function(*args, **kwargs)

        return counted

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wxa+"):
            count()

    for name in WATCHED:
        setattr(os, name, watched(getattr(os, name)))
    sys.addaudithook(hear)
    _seeded(call)
    return calls
