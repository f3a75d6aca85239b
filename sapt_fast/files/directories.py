"""Files and folders that are either whole or absent: write to a neighbour, then rename."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from sapt_fast.files.locks import FolderLock, locked

__all__ = [
    "atomic_write_bytes",
    "atomic_write_text",
    "read_directory",
    "replace_directory",
    "require_replaceable",
    "whole_directory",
]

logger = logging.getLogger(__name__)

_Content = TypeVar("_Content")

_TRIES = 20  # looks at a folder that is replaced meanwhile
# What earlier versions wrote under names that are shared by all writers.
_OUR_FILES = (
    "sapt_config.json",
    "router.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
)


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

    The folder is filled as a hidden neighbour, `.<name>.saving.<random>`. Files of others in `path`
    are then added to it as hard links (copies, where the file system has none). At last `path` is
    renamed to `.<name>.previous`, the new folder to `path`, and the previous one is deleted.
    Whenever the process is killed, the old or the new content is there whole: as `path`, or,
    between the two renames, as `.<name>.previous`, where `whole_directory` finds it and from where
    the next `replace_directory` takes it back. An exception leaves `path` as it was.

    Several processes of one host may write into one folder: each fills its own, and they take
    turns to put it in place, so that the last one's stays. They lock the folder that holds `path`
    for that (see `sapt_fast.files.locks`, also for NFS). What a killed writer has left is deleted
    by the next one; files and folders of others under such names are left alone.

    Args:
        path: target folder; a symbolic link is followed. Missing parents are created.
        replaces: given an existing folder, the files (relative paths) that an earlier call wrote
            into it and that are not carried over; may raise.

    Raises:
        ValueError: `path` is a mount point, or is or holds the working directory, none of which
            can be renamed.
        NotADirectoryError: `path` is a file.
        FileExistsError: a file of others has the name of a new one.
        TimeoutError: another process keeps the lock for longer than any save takes.
        OSError: the folder cannot be written.
    """
    target = Path(os.path.realpath(path))
    require_replaceable(target)
    parent = target.parent
    parent.mkdir(parents=True, exist_ok=True)
    with locked(parent, str(target)):
        _recover(target, replaces)
        if target.exists():
            set(replaces(target))  # raises before anything is written
        fresh = _hidden(target, "saving", secrets.token_hex(6))
        fresh.mkdir()
        writing = FolderLock(fresh)  # by which others see that its writer lives
        writing.acquire()
    try:
        yield fresh
        for folder, _, names in os.walk(fresh):
            for name in (*names, "."):
                _sync(Path(folder, name))
        with locked(parent, str(target)):
            _recover(target, replaces)
            _put_in_place(fresh, target, replaces)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    finally:
        writing.release()


