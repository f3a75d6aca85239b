"""Calls in forked children: they may be killed, hang, or ask for all memory there is.

The parent has imported everything already, so a child starts within milliseconds. It must have one
thread when it forks (torch.set_num_threads(1)).
"""

from __future__ import annotations

import os
import pickle
import resource
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Child", "Ended", "run", "start"]


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        value: what the call returned.
        error: the exception that it raised, as (names of its class and the bases, message).
        signal: number of the signal that ended it; 0 for none.
        peak: bytes that it had at most beyond what it had at its start.
        seconds: from its start to its end.
        late: it was ended because its time was up.
    """

    value: Any
    error: tuple[tuple[str, ...], str] | None
    signal: int
    peak: int
    seconds: float
    late: bool

    @property
    def problem(self) -> str:
        """What went wrong, in words; empty if nothing did."""
        if self.late:
            return f"not done after {self.seconds:.1f} s"
        if self.signal:
            return f"ended by signal {self.signal}"
        return "" if self.error is None else f"{self.error[0][0]}: {self.error[1]}"


class Child:
    """A call that runs in a forked child of its own process group."""

    def __init__(self, call: Callable[[], Any], memory: int | None) -> None:
        self.started = time.monotonic()
        self.base = _status("VmRSS")
        self.pipe, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.pipe)
            _serve(call, write, memory)
        os.close(write)

    def kill(self) -> None:
        """SIGKILL; to its own children too."""
        for end in (os.killpg, os.kill):  # it may not have its group yet
            try:
                end(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def wait(self, timeout: float) -> Ended:
        """Waits for its end and kills it when `timeout` seconds have passed."""
        deadline = time.monotonic() + timeout
        content, late = b"", False
        while True:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self.pipe], [], [], max(left, 0))
            if not ready:
                late = True
                self.kill()
                break
            part = os.read(self.pipe, 1 << 16)
            if not part:
                break
            content += part
        os.close(self.pipe)
        _, status, usage = os.wait4(self.pid, 0)
        ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        value, error = None, None
        if not ended and not late:
            value, error = pickle.loads(content)  # our own child wrote it
        peak = max(0, 1024 * usage.ru_maxrss - self.base)
        return Ended(value, error, ended, peak, time.monotonic() - self.started, late)


def start(call: Callable[[], Any], *, memory: int | None = None) -> Child:
    """Starts a call.

    Args:
        call: returns something that can be pickled.
        memory: bytes of address space that it may take beyond what there is.
    """
    return Child(call, memory)


def run(call: Callable[[], Any], *, timeout: float, memory: int | None = None) -> Ended:
    """Starts a call and waits for its end; arguments as `start` and `Child.wait`."""
    return start(call, memory=memory).wait(timeout)


def _serve(call: Callable[[], Any], write: int, memory: int | None) -> None:
    """The child's life."""
    try:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        if memory is not None:
            limit = _status("VmSize") + memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            result = (call(), None)
        except BaseException as error:
            names = tuple(kind.__name__ for kind in type(error).__mro__)
            result = (None, (names, _message(error)))
        content = pickle.dumps(result)
        while content:
            content = content[os.write(write, content) :]
    finally:
        os._exit(0)


def _message(error: BaseException) -> str:
    try:
        return str(error)[:2000]
    except BaseException as failure:
        return f"(its message cannot be made: {type(failure).__name__})"


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")
