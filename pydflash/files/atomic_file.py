"""Write a file beside the one it replaces and rename it when it is complete, so that no failure costs a good file.

While a file is written it is called ``.NAME.<16 hex digits>.partial`` and its writer holds a lock on it (flock). The
system drops the lock when the writer dies, by whatever cause, so the next writer of the same path can tell what a dead
one left from the work of a live one, in another container too, where process ids say nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pydflash.arguments import a_path
from pydflash.errors import PydflashError, WriteError

__all__ = ["check_output", "replacing"]

_LONGEST_NAME = 200  # bytes of NAME that are kept; most file systems allow 255 in all


@contextmanager
def replacing(path: str | Path, inputs: Iterable[str | Path] = (), *, private: bool = False) -> Iterator[BinaryIO]:
    """A new file, open for writing, that takes the place of ``path`` when the block ends; if the block raises, ``path``
    stays as it was.

    A symlink is followed: the file it points to is replaced. ``inputs``: files the block reads, which ``path`` must not
    be. Permissions are those of the file replaced, or the usual ones for a new file; ``private``: only the owner's.
    When the block has ended, file and folder are on the disk. Raises what :func:`check_output` does, and WriteError for
    any OSError.
    """
    target = check_output(path, inputs)
    try:
        _sweep(target)
        file, partial = _create(target, private)
        with file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, target)
            except BaseException:
                with suppress(OSError):
                    partial.unlink()
                raise
        _sync_folder(target.parent)
    except PydflashError:
        raise
    except OSError as error:
        message = f"{path}: cannot be written: {error}; check the folder's permissions and free space"
        raise _failure(message, error.errno) from error


def check_output(path: str | Path, inputs: Iterable[str | Path] = ()) -> Path:
    """The file that ``path`` names, symlinks followed. Says before any work is done that it cannot be written.

    Raises WriteError where ``path`` exists and is no regular file, is read-only, or is one of ``inputs`` by whatever
    name (symlink or hard link), and where there is no folder for it.
    """
    path = a_path(path, "path")
    target = Path(os.path.realpath(path))
    try:
        found = os.stat(path)
    except FileNotFoundError:
        if not target.parent.is_dir():
            message = f"{path} was asked for, but there is no folder {target.parent}; make it first"
            raise _failure(message, errno.ENOENT) from None
        return target
    except OSError as error:
        raise _failure(f"{path}: cannot be written: {error}; give another path", error.errno) from error
    if not stat.S_ISREG(found.st_mode):
        raise _failure(f"{path}: is no regular file and is not replaced by one; give another path", errno.EEXIST)
    if not os.access(target, os.W_OK):
        raise _failure(f"{path}: is read-only; give another path or chmod u+w it first", errno.EACCES)
    for source in inputs:
        if _is_same(found, source):
            message = f"{path}: the output is the input {source}, which it would destroy; give another path"
            raise _failure(message, errno.EEXIST)
    return target


def _is_same(found: os.stat_result, path: str | Path) -> bool:
    try:
        return os.path.samestat(found, os.stat(path))
    except OSError:  # an input that is not there is the reader's concern
        return False


# --- the partial file -------------------------------------------------------------------------------------------------


def _create(target: Path, private: bool) -> tuple[BinaryIO, Path]:
    """A partial file of ``target``, open and locked. It never has more permissions than the finished file."""
    mode = 0o600 if private else _mode(target)
    while True:
        partial = target.with_name(f"{_prefix(target)}{secrets.token_hex(8)}.partial")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(partial, flags, 0o666 if mode is None else mode)
        file = os.fdopen(descriptor, "w+b")
        if not _lock(descriptor, wait=True) or os.fstat(descriptor).st_nlink:
            break
        file.close()  # another writer took it for a dead one's in the instant before the lock
    try:
        if mode is not None:
            os.fchmod(descriptor, mode)  # the umask is for new files
    except BaseException:
        file.close()
        partial.unlink()
        raise
    return file, partial


def _mode(target: Path) -> int | None:
    """The permissions of the file that is there."""
    try:
        return target.stat().st_mode & 0o777
    except FileNotFoundError:
        return None


def _sweep(target: Path) -> None:
    """Remove partial files of ``target`` whose writers are dead."""
    name = re.compile(re.escape(_prefix(target)) + "[0-9a-f]{16}\\.partial")
    found: list[str] = []
    with suppress(OSError):  # a folder may be writable and not readable
        found = [entry for entry in os.listdir(target.parent) if name.fullmatch(entry)]
    for partial in found:
        with suppress(OSError):  # another user's, or just renamed by its writer
            _remove_dead(target.with_name(partial))


def _remove_dead(partial: Path) -> None:
    """Remove a partial file unless its writer lives."""
    descriptor = os.open(partial, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if _lock(descriptor, wait=False):
            partial.unlink()
    finally:
        os.close(descriptor)


def _prefix(target: Path) -> str:
    return f".{os.fsdecode(os.fsencode(target.name)[:_LONGEST_NAME])}."


def _lock(descriptor: int, wait: bool) -> bool:
    """Whether this process has the lock now; False too where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Put a rename on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems sync no folders
            raise
    finally:
        os.close(descriptor)


def _failure(message: str, number: int | None) -> WriteError:
    """``number``: of the system's error that this one stands for (errno)."""
    failure = WriteError(message)
    failure.errno = number
    return failure
