"""Network namespaces of ended sandboxes that never used theirs: the kernel takes 2 ms to make and to remove one.

One that was used goes: its ports may rest for a minute, and its counters tell of who had it. Nothing else can stay in
it, as nobody inside has rights over it. Standard library only.
"""

from __future__ import annotations

import os

from rock.runtime.namespace import cgroups, kernel

_MOST = 16


class Nets:
    """Descriptors of untouched network namespaces, with loopback up.

    usable: whether we may come back from another one, which takes rights over the one that we come from.
    """

    def __init__(self, usable: bool) -> None:
        self.usable = usable
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._free: list[int] = []

    def take(self) -> int:
        """One that is the caller's from now on, or -1."""
        return self._free.pop() if self._free else -1

    def give(self, fd: int) -> None:
        """Keep the namespace of a sandbox in which nothing runs any more, or close it. OSError: we are lost in it."""
        wanted = self.usable and len(self._free) < _MOST and not os.path.sameopenfile(fd, self._home)
        if not wanted or not self._untouched(fd):
            os.close(fd)
        else:
            self._free.append(fd)

    def enter(self, fd: int) -> None:
        kernel.setns(fd, kernel.CLONE_NEWNET)

    def back(self) -> None:
        kernel.setns(self._home, kernel.CLONE_NEWNET)

    def _untouched(self, fd: int) -> bool:
        try:
            self.enter(fd)
        except OSError:
            return False
        try:
            devices = cgroups.read_text("/proc/thread-self/net/dev").splitlines()[2:]
            sockets = cgroups.read_text("/proc/thread-self/net/sockstat").split("\n", 1)[0]
        finally:
            self.back()
        idle = len(devices) == 1 and not any(int(number) for number in devices[0].partition(":")[2].split())
        return idle and sockets == "sockets: used 0"
