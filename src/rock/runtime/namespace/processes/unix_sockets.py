"""Unix sockets of a network namespace, as the kernel reports them (sock_diag): type, peer, and what is in transit.

Standard library only.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import NamedTuple

from rock.runtime.namespace.launcher import kernel

_SOCK_DIAG, _BY_FAMILY, _ERROR = 4, 20, 2
_REQUEST = 1
_SHOW = 1 | 4 | 0x10  # name, peer, length of the queues
_NAME, _PEER, _QUEUES, _SHUTDOWN = 0, 2, 4, 6
_ESTABLISHED = 1
_ANY_COOKIE = 0xFFFFFFFF
_PATIENCE = 2.0  # seconds


class UnixSocket(NamedTuple):
    """A connected socket without a name. peer: the inode of its peer. waiting: bytes or messages that were not read."""

    kind: int
    peer: int
    waiting: int


class UnixSockets:
    """The sockets of the network namespace of a process."""

    def __init__(self, pid: int) -> None:
        """OSError."""
        own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            theirs = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                kernel.setns(theirs, kernel.CLONE_NEWNET)
                try:
                    self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _SOCK_DIAG)
                finally:
                    kernel.setns(own, kernel.CLONE_NEWNET)
            finally:
                os.close(theirs)
        finally:
            os.close(own)
        self._sock.settimeout(_PATIENCE)

    def close(self) -> None:
        self._sock.close()

    def get(self, inode: int) -> UnixSocket | None:
        """A connected socket that is one end of a pair; None for any other. OSError."""
        body = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, inode, _SHOW, _ANY_COOKIE, _ANY_COOKIE)
        self._sock.send(struct.pack("=IHHII", 16 + len(body), _BY_FAMILY, _REQUEST, 0, 0) + body)
        data = self._sock.recv(4096)
        if len(data) < 32 or struct.unpack_from("=H", data, 4)[0] == _ERROR:
            return None  # not of this family, or closed
        _, kind, status, _, number = struct.unpack_from("=BBBBI", data, 16)
        found: dict[int, bytes] = {}
        place = 32
        while place + 4 <= len(data):
            length, attribute = struct.unpack_from("=HH", data, place)
            if length < 4:
                break
            found[attribute] = data[place + 4 : place + length]
            place += (length + 3) & ~3
        if number != inode or status != _ESTABLISHED or _PEER not in found or found.get(_NAME):
            return None
        if any(found.get(_SHUTDOWN, b"")):
            return None
        return UnixSocket(kind, struct.unpack("=I", found[_PEER])[0], struct.unpack_from("=I", found[_QUEUES])[0])
