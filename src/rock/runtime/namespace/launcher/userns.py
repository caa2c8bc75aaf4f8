"""User namespaces: uid 0 inside is an ordinary, otherwise unused uid outside. Standard library only.

As root, each sandbox gets its own range of ids: 65536, or of a container in a user namespace (a pod with hostUsers:
false) 1024 of those that it has. The first id is also the creator of its namespace, so the
kernel's per-user counters count this sandbox only (runtime/namespace/limits/counters.py). The namespace of a range is
created once, by a child that exits when the mapping is written, and is held as a descriptor.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass

from rock.runtime.namespace.launcher import kernel
from rock.runtime.namespace.limits import counters

_FIRST = 200_000
_RANGE = 65_536
_SMALL = 1024  # ids of one range where there are few
_HIGHEST = 65_534
_ALL = (1 << 32) - 2


@dataclass(frozen=True)
class Layout:
    """The ids of this process's own user namespace, divided. first: of the first range. size: ids of a range. most:
    number of ranges. stranger: an id outside of every range, which owns no files. last: the highest id."""

    first: int
    size: int
    most: int
    stranger: int
    last: int

    @property
    def ping_groups(self) -> str:
        """All groups, as net.ipv4.ping_group_range."""
        return f"0 {min(self.last, (1 << 31) - 1)}"

    @property
    def end(self) -> int:
        """The first id after the last range."""
        return self.first + self.size * self.most

    def lines(self, base: int) -> str:
        """The map of the range that begins at `base`. The last id of a small one is that of user 65534."""
        if self.size > _HIGHEST:
            return f"0 {base} {self.size}\n"
        return f"0 {base} {self.size - 1}\n{_HIGHEST} {base + self.size - 1} 1\n"


def divided(count: int) -> Layout:
    """The layout of ids 0 to `count` - 1."""
    if count >= _FIRST + 1000 * _RANGE:
        return Layout(_FIRST, _RANGE, (count - _FIRST) // _RANGE, _FIRST - 1, count - 1)
    return Layout(_SMALL, _SMALL, max(0, count // _SMALL - 1), _SMALL - 1, max(0, count - 1))


def available(text: str) -> int:
    """How many ids from 0 on a map has, as /proc/self/uid_map shows it."""
    rows = sorted(tuple(int(word) for word in line.split()) for line in text.splitlines())
    count = 0
    for inside, _, length in rows:
        if inside != count:
            break
        count += length
    return min(count, _ALL)


def _layout() -> Layout:
    counts = []
    for name in ("uid_map", "gid_map"):
        try:
            with open(f"/proc/self/{name}") as file:
                counts.append(available(file.read()))
        except (OSError, ValueError):
            counts.append(_ALL)
    return divided(min(counts))


IDS = _layout()
Root = tuple[Callable[[], None], Callable[[], None]] | None


class Ranges:
    """Descriptors of user namespaces by their first id; the oldest are closed first when there are many."""

    def __init__(self, *, single: bool, settings: dict[str, int] | None = None, keep: int = 512,
                 root: Root = None) -> None:
        """single: there is only the server's own id to map; a range is then only a number. settings: of each namespace,
        as `counters.write` takes them. root: see `make`."""
        self._root = root
        self._single = single
        self._settings = settings or {}
        self._keep = keep
        self._fds: dict[int, int] = {}

    def get(self, base: int) -> int:
        """The namespace of the range that begins at `base`."""
        fd = self._fds.get(base)
        if fd is None:
            while len(self._fds) >= self._keep:
                os.close(self._fds.pop(next(iter(self._fds))))
            text = "0 0 1\n" if self._single else IDS.lines(base)
            fd = self._fds[base] = make(text, text, None if self._single else base, self._settings,
                                         self._root)
        return fd

    def __contains__(self, base: int) -> bool:
        return base in self._fds


def make(uid_map: str, gid_map: str, creator: int | None = None, settings: dict[str, int] | None = None,
         root: Root = None) -> int:
    """A new user namespace with these maps, as a descriptor. Requires CAP_SETUID and CAP_SETGID outside.

    creator: the user id that the kernel charges for its resources; None is the server's own. settings: see
    `counters.write`. root: functions that leave the root of this process for that of its namespace, and return to it:
    the kernel denies user namespaces elsewhere.
    """
    leave, enter = root or (_nothing, _nothing)
    reading, writing = os.pipe2(os.O_CLOEXEC)
    leave()
    try:
        pid = _fork(creator)
    finally:
        enter()
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


def _nothing() -> None:
    """The root of this process is that of its namespace."""


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


def become_root(namespaces: int = 0) -> None:
    """Enter a new user namespace, with other new `namespaces` (CLONE_NEW...), and map the single id that an ordinary
    user may map to 0."""
    uid, gid = os.geteuid(), os.getegid()
    kernel.unshare(kernel.CLONE_NEWUSER | namespaces)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"0 {uid} 1\n")
    _write("/proc/self/gid_map", f"0 {gid} 1\n")


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
