"""User namespaces: uid 0 inside is an ordinary, otherwise unused uid outside. Standard library only.

As root each sandbox gets a range of 65536 ids of its own. The namespace of a range is made once, by a child that only
lives until the mapping is written, and kept as a descriptor.
"""

from __future__ import annotations

import os

from rock.runtime.namespace import kernel

FIRST = 200_000
RANGE = 65_536
MOST = ((1 << 32) - 2 - FIRST) // RANGE


class Ranges:
    """Descriptors of user namespaces by their first id; the least recently made go first when there are many."""

    def __init__(self, *, single: bool, keep: int = 512) -> None:
        """single: there is one id to map, our own; then a range is only a number."""
        self._single = single
        self._keep = keep
        self._fds: dict[int, int] = {}

    def get(self, base: int) -> int:
        """The namespace that maps 0..65535 inside to base..base+65535 outside."""
        fd = self._fds.get(base)
        if fd is None:
            while len(self._fds) >= self._keep:
                os.close(self._fds.pop(next(iter(self._fds))))
            text = "0 0 1\n" if self._single else f"0 {base} {RANGE}\n"
            fd = self._fds[base] = make(text, text)
        return fd

    def __contains__(self, base: int) -> bool:
        return base in self._fds


def make(uid_map: str, gid_map: str) -> int:
    """A new user namespace with these maps, as a descriptor. Needs CAP_SETUID and CAP_SETGID out here."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = kernel.fork_into(kernel.CLONE_NEWUSER)
    if pid == 0:
        try:
            os.close(writing)
            os.read(reading, 1)  # until the parent has written the maps, or is gone
        finally:
            os._exit(0)
    os.close(reading)
    try:
        _write(f"/proc/{pid}/uid_map", uid_map)
        _write(f"/proc/{pid}/gid_map", gid_map)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(writing)
        os.waitpid(pid, 0)


def become_root(uid: int, gid: int) -> None:
    """After unshare(CLONE_NEWUSER): map the one id that an ordinary user may map, to 0."""
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"0 {uid} 1\n")
    _write("/proc/self/gid_map", f"0 {gid} 1\n")


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
