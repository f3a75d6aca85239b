"""Writes files and folders atomically: to a temporary neighbour, which is then renamed."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator
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

_TRIES = 20  # attempts to read a folder while others replace it
# Files that earlier versions wrote into a temporary folder with a fixed name.
_OUR_FILES = (
    "sapt_config.json",
    "router.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
)


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Writes a file so that readers see the old content or the new one, never a part.

    Missing parent folders are created. After an error or a kill, the old file is unchanged.

    Args:
        path: the file.
        data: its new content.

    Returns:
        `path` as a `Path`.

    Raises:
        TypeError: if `data` is not bytes.
        OSError: if the folder cannot be written.
    """
    if not isinstance(data, bytes):
        raise TypeError(f"data: got {type(data).__name__}, expected bytes")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because renaming is atomic only within one file system.
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
    """Writes text as UTF-8 like `atomic_write_bytes`; line ends are kept.

    Args:
        path: the file.
        text: its new content.

    Returns:
        `path` as a `Path`.

    Raises:
        TypeError: if `text` is not a string.
        OSError: if the folder cannot be written.
    """
    if not isinstance(text, str):
        raise TypeError(f"text: got {type(text).__name__}, expected a string")
    return atomic_write_bytes(path, text.encode("utf-8"))


@contextmanager
def replace_directory(
    path: str | os.PathLike[str], replaces: Callable[[Path], Iterable[str]]
) -> Iterator[Path]:
    """Yields an empty folder to fill, and replaces `path` by it when the block ends.

    1. The caller fills a hidden neighbour, `.<name>.saving.<random>`.
    2. Other files in `path` are added to it as hard links (as copies, if the file system does not
       support hard links).
    3. `path` is renamed to `.<name>.previous`, and the new folder to `path`.
    4. The previous folder is deleted.

    If the process is killed, the old or the new content is complete: at `path`, or, between the two
    renames, at `.<name>.previous`. `whole_directory` finds it, and the next `replace_directory`
    restores it. After an exception, `path` is unchanged.

    Several processes of one host may write into one folder. Each fills its own, and they take turns
    at replacing `path`; the last one wins. For this they lock the parent of `path` (see
    `sapt_fast.files.locks`, also for NFS). The next writer deletes what a killed one has left.
    Other files and folders with such names are not touched.

    Args:
        path: the folder; a symbolic link is followed. Missing parents are created.
        replaces: called with an existing folder; returns the files (relative paths) that an
            earlier call wrote into it, which are not kept; may raise.

    Raises:
        ValueError: if `path` is a mount point, the working directory or a parent of it, which
            cannot be renamed.
        NotADirectoryError: if `path` is a file.
        FileExistsError: if another file has the name of a new one.
        TimeoutError: if another process keeps the lock for two minutes.
        OSError: if the folder cannot be written.
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
        writing = FolderLock(fresh)  # shows others that its writer is alive
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


def require_unused(argument: str, folder: Path, file: str, ours: Collection[str] = ()) -> None:
    """Raises FileExistsError if a folder without `file` has other files that are not hidden.

    Args:
        argument: the name of the argument, for the message.
        folder: may be missing.
        file: what marks a folder of the caller.
        ours: names that may be there already.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    others = sorted(name for name in names if name not in ours and name[0] != ".")
    if others:
        raise FileExistsError(
            f"{argument}: {folder} has no {file} but contains {', '.join(others[:5])}; choose an "
            "empty folder"
        )


def require_replaceable(path: str | os.PathLike[str]) -> None:
    """Checks that `replace_directory` could replace a path.

    Raises:
        ValueError: if it is a mount point, the working directory or a parent of it.
        NotADirectoryError: if it is a file.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"directory: {target} is a file, expected a folder")
    if os.path.ismount(target) or Path.cwd().is_relative_to(target):
        raise ValueError(
            f"directory: {target} cannot be replaced, because it is a mount point, the working "
            "directory or a parent of it; choose a folder inside it"
        )


def whole_directory(path: str | os.PathLike[str], file: str) -> Path:
    """Returns the folder to read for `path`.

    It is `path`, or the previous folder if a `replace_directory` was killed between its renames.

    Args:
        path: the folder.
        file: the name of a file that every complete folder contains.

    Raises:
        FileNotFoundError: if the folder or the file is missing.
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
                "%s: saving was interrupted; reading the previous content, %s", target, previous
            )
            return previous
        time.sleep(0.001)
    if (target / file).is_file():  # replaced between the checks
        return target
    raise FileNotFoundError(f"{target / file if target.exists() else target} is missing")


def read_directory(
    path: str | os.PathLike[str], file: str, read: Callable[[Path], _Content]
) -> _Content:
    """Reads the folder `whole_directory(path, file)` in one consistent state.

    If a `replace_directory` replaces the folder in the meantime, it is read again.

    Args:
        path, file: as in `whole_directory`.
        read: reads the files of a folder and returns the result.

    Returns:
        The return value of `read`.

    Raises:
        FileNotFoundError: as `whole_directory`.
        Exception: any exception of `read`, if the folder was not replaced.
    """
    for _ in range(_TRIES):
        folder = whole_directory(path, file)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:  # while the folder is open, its inode number is not reused
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
    """Returns folders with a hidden name of `replace_directory`."""
    name = re.compile(re.escape(_hidden(target, kind).name) + r"\.[0-9a-f]{12}")
    try:
        found = [entry.name for entry in os.scandir(target.parent) if name.fullmatch(entry.name)]
    except FileNotFoundError:
        return []
    paths = [target.with_name(entry) for entry in sorted(found)]
    return [path for path in paths if path.is_dir() and not path.is_symlink()]


def _previous_ones(target: Path) -> list[Path]:
    """Returns folders that may have the previous content after a kill."""
    return [_hidden(target, "previous"), *_marked(target, "previous")]


def _is_saved_now(parent: Path) -> bool:
    """Returns whether a process is replacing a folder of this parent now."""
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
    # A folder without our files could not be recognised later.
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
    """Restores or deletes what killed writers have left; the parent is locked."""
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
            continue  # not ours
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
    """Deletes `.<name>.saving` of an earlier version, if it contains only our files."""
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
    """Renames a folder before deleting it, so that its name never refers to a part of it."""
    waste = _hidden(target, "saving", secrets.token_hex(6))
    os.rename(folder, waste)
    shutil.rmtree(waste, ignore_errors=True)


def _carry_over(source: Path, target: Path, left_out: set[str], *, keep: bool = False) -> None:
    """Adds a folder's files to another; an existing file is kept if `keep`, else it raises."""
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
                    "move it, or choose another folder"
                )
            copy.parent.mkdir(parents=True, exist_ok=True)
            _link(Path(folder, name), copy)
        if not folders and not names:
            (target / relative).mkdir(parents=True, exist_ok=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # no hard links on this file system, or none to this file
        shutil.copy2(source, target, follow_symlinks=False)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
