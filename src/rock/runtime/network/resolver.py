"""Asking the name servers of this machine, or those that the settings name. Standard library only."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import secrets
import struct
from collections.abc import Sequence

from rock.runtime.network import dns

_PATIENCE = 2.0  # seconds for one server
_ROUNDS = 2
_MOST_SERVERS = 3
_RESOLV_CONF = "/etc/resolv.conf"
Server = tuple[str, int]


class Unanswered(Exception):
    """No name server gave an answer."""


class Resolver:
    """servers: "ADDRESS" or "ADDRESS:PORT", IPv6 in brackets; none means those of /etc/resolv.conf as it is now."""

    def __init__(self, servers: Sequence[str] = ()) -> None:
        self._given = [parse_server(text) for text in servers]
        self._read: tuple[float, list[Server]] = (-1.0, [])

    def _servers(self) -> list[Server]:
        if self._given:
            return self._given
        try:
            changed = os.stat(_RESOLV_CONF).st_mtime
            if changed != self._read[0]:
                with open(_RESOLV_CONF, errors="replace") as file:
                    self._read = changed, _nameservers(file.read(1 << 16))
        except OSError:
            self._read = -1.0, []
        return self._read[1]

    async def ask(self, name: str, kind: int) -> tuple[dns.Reply, bytes]:
        """The reply to a question, also as it came. Unanswered, ValueError for a name that cannot be asked."""
        for _ in range(_ROUNDS):
            for server in self._servers():
                number = secrets.randbelow(1 << 16)
                question = dns.ask(number, name, kind)
                with contextlib.suppress(OSError, TimeoutError, ValueError, EOFError):
                    async with asyncio.timeout(_PATIENCE):
                        data = await _by_datagram(server, question, number, name, kind)
                        reply = dns.parse_reply(data, number, name, kind)
                        if reply.truncated:
                            data = await _by_stream(server, question)
                            reply = dns.parse_reply(data, number, name, kind)
                    if reply.code in (dns.OK, dns.NO_NAME):
                        return reply, data
        raise Unanswered


async def _by_datagram(server: Server, question: bytes, number: int, name: str, kind: int) -> bytes:
    """From a connected socket of its own, so that its port has to be guessed too; what does not fit is passed over."""
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[bytes] = loop.create_future()

    class Asking(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, _: object) -> None:
            with contextlib.suppress(ValueError):
                dns.parse_reply(data, number, name, kind)
                if not answered.done():
                    answered.set_result(data)

        def error_received(self, error: Exception) -> None:
            if not answered.done():
                answered.set_exception(error)

    transport, _ = await loop.create_datagram_endpoint(Asking, remote_addr=server)
    try:
        transport.sendto(question)
        return await answered
    finally:
        transport.close()


async def _by_stream(server: Server, question: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*server)
    try:
        writer.write(struct.pack(">H", len(question)) + question)
        return await reader.readexactly(struct.unpack(">H", await reader.readexactly(2))[0])
    finally:
        writer.close()


def parse_server(text: str) -> Server:
    """ValueError when it is no "ADDRESS" and no "ADDRESS:PORT"."""
    host, port = text.strip(), "53"
    if host.startswith("["):
        host, _, rest = host[1:].partition("]")
        port = rest.removeprefix(":") or port
    elif host.count(":") == 1:
        host, _, port = host.partition(":")
    if not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is no name server: write ADDRESS or ADDRESS:PORT")
    try:
        return str(ipaddress.ip_address(host)), int(port)
    except ValueError:
        raise ValueError(f"{text!r} is no name server: write ADDRESS or ADDRESS:PORT") from None


def _nameservers(text: str) -> list[Server]:
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            with contextlib.suppress(ValueError):
                found.append((str(ipaddress.ip_address(words[1])), 53))
    return found[:_MOST_SERVERS]
