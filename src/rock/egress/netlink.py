"""Netlink messages for addresses and routes; nftables.py has the packet filter. Standard library only.

It needs no program of the host: `ip` and `nft` are missing on many machines, and cost 3 to 10 ms per call.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

ROUTE, NETFILTER = 0, 12
REQUEST, ACK, EXCLUSIVE, CREATE, APPEND = 1, 4, 0x200, 0x400, 0x800
_ERROR = 2
_NEW_ADDRESS, _NEW_ROUTE, _GET_ROUTE = 20, 24, 26
_NESTED = 0x8000
_TABLE_MAIN, _PROTOCOL_STATIC, _SCOPE_HOST = 254, 4, 254
_NO_DUPLICATE_CHECK = 2
UNICAST, LOCAL = 1, 2  # types of routes


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", len(value) + 4, kind) + value + b"\0" * (-len(value) % 4)


def nested(kind: int, *parts: bytes) -> bytes:
    return attribute(kind | _NESTED, b"".join(parts))


class Routes:
    """Looks up this machine's routes. The socket is opened once, and again after an error."""

    def __init__(self) -> None:
        self._link: Netlink | None = None

    def type_of(self, address: str) -> int | None:
        """UNICAST for a routed address, None without a route, else another type (local, broadcast, ...)."""
        try:
            self._link = self._link or Netlink(ROUTE)
            return route_type(self._link, address)
        except OSError:
            self.close()
            return None

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None


class Netlink:
    """A netlink socket. It belongs to the network namespace in which it was opened."""

    def __init__(self, protocol: int) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._number = 0

    def close(self) -> None:
        self._sock.close()

    def message(self, kind: int, flags: int, body: bytes) -> bytes:
        self._number += 1
        return struct.pack("=IHHII", len(body) + 16, kind, flags | REQUEST, self._number, 0) + body

    def ask(self, data: bytes, acknowledgements: int = 1) -> None:
        """Send messages, and raise OSError when the kernel rejects one."""
        self._sock.send(data)
        for _ in range(acknowledgements):
            for kind, body in self.receive():
                if kind == _ERROR and (number := -struct.unpack_from("=i", body)[0]):
                    raise OSError(number, os.strerror(number))

    def look(self, data: bytes) -> tuple[int, bytes]:
        """Send a query; returns the first response: type and body."""
        self._sock.send(data)
        kind, body = next(self.receive())
        if kind == _ERROR:
            number = -struct.unpack_from("=i", body)[0]
            raise OSError(number, os.strerror(number))
        return kind, body

    def receive(self) -> Iterator[tuple[int, bytes]]:
        data = self._sock.recv(1 << 16)
        while len(data) >= 16:
            length, kind = struct.unpack_from("=IH", data)
            if length < 16:
                raise OSError(errno.EPROTO, "netlink: a message is too short")
            yield kind, data[16:length]
            data = data[length + (-length % 4):]


@contextmanager
def routing() -> Iterator[Netlink]:
    link = Netlink(ROUTE)
    try:
        yield link
    finally:
        link.close()


def add_address(link: Netlink, device: int, address: str) -> None:
    """Give a device one address, without a prefix route."""
    family, packed = _packed(address)
    body = struct.pack("=BBBBI", family, len(packed) * 8, _NO_DUPLICATE_CHECK, 0, device)
    body += attribute(1, packed) + attribute(2, packed)
    link.ask(link.message(_NEW_ADDRESS, ACK | CREATE | EXCLUSIVE, body))


def route_all_here(link: Netlink, device: int, source: str) -> None:
    """Make every address of a family local to this namespace; `source` is the default source address."""
    family, packed = _packed(source)
    body = struct.pack("=BBBBBBBBI", family, 0, 0, 0, _TABLE_MAIN, _PROTOCOL_STATIC, _SCOPE_HOST, LOCAL, 0)
    body += attribute(4, struct.pack("=I", device)) + attribute(7, packed)
    link.ask(link.message(_NEW_ROUTE, ACK | CREATE | EXCLUSIVE, body))


def route_type(link: Netlink, address: str) -> int:
    """The route type of an address: UNICAST for a routed one. OSError without a route."""
    family, packed = _packed(address)
    body = struct.pack("=BBBBBBBBI", family, len(packed) * 8, 0, 0, 0, 0, 0, 0, 0) + attribute(1, packed)
    return link.look(link.message(_GET_ROUTE, 0, body))[1][7]


def _packed(address: str) -> tuple[int, bytes]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return family, socket.inet_pton(family, address)
