"""DNS messages, whose input is untrusted in both directions, and a resolver. Standard library only.

Queries come from inside a sandbox; responses to the resolver's own queries come from the network. The resolver uses the
name servers of this machine, or those of the settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from rock.protocol.egress import Address

A, NS, CNAME, SOA, PTR, MX, TXT, AAAA, SRV, NAPTR, OPT, HTTPS, ANY = 1, 2, 5, 6, 12, 15, 16, 28, 33, 35, 41, 65, 255
OK, SERVER_FAILED, NO_NAME, NOT_IMPLEMENTED, REFUSED = 0, 2, 3, 4, 5
_IN = 1
_MOST_RECORDS = 200
_PLAIN_SIZE, LARGEST_DATAGRAM = 512, 1232
_LONGEST_TTL = 3600


@dataclass(frozen=True)
class Question:
    """One query. name: lower case, without the last dot. size: the largest datagram that the sender accepts."""

    number: int
    name: str
    kind: int
    raw: bytes  # the original question section
    size: int = _PLAIN_SIZE
    recursive: bool = True


@dataclass(frozen=True)
class Reply:
    """A name server's response. ttl: seconds, the minimum of the addresses."""

    code: int
    addresses: tuple[Address, ...] = ()
    ttl: int = 0
    truncated: bool = False


def parse_question(data: bytes) -> Question:
    """Parse a query; ValueError for an invalid or unsupported one."""
    if len(data) < 12 or len(data) > 4096:
        raise ValueError("no DNS message")
    number, flags, questions, answers, authorities, extras = struct.unpack_from(">6H", data)
    if flags & 0x8000 or flags >> 11 & 15 or questions != 1 or answers or authorities or extras > 1:
        raise ValueError("no plain DNS question")
    name, at = _name(data, 12, pointers=False)
    if at + 4 > len(data):
        raise ValueError("a DNS question that ends early")
    kind, klass = struct.unpack_from(">HH", data, at)
    if klass != _IN:
        raise ValueError("a DNS question of another class")
    raw = data[12 : at + 4]
    size, at = _PLAIN_SIZE, at + 4
    if extras:
        if data[at : at + 1] != b"\0" or at + 11 > len(data) or struct.unpack_from(">H", data, at + 1)[0] != OPT:
            raise ValueError("a DNS question with an odd end")
        size = min(LARGEST_DATAGRAM, max(_PLAIN_SIZE, struct.unpack_from(">H", data, at + 3)[0]))
    return Question(number, name, kind, raw, size, bool(flags & 0x100))


def answer(question: Question, code: int, addresses: tuple[Address, ...] = (), ttl: int = 0, *,
           datagram: bool) -> bytes:
    """The response to a query, truncated where a datagram is too small for it."""
    records = b"".join(
        struct.pack(">HHHIH", 0xC00C, A if address.version == 4 else AAAA, _IN, ttl, len(address.packed))
        + address.packed for address in addresses)
    cut = datagram and 12 + len(question.raw) + len(records) > question.size
    if cut:
        records, addresses = b"", ()
    flags = 0x8080 | (0x200 if cut else 0) | (0x100 if question.recursive else 0) | code
    return struct.pack(">6H", question.number, flags, 1, len(addresses), 0, 0) + question.raw + records


def passed_on(question: Question, reply: bytes, *, datagram: bool) -> bytes:
    """A name server's response with the id of the sandbox's query."""
    if datagram and len(reply) > question.size:
        flags = struct.unpack_from(">H", reply, 2)[0] | 0x200
        return struct.pack(">6H", question.number, flags, 1, 0, 0, 0) + question.raw
    return struct.pack(">H", question.number) + reply[2:]


def encode_query(number: int, name: str, kind: int) -> bytes:
    """Encode a query of the resolver. ValueError for a name that is too long."""
    labels = [label.encode("latin-1") for label in name.split(".")] if name else []
    if any(not 0 < len(label) < 64 for label in labels) or len(name) > 253:
        raise ValueError("no DNS name")
    encoded = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    head = struct.pack(">6H", number, 0x100, 1, 0, 0, 1)
    return head + encoded + struct.pack(">HH", kind, _IN) + b"\0" + struct.pack(">HHIH", OPT, LARGEST_DATAGRAM, 0, 0)


