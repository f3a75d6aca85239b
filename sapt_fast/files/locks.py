"""Locks between the processes and threads of one host, held on folders (flock).

They cost no file, end with their process however that ends, and are advisory. Over NFS and other
file systems that have no flock for folders nothing is locked: there only one process at a time may
write into a folder.
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
except ImportError:  # no POSIX
    fcntl = None  # type: ignore[assignment]

__all__ = ["FolderLock", "locked"]

logger = logging.getLogger(__name__)

_PATIENCE = 120.0  # seconds; what is done under a lock takes milliseconds
_SILENT = 1.0  # seconds to wait without saying so


class FolderLock:
    """An exclusive lock on a folder, which it keeps if the folder is renamed.

    Args:
        folder: exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def acquire(self) -> bool | None:
        """Takes the lock if it is free.

        Returns:
            True with the lock, False if another holds it, None where there are no locks.
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
        """Who holds the lock, as far as the kernel says."""
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
        """Gives the lock back, if it was taken, and closes the folder."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@contextmanager
def locked(folder: Path, purpose: str) -> Iterator[None]:
    """Holds the lock of a folder; waits for it if another holds it.

    Args:
        folder: exists.
        purpose: what it is for, for messages.

    Raises:
        TimeoutError: if it is not free after two minutes; the message says who holds it.
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
                logger.warning("%s: waiting for %s, which saves there", purpose, lock.holder())
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
