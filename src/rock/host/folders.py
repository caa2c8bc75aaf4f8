"""Opens folders whose paths others may change: openat2(2), which resolves a path under stated rules. Standard library
only, because the launcher of sandboxes imports it."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct
from typing import Any

_OPENAT2 = 437
_FOLDER = os.O_DIRECTORY | os.O_CLOEXEC | getattr(os, "O_PATH", 0)

NO_XDEV = 0x01  # stays on one mount
NO_MAGICLINKS = 0x02
NO_SYMLINKS = 0x04
BENEATH = 0x08  # rejects paths that lead out of the folder
IN_ROOT = 0x10  # the folder is the root of the path


@functools.cache
def _syscall() -> Any:
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    return call


def open_under(folder: int, path: str, rules: int, flags: int = _FOLDER) -> int:
    """A descriptor (O_PATH) of the folder at `path`, relative to the descriptor `folder`, under these rules. OSError:
    ELOOP for a rejected link, EXDEV for a path that leads out, ENOTDIR for a file, ENOSYS before Linux 5.6."""
    how = ctypes.create_string_buffer(struct.pack("=QQQ", flags, 0, rules), 24)
    fd = int(_syscall()(ctypes.c_long(_OPENAT2), ctypes.c_long(folder), ctypes.c_char_p(os.fsencode(path) or b"."),
                        how, ctypes.c_long(24)))  # fmt: skip
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return fd


def open_listed(listed: str, path: str) -> int:
    """A descriptor of the folder at `path` relative to the folder `listed`; no symbolic link is followed in either.
    `listed` is absolute. OSError as of `open_under`."""
    root = os.open("/", _FOLDER)
    try:
        top = open_under(root, listed.strip("/"), NO_SYMLINKS | BENEATH)
    finally:
        os.close(root)
    try:
        return open_under(top, path, NO_SYMLINKS | BENEATH)
    finally:
        os.close(top)


def open_place(root: int, path: str, *, mounted: bool) -> int:
    """A descriptor (O_PATH) of the file or folder at `path` in a tree whose root is `root`; no symbolic link is
    followed. mounted: what is mounted there, else what is below in the same mount."""
    rules = NO_SYMLINKS | BENEATH | (0 if mounted else NO_XDEV)
    return open_under(root, path.strip("/"), rules, _FOLDER & ~os.O_DIRECTORY)


def make_in_root(root: int, path: str) -> int:
    """A descriptor of the folder at `path` in a tree whose root is `root`; missing folders are created with mode 0755.

    Symbolic links are followed within the tree, and never into another mount. OSError: EXDEV for a path into another
    mount, ENOTDIR for a file or a dangling link.
    """
    rules = IN_ROOT | NO_XDEV | NO_MAGICLINKS
    done = ""
    fd = open_under(root, "", rules)
    for name in filter(None, path.split("/")):
        done = f"{done}/{name}"
        try:
            try:
                below = open_under(root, done, rules)
            except FileNotFoundError:
                try:
                    os.mkdir(name, 0o755, dir_fd=fd)
                except FileExistsError:
                    raise OSError(errno.ENOTDIR, "a link that leads nowhere", done) from None
                below = open_under(root, done, rules)
        finally:
            os.close(fd)
        fd = below
    return fd


def identities(fd: int) -> list[tuple[int, int]]:
    """Device and inode of a folder and of each folder above it, up to the root."""
    top = os.stat("/")
    found: list[tuple[int, int]] = []
    current = os.dup(fd)
    try:
        while True:
            info = os.fstat(current)
            found.append((info.st_dev, info.st_ino))
            if found[-1] == (top.st_dev, top.st_ino):
                return found
            above = os.open("..", _FOLDER, dir_fd=current)
            os.close(current)
            current = above
    finally:
        os.close(current)
