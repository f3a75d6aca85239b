"""Locks folders between the processes and threads of one host (flock).

The locks need no file, are advisory, and end with their process, even if it is killed. NFS and some
other file systems do not support flock on folders. On these nothing is locked, so only one process
at a time may write into a folder.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on POSIX
    fcntl = None  # type: ignore[assignment]

__all__ = ["FolderLock", "locked"]

logger = logging.getLogger(__name__)

_PATIENCE = 120.0  # seconds; work under a lock takes milliseconds
_SILENT = 1.0  # seconds to wait before a message is logged


class FolderLock:
    """An exclusive lock on a folder, which is kept if the folder is renamed.

    Args:
        folder: an existing folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def acquire(self) -> bool | None:
        """Acquires the lock if it is free.

        Returns:
            True if acquired, False if another process or thread has it, None if locks are not
            supported.
        """
        if fcntl is None or self._descriptor is None:
            return None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True

    def holder(self) -> str:
        """Returns a description of the process that has the lock, if the kernel names it."""
        status = os.stat(self.folder)
        place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        try:
            for line in Path("/proc/locks").read_text().splitlines():
                fields = line.split()
                if len(fields) > 5 and fields[1] == "FLOCK" and fields[5] == place:
                    return f"process {fields[4]}" + _command(fields[4])
        except OSError:
            pass
        return "another process"

    def release(self) -> None:
        """Releases the lock, if it was acquired, and closes the folder."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@contextmanager
def locked(folder: Path, purpose: str) -> Iterator[None]:
    """Returns a context that has the lock of a folder; waits until it is free.

    Args:
        folder: an existing folder.
        purpose: what the lock is for, at the beginning of messages.

    Raises:
        TimeoutError: if it is not free after two minutes; the message names the other process.
    """
    lock = FolderLock(folder)
    try:
        start, said = time.monotonic(), False
        while lock.acquire() is False:
            waited = time.monotonic() - start
            if waited > _PATIENCE:
                raise TimeoutError(
                    f"{purpose}: waited {waited:.0f} s for {lock.holder()}, which is saving in "
                    f"{folder}"
                )
            if waited > _SILENT and not said:
                logger.warning(
                    "%s: waiting for %s, which is saving in %s", purpose, lock.holder(), folder
                )
                said = True
            time.sleep(0.005 if waited < _SILENT else 0.1)
        yield
    finally:
        lock.release()


def _command(pid: str) -> str:
    try:
        return f" ({Path(f'/proc/{pid}/comm').read_text().strip()})"
    except OSError:
        return ""
