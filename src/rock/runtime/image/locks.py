"""Locks between processes and small atomic files: what makes the store safe for any number of processes.

A lock is flock(2) on an open file or folder, so the kernel drops it with its last descriptor: there are no stale locks.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rock.errors import ImageError, StorageFull
from rock.runtime.diskerrors import FULL

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of `path`, waiting for it. The file stays: removing it would split the lock in two."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Take the lock of an open file or folder if nobody is in the way."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_atomic(path: Path, data: bytes) -> None:
    """Put `data` in the place of `path` at once, and on the disk: it is there whole, or not at all."""
    fd, temporary = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Put a folder's entries (a rename, for one) on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(fd: int) -> None:
    """Put on the disk all that was written to the file system of `fd`: one syncfs(2) for many thousand files."""
    if _libc.syncfs(fd) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextmanager
def storing(what: str) -> Iterator[None]:
    """Turn the errors of a disk into ours: full is StorageFull, anything else an ImageError, both naming `what`."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageFull(f"no space left while {what}", hint="free some disk space, `rock image rm` for one, "
                              "and try again; nothing half-made was kept") from error
        raise ImageError(f"{what}: {error.strerror or error}: {error.filename or ''}".rstrip(": ")) from error
