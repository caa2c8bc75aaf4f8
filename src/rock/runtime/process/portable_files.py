"""Files of this machine for a runtime without a pid 1, by portable Unix calls. Paths are the host's own."""

from __future__ import annotations

import errno
import os
import secrets
import stat as modes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from rock import errors
from rock.guest.init.files import make_parents
from rock.guest.init.remove import remove_tree
from rock.runtime.base import FileStat
from rock.runtime.refusals import is_a_folder, no_such_path, not_absolute, not_regular

_ERRORS: dict[int, type[errors.RockError]] = {
    errno.ENOENT: errors.NotFound, errno.EACCES: errors.PermissionDenied,
    errno.EPERM: errors.PermissionDenied, errno.EROFS: errors.PermissionDenied,
    errno.EEXIST: errors.Conflict, errno.ENOTDIR: errors.Conflict, errno.EISDIR: errors.Conflict,
    errno.ENOTEMPTY: errors.Conflict, errno.ENOSPC: errors.StorageFull, errno.EDQUOT: errors.StorageFull,
}  # fmt: skip
_KINDS: list[tuple[Callable[[int], bool], Literal["file", "directory", "symlink", "fifo", "socket"]]] = [
    (modes.S_ISREG, "file"), (modes.S_ISDIR, "directory"), (modes.S_ISLNK, "symlink"), (modes.S_ISFIFO, "fifo"),
    (modes.S_ISSOCK, "socket"),
]  # fmt: skip


@contextmanager
def told(path: str) -> Iterator[None]:
    """Check a path, and convert OSError to project errors."""
    if not path.startswith("/") or "\0" in path:
        raise not_absolute(path)
    try:
        yield
    except OSError as error:
        kind = _ERRORS.get(error.errno or 0, errors.InvalidConfig)
        raise kind(f"{path!r}: {(error.strerror or str(error)).lower()}") from None


def open_read(path: str) -> int:
    with told(path):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        return _regular(fd, path)


def _regular(fd: int, path: str) -> int:
    mode = os.fstat(fd).st_mode
    if modes.S_ISREG(mode):
        os.set_blocking(fd, True)
        return fd
    os.close(fd)
    if modes.S_ISDIR(mode):
        raise is_a_folder(path)
    raise not_regular(path)


def open_write(path: str, *, append: bool, mode: int | None, parents: bool) -> tuple[int, str]:
    """(descriptor, token); the token holds the new file's path and the old one's."""
    with told(path):
        if parents:
            make_parents(os.path.dirname(path) or "/")
        real = os.path.realpath(path)
        try:
            old: os.stat_result | None = os.lstat(real)
        except FileNotFoundError:
            old = None
        if old is not None and modes.S_ISDIR(old.st_mode):
            raise is_a_folder(path)
        if old is not None and not modes.S_ISREG(old.st_mode):
            raise not_regular(path)
        if append:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
            return _regular(os.open(real, flags, 0o644 if mode is None else mode), path), ""
        fresh = os.path.join(os.path.dirname(real), f".rock-{secrets.token_hex(8)}")
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        os.fchmod(fd, mode if mode is not None else modes.S_IMODE(old.st_mode) if old is not None else 0o644)
        return fd, f"{fresh}\0{real}"


def commit(token: str) -> None:
    fresh, _, real = token.partition("\0")
    with told(real):
        os.replace(fresh, real)


def abort(token: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(token.partition("\0")[0])


def stat(path: str, *, follow: bool) -> FileStat:
    with told(path):
        try:
            found = os.stat(path, follow_symlinks=follow)
        except FileNotFoundError:
            raise no_such_path(path) from None
        return _described(os.path.basename(path.rstrip("/")) or "/", path, found)


def _described(name: str, path: str, found: os.stat_result) -> FileStat:
    kind = next((kind for is_kind, kind in _KINDS if is_kind(found.st_mode)), "device")
    target = os.readlink(path) if kind == "symlink" else None
    return FileStat(name, kind, found.st_size, modes.S_IMODE(found.st_mode), found.st_uid, found.st_gid,  # type: ignore[arg-type]
                    found.st_mtime, target)


def list_folder(path: str, offset: int, limit: int) -> list[FileStat]:
    with told(path):
        names = sorted(os.listdir(path))[offset : offset + limit]
        entries = []
        for name in names:
            with suppress(FileNotFoundError):
                entry = os.path.join(path, name)
                entries.append(_described(name, entry, os.lstat(entry)))
        return entries


def remove(path: str, *, recursive: bool) -> None:
    with told(path):
        if os.path.realpath(path) == "/":
            raise errors.InvalidConfig("the folder / cannot be removed", hint="remove the entries below it by name")
        if not modes.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
        elif recursive:
            remove_tree(path)
        else:
            os.rmdir(path)


def make_dir(path: str, *, parents: bool, mode: int) -> None:
    with told(path):
        if parents and os.path.isdir(path):
            return
        if parents:
            make_parents(os.path.dirname(path) or "/")
        os.mkdir(path)
        os.chmod(path, mode)


def symlink(target: str, path: str) -> None:
    with told(path):
        os.symlink(target, path)


def move(source: str, target: str) -> None:
    with told(target), told(source):
        os.rename(source, target)


def each(path: str, recursive: bool, act: Callable[[str], None]) -> None:
    """Apply an operation to a file, and to everything below it; links are skipped."""
    with told(path):
        act(path)
        for folder, folders, files in os.walk(path) if recursive else ():
            for name in (*folders, *files):
                entry = os.path.join(folder, name)
                if not os.path.islink(entry):
                    act(entry)