def require_replaceable(path: str | os.PathLike[str]) -> None:
    """Raises as `replace_directory` does for a path that it can never replace."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"directory: {target} is a file, expected a folder")
    if os.path.ismount(target) or Path.cwd().is_relative_to(target):
        raise ValueError(
            f"directory: {target} is a mount point or the working directory (or holds it) and "
            "cannot be replaced; choose a folder inside it"
        )


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
    for _ in range(_TRIES):
        if (target / file).is_file():
            return target
        previous = next((p for p in _previous_ones(target) if (p / file).is_file()), None)
        if previous is None and (target.exists() or not _is_saved_now(target.parent)):
            break
        if previous is not None and not _is_saved_now(target.parent):
            logger.warning(
                "%s: saving was interrupted; reading what was there, %s", target, previous
            )
            return previous
        time.sleep(0.001)
    if (target / file).is_file():  # put in place between the looks
        return target
    raise FileNotFoundError(f"{target / file if target.exists() else target} is missing")


def read_directory(
    path: str | os.PathLike[str], file: str, read: Callable[[Path], _Content]
) -> _Content:
    """What `read` makes of the folder `whole_directory(path, file)`, all from one state of it.

    Where a `replace_directory` puts another folder in its place in the meantime, it is read again.

    Args:
        path, file: as in `whole_directory`.
        read: reads the files of the folder that it is given.

    Raises:
        FileNotFoundError: as `whole_directory`.
        Exception: whatever `read` raises of a folder that stayed in place.
    """
    for _ in range(_TRIES):
        folder = whole_directory(path, file)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:  # the open folder keeps its inode number from being given to another
            content = read(folder)
            if _is_still(folder, descriptor):
                return content
        except (OSError, ValueError):
            if _is_still(folder, descriptor):
                raise
        finally:
            os.close(descriptor)
    with locked(Path(os.path.realpath(path)).parent, str(path)):
        return read(whole_directory(path, file))


def _hidden(target: Path, kind: str, mark: str = "") -> Path:
    return target.with_name(f".{target.name}.{kind}" + (f".{mark}" if mark else ""))


def _marked(target: Path, kind: str) -> list[Path]:
    """Folders with a hidden name that only `replace_directory` gives."""
    name = re.compile(re.escape(_hidden(target, kind).name) + r"\.[0-9a-f]{12}")
    try:
        found = [entry.name for entry in os.scandir(target.parent) if name.fullmatch(entry.name)]
    except FileNotFoundError:
        return []
    paths = [target.with_name(entry) for entry in sorted(found)]
    return [path for path in paths if path.is_dir() and not path.is_symlink()]


def _previous_ones(target: Path) -> list[Path]:
    """Where the previous content may be after a kill."""
    return [_hidden(target, "previous"), *_marked(target, "previous")]


def _is_saved_now(parent: Path) -> bool:
    """Whether a process is just putting a folder in place."""
    try:
        lock = FolderLock(parent)
    except OSError:
        return False
    try:
        return lock.acquire() is False
    finally:
        lock.release()


def _is_still(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(folder), os.fstat(descriptor))
    except OSError:
        return False


def _put_in_place(fresh: Path, target: Path, replaces: Callable[[Path], Iterable[str]]) -> None:
    if not target.exists():
        os.rename(fresh, target)
        _sync(target.parent)
        return
    replaced = set(replaces(target))
    _carry_over(target, fresh, replaced)
    previous = _hidden(target, "previous")
    # Without files of ours it could not be told from a folder of someone else's.
    if os.path.lexists(previous) or not replaced:
        previous = _hidden(target, "previous", secrets.token_hex(6))
    os.rename(target, previous)
    try:
        os.rename(fresh, target)
    except BaseException:
        os.rename(previous, target)
        raise
    _sync(target.parent)
    _discard(previous, target)


def _recover(target: Path, replaces: Callable[[Path], Iterable[str]]) -> None:
    """Takes back or deletes what killed writers have left; the parent is locked."""
    for path in _marked(target, "saving"):
        lock = FolderLock(path)
        if lock.acquire() is True:
            shutil.rmtree(path, ignore_errors=True)
        lock.release()
    shared = _hidden(target, "previous")
    for previous in _previous_ones(target):
        if not previous.is_dir() or previous.is_symlink():
            continue
        ours = _files_of(previous, replaces)
        if previous == shared and not ours:
            continue  # someone else's
        if target.exists():
            _carry_over(previous, target, set(ours), keep=True)
            _discard(previous, target)
        else:
            os.rename(previous, target)
    _delete_shared_leftover(target)


def _files_of(folder: Path, replaces: Callable[[Path], Iterable[str]]) -> list[str]:
    try:
        return list(replaces(folder))
    except (OSError, ValueError) as error:
        logger.warning("%s: not recognised (%s)", folder, error)
        return []


def _delete_shared_leftover(target: Path) -> None:
    """Deletes `.<name>.saving` of an earlier version, if nothing in it is someone else's."""
    folder = _hidden(target, "saving")
    if not folder.is_dir() or folder.is_symlink():
        return
    files = [Path(place, name) for place, _, names in os.walk(folder) for name in names]
    for file in files:
        linked = target / file.relative_to(folder)
        if file.name not in _OUR_FILES and not (
            linked.exists() and not file.is_symlink() and linked.samefile(file)
        ):
            return
    if files:
        shutil.rmtree(folder, ignore_errors=True)


def _discard(folder: Path, target: Path) -> None:
    """Deletes a folder such that a part of it is never found under its own name."""
    waste = _hidden(target, "saving", secrets.token_hex(6))
    os.rename(folder, waste)
    shutil.rmtree(waste, ignore_errors=True)


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
