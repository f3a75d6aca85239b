"""Files and folders that are either whole or absent: write to a neighbour, then rename."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_write_bytes", "atomic_write_text", "replace_directory", "whole_directory"]

logger = logging.getLogger(__name__)


def is_folder_name(name: str) -> bool:
    """Whether `name` can be a folder beside others: not empty, no path, not `.` or `..`."""
    return bool(name) and os.path.basename(name) == name and name not in (".", "..")


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part.

    Missing parent folders are created. A failure or a kill leaves the old file as it was.

    Args:
        path: target file.
        data: its whole content.

    Returns:
        `path` as a `Path`.

    Raises:
        TypeError: `data` is not bytes.
        OSError: the folder cannot be written.
    """
    if not isinstance(data, bytes):
        raise TypeError(f"data must be bytes, got {type(data).__name__}")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Same folder, hence same filesystem: only there is the rename atomic.
    partial = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return target


def atomic_write_text(path: str | os.PathLike[str], text: str) -> Path:
    """`atomic_write_bytes` of `text` as UTF-8, line ends as given.

    Args:
        path: target file.
        text: its whole content.

    Returns:
        `path` as a `Path`.

    Raises:
        TypeError: `text` is not a string.
        OSError: the folder cannot be written.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, got {type(text).__name__}")
    return atomic_write_bytes(path, text.encode("utf-8"))


@contextmanager
def replace_directory(
    path: str | os.PathLike[str], replaces: Callable[[Path], Iterable[str]]
) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends it takes the place of `path` as a whole.

    The folder is filled as the hidden neighbour `.<name>.saving`. Files of others in `path` are
    then added to it as hard links (copies, where the file system has none). At last `path` is
    renamed to `.<name>.previous`, the new folder to `path`, and the previous one is deleted.
    Whenever the process is killed, the old or the new content is there whole: as `path`, or,
    between the two renames, as `.<name>.previous`, where `whole_directory` finds it and from where
    the next `replace_directory` takes it back. An exception leaves `path` as it was. Only one
    process at a time may write into the folder.

    Args:
        path: target folder; a symbolic link is followed. Missing parents are created.
        replaces: given an existing folder, the files (relative paths) that an earlier call wrote
            into it and that are not carried over; may raise.

    Raises:
        ValueError: `path` is a mount point, or is or holds the working directory, none of which
            can be renamed.
        NotADirectoryError: `path` is a file.
        FileExistsError: a file of others has the name of a new one.
        OSError: the folder cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"directory: {target} is a file, expected a folder")
    if os.path.ismount(target) or Path.cwd().is_relative_to(target):
        raise ValueError(
            f"directory: {target} is a mount point or the working directory (or holds it) and "
            "cannot be replaced; choose a folder inside it"
        )
    fresh, previous = target.with_name(f".{target.name}.saving"), _previous(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if fresh.exists():
        shutil.rmtree(fresh)
    if previous.exists():
        if target.exists():
            _carry_over(previous, target, set(replaces(previous)), keep=True)
            _discard(previous, fresh)
        else:
            os.rename(previous, target)
    replaced = set(replaces(target)) if target.exists() else set()
    fresh.mkdir()
    try:
        yield fresh
        for folder, _, names in os.walk(fresh):
            for name in (*names, "."):
                _sync(Path(folder, name))
        if target.exists():
            _carry_over(target, fresh, replaced)
            os.rename(target, previous)
        os.rename(fresh, target)
    except BaseException:
        if previous.exists() and not target.exists():
            os.rename(previous, target)
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    _sync(target.parent)
    if previous.exists():
        _discard(previous, fresh)


def whole_directory(path: str | os.PathLike[str], file: str) -> Path:
    """The folder to read for `path`: itself, or what a `replace_directory` that was killed between
    its renames has left beside it.

    Args:
        path: a folder.
        file: the name of a file that a whole folder has.

    Raises:
        FileNotFoundError: the folder or the file is missing.
    """
    target = Path(os.path.realpath(path))
    previous = _previous(target)
    if (target / file).is_file():
        return target
    if (previous / file).is_file():
        logger.warning("%s: saving was interrupted; reading what was there, %s", target, previous)
        return previous
    raise FileNotFoundError(f"{target / file if target.exists() else target} is missing")


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _discard(folder: Path, waste: Path) -> None:
    """Deletes a folder such that a part of it is never found under its own name."""
    os.rename(folder, waste)
    shutil.rmtree(waste)


def _carry_over(source: Path, target: Path, left_out: set[str], *, keep: bool = False) -> None:
    """Adds a folder's files to another; one that exists there stays if `keep`, else raises."""
    for folder, folders, names in os.walk(source):
        relative = Path(folder).relative_to(source)
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for name in (*names, *links):
            if (relative / name).as_posix() in left_out:
                continue
            copy = target / relative / name
            if os.path.lexists(copy):
                if keep:
                    continue
                raise FileExistsError(
                    f"directory: {source / relative / name} has the name of a file to be saved; "
                    "move it away or choose another folder"
                )
            copy.parent.mkdir(parents=True, exist_ok=True)
            _link(Path(folder, name), copy)
        if not folders and not names:
            (target / relative).mkdir(parents=True, exist_ok=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # no hard links here, or none to this file
        shutil.copy2(source, target, follow_symlinks=False)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
