"""Pools of network namespaces: unused ones of ended sandboxes, and prepared ones with egress.

The kernel takes 2 ms to create and to remove a namespace. A used namespace is never reused: its ports may stay reserved
for a minute, and its counters reveal its former user. Nothing else can persist, because no process inside has rights
over it. A child prepares the namespaces with egress (runtime/namespace/launcher/isolated_network.py). Standard library
only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket

from rock.runtime.namespace.launcher import kernel, userns
from rock.runtime.namespace.limits import cgroups

_MOST = 16
_AHEAD = 4
_PATIENCE = 10.0  # seconds


class NetworkPool:
    """Descriptors of unused network namespaces, with loopback up.

    usable: whether the launcher may return from another namespace, which requires rights over its own.
    """

    def __init__(self, usable: bool) -> None:
        self.usable = usable
        self.home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._free: list[int] = []

    def take(self) -> int:
        """A descriptor that the caller owns from now on, or -1."""
        return self._free.pop() if self._free else -1

    def give(self, fd: int) -> None:
        """Retain the namespace of an ended sandbox, or close it. OSError: the process cannot return from it."""
        wanted = self.usable and len(self._free) < _MOST and not os.path.sameopenfile(fd, self.home)
        if not wanted or not self._untouched(fd):
            os.close(fd)
        else:
            self._free.append(fd)

    def enter(self, fd: int) -> None:
        kernel.setns(fd, kernel.CLONE_NEWNET)

    def back(self) -> None:
        kernel.setns(self.home, kernel.CLONE_NEWNET)

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


class IsolatedNetworkPool:
    """Network namespaces with egress, a few of them prepared. Starts with the first request.

    A child creates them one after the other and never has to return from one, which requires rights that an ordinary
    user lacks.
    """

    def __init__(self, privileged: bool) -> None:
        self._ping_group = userns.IDS.ping_groups if privileged else "0 0"
        self._sock: socket.socket | None = None

    def take(self) -> list[int]:
        """The namespace, its listening socket and its socket for DNS: descriptors that the caller owns from now on.

        OSError when this kernel cannot create one.
        """
        if self._sock is None:
            self._start()
        assert self._sock is not None
        try:
            self._sock.send(b"1")  # request one more, for a later call
            reply, fds, _, _ = socket.recv_fds(self._sock, 4096, 3, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            self._sock.close()
            self._sock = None
            raise
        if len(fds) == 3:
            return list(fds)
        for fd in fds:
            os.close(fd)
        self._sock.close()
        self._sock = None
        number, _, reason = reply.decode(errors="replace").partition(" ")
        raise OSError(int(number) if number.isdecimal() else 0, f"network: {reason or 'its maker ended'}")

    def close(self) -> None:
        """End the child, and its prepared namespaces with it."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = kernel.fork_into(0)
        if pid == 0:
            try:
                kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
                signal.set_wakeup_fd(-1)
                os.dup2(theirs.fileno(), 0)
                kernel.close_from(3)
                kernel.set_name(b"rock-nets")
                self._make(socket.socket(fileno=0))
            finally:
                os._exit(0)
        theirs.close()
        ours.settimeout(_PATIENCE)
        self._sock = ours
        for _ in range(_AHEAD - 1):
            ours.send(b"1")

    def _make(self, specs: socket.socket) -> None:
        from rock.runtime.namespace.launcher import (
            isolated_network,  # imported here, so that it adds to the memory of neither the launcher nor pid 1
        )

        while specs.recv(1):
            try:
                kernel.unshare(kernel.CLONE_NEWNET)
                own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
                fds = [own, *isolated_network.furnish(self._ping_group)]
            except OSError as error:
                with contextlib.suppress(OSError):
                    specs.send(f"{error.errno or 0} {error}".encode()[:4000])
                continue  # closing with unread requests would discard the message
            socket.send_fds(specs, [b"net"], fds)
            for fd in fds:
                os.close(fd)