def parse_reply(data: bytes, number: int, name: str, kind: int) -> Reply:
    """Parse the response to `encode_query(number, name, kind)`. ValueError when it does not match."""
    if len(data) < 12:
        raise ValueError("no DNS message")
    got, flags, questions, answers, _, _ = struct.unpack_from(">6H", data)
    if got != number or not flags & 0x8000 or questions != 1:
        raise ValueError("not the answer to this question")
    asked, at = _name(data, 12)
    if at + 4 > len(data) or (asked, *struct.unpack_from(">HH", data, at)) != (name, kind, _IN):
        raise ValueError("not the answer to this question")
    at += 4
    code, truncated = flags & 15, bool(flags & 0x200)
    names, found, ttl = {name}, [], _LONGEST_TTL
    for _ in range(0 if truncated or kind not in (A, AAAA) else min(answers, _MOST_RECORDS)):
        owner, at = _name(data, at)
        if at + 10 > len(data):
            raise ValueError("a DNS message that ends early")
        got_kind, klass, life, length = struct.unpack_from(">HHIH", data, at)
        at += 10
        if at + length > len(data):
            raise ValueError("a DNS message that ends early")
        if owner in names and klass == _IN and got_kind == CNAME:
            names.add(_name(data, at)[0])
            ttl = min(ttl, life)
        elif owner in names and klass == _IN and got_kind == kind and length == (4 if kind == A else 16):
            found.append(ipaddress.ip_address(data[at : at + length]))
            ttl = min(ttl, life)
        at += length
    return Reply(code, tuple(dict.fromkeys(found)), ttl, truncated)


def _name(data: bytes, at: int, *, pointers: bool = True) -> tuple[str, int]:
    """The name at an offset, and the offset after it. ValueError."""
    labels: list[str] = []
    end, length = -1, 0
    while True:
        if at >= len(data):
            raise ValueError("a DNS name that ends early")
        size = data[at]
        if size >= 0xC0:
            if not pointers or at + 1 >= len(data):
                raise ValueError("a DNS name with a pointer")
            target = (size & 0x3F) << 8 | data[at + 1]
            end = at + 2 if end < 0 else end
            if target >= at:  # only backwards, so the loop ends
                raise ValueError("a DNS name that points forward")
            at = target
            continue
        if size > 63:
            raise ValueError("a DNS label of an unknown kind")
        at += 1
        if size == 0:
            return ".".join(labels).lower(), at if end < 0 else end
        label = data[at : at + size]
        length += size + 1
        if len(label) < size or length > 254 or b"." in label:
            raise ValueError("a DNS name that is too long or odd")
        labels.append(label.decode("latin-1"))
        at += size


# ---- resolver ----

_PATIENCE = 2.0  # timeout per server in seconds
_ROUNDS = 2
_MOST_SERVERS = 3
_RESOLV_CONF = "/etc/resolv.conf"
Server = tuple[str, int]


class Unanswered(Exception):
    """No name server responded."""


class Resolver:
    """servers: "ADDRESS" or "ADDRESS:PORT", IPv6 in brackets; an empty list uses the current /etc/resolv.conf."""

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

    async def ask(self, name: str, kind: int) -> tuple[Reply, bytes]:
        """The response to a query, parsed and raw. Unanswered; ValueError for an invalid name."""
        for _ in range(_ROUNDS):
            for server in self._servers():
                number = secrets.randbelow(1 << 16)
                question = encode_query(number, name, kind)
                with contextlib.suppress(OSError, TimeoutError, ValueError, EOFError):
                    async with asyncio.timeout(_PATIENCE):
                        data = await _by_datagram(server, question, number, name, kind)
                        reply = parse_reply(data, number, name, kind)
                        if reply.truncated:
                            data = await _by_stream(server, question)
                            reply = parse_reply(data, number, name, kind)
                    if reply.code in (OK, NO_NAME):
                        return reply, data
        raise Unanswered


async def _by_datagram(server: Server, question: bytes, number: int, name: str, kind: int) -> bytes:
    """Query from a new connected socket, so that a spoofer must also guess its port; other datagrams are ignored."""
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[bytes] = loop.create_future()

    class Asking(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, _: object) -> None:
            with contextlib.suppress(ValueError):
                parse_reply(data, number, name, kind)
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
    """Parse a server; ValueError unless it is "ADDRESS" or "ADDRESS:PORT"."""
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
