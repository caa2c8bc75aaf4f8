"""User namespaces: uid 0 inside is an ordinary, otherwise unused uid outside. Standard library only.

As root, each sandbox gets its own range of 65536 ids. The first id is also the creator of its namespace, so the
kernel's per-user counters count this sandbox only (runtime/namespace/limits/counters.py). The namespace of a range is
created once, by a child that exits when the mapping is written, and is held as a descriptor.
"""

from __future__ import annotations

import errno
import os

from rock.runtime.namespace.launcher import kernel
from rock.runtime.namespace.limits import counters

FIRST = 200_000
RANGE = 65_536
MOST = ((1 << 32) - 2 - FIRST) // RANGE


class Ranges:
    """Descriptors of user namespaces by their first id; the oldest are closed first when there are many."""

    def __init__(self, *, single: bool, settings: dict[str, int] | None = None, keep: int = 512) -> None:
        """single: there is only the server's own id to map; a range is then only a number. settings: of each namespace,
        as `counters.write` takes them."""
        self._single = single
        self._settings = settings or {}
        self._keep = keep
        self._fds: dict[int, int] = {}

    def get(self, base: int) -> int:
        """The namespace that maps 0..65535 inside to base..base+65535 outside."""
        fd = self._fds.get(base)
        if fd is None:
            while len(self._fds) >= self._keep:
                os.close(self._fds.pop(next(iter(self._fds))))
            text = "0 0 1\n" if self._single else f"0 {base} {RANGE}\n"
            fd = self._fds[base] = make(text, text, None if self._single else base, self._settings)
        return fd

    def __contains__(self, base: int) -> bool:
        return base in self._fds


def make(uid_map: str, gid_map: str, creator: int | None = None, settings: dict[str, int] | None = None) -> int:
    """A new user namespace with these maps, as a descriptor. Requires CAP_SETUID and CAP_SETGID outside.

    creator: the user id that the kernel charges for its resources; None is the server's own. settings: see
    `counters.write`.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = _fork(creator)
    if pid == 0:
        status = 1
        try:
            os.close(writing)
            os.read(reading, 1)  # until the parent has written the maps, or has ended
            counters.write(settings or {})
            status = 0
        finally:
            os._exit(status)
    os.close(reading)
    fd = -1
    try:
        _write(f"/proc/{pid}/uid_map", uid_map)
        _write(f"/proc/{pid}/gid_map", gid_map)
        fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(writing)
        _, status = os.waitpid(pid, 0)
    if status and settings:
        os.close(fd)
        raise OSError(errno.EPERM, "the limits of a user namespace could not be set")
    return fd


def _fork(creator: int | None) -> int:
    """A child in a new user namespace; the kernel records the effective user as its creator."""
    if creator is None:
        return kernel.fork_into(kernel.CLONE_NEWUSER)
    own, permitted = os.geteuid(), kernel.permitted()
    pid = -1
    try:
        os.seteuid(creator)
        kernel.capset(permitted)  # a host may deny user namespaces to processes without capabilities
        pid = kernel.fork_into(kernel.CLONE_NEWUSER)
    finally:
        if pid:  # the child is unmapped until its map is written, and must keep its ids
            os.seteuid(own)
            kernel.capset(permitted)
    return pid


def become_root(uid: int, gid: int) -> None:
    """After unshare(CLONE_NEWUSER): map the single id that an ordinary user may map to 0."""
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"0 {uid} 1\n")
    _write("/proc/self/gid_map", f"0 {gid} 1\n")


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
