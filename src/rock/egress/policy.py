"""Egress policy: the decision on each connection, and the host name from a client's first bytes. Pure; standard library
only.

    never (loopback, multicast, ...)          denied, whatever the entries say
    closed (private, link-local, metadata)    denied, unless an entry with a port names the address or a network in
    and the host's own addresses              that block; the host's own addresses only one by one
    public                                    allowed without entries; else by an entry for the address, or by name

The name is the TLS server name or the HTTP Host. The bytes come from inside a sandbox, so any deviation from the
protocol is rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from rock.protocol import egress
from rock.protocol.egress import Address, Entry, name_of, parse


class Verdict(Enum):
    ALLOW = "allow"
    REFUSE = "refuse"
    ASK = "ask"  # the name in the client's first bytes decides


class Policy:
    """entries: of `SandboxConfig.egress`; None allows every public address."""

    def __init__(self, entries: Sequence[str] | None) -> None:
        self._entries: list[Entry] | None = None if entries is None else [parse(text) for text in entries]

    @property
    def open_dns(self) -> bool:
        """Whether all names may be resolved."""
        return self._entries is None or any(entry.is_everything for entry in self._entries)

    def judge(self, address: Address, port: int, *, own: bool = False) -> tuple[Verdict, str | None]:
        """Decide on a connection to an address; returns the reason of a denial. own: it is one of the host's
        addresses."""
        address = egress.plain(address)
        kind = egress.never(address)
        if kind is not None:
            return Verdict.REFUSE, f"{kind} address"
        kind = egress.closed(address) or ("host's own" if own else None)
        if kind is not None:
            opened = any(_opens(entry, address, port, own) for entry in self._entries or ())
            return (Verdict.ALLOW, None) if opened else (Verdict.REFUSE, f"{kind} address")
        if self._entries is None:
            return Verdict.ALLOW, None
        if any(entry.has_address(address, port) or (entry.is_everything and entry.port in (None, port))
               for entry in self._entries):
            return Verdict.ALLOW, None
        named = any((entry.name or entry.suffix) and entry.port in (None, port) for entry in self._entries)
        return (Verdict.ASK, None) if named else (Verdict.REFUSE, "not in egress")

    def names(self, address: Address) -> bool:
        """Whether an entry opens this closed address on some port."""
        return any(entry.port is not None and _opens(entry, address, entry.port, False)
                   for entry in self._entries or ())

    def allows_name(self, name: str, port: int | None = None) -> bool:
        """Whether an entry matches this name; port None matches any port, because DNS carries none."""
        return any(entry.has_name(name, port) for entry in self._entries or ())


def _opens(entry: Entry, address: Address, port: int, own: bool) -> bool:
    """Whether an entry opens a closed address: it needs a port, and a network within the closed block."""
    network = entry.network
    if network is None or entry.port != port or address not in network:
        return False
    if network.prefixlen == network.max_prefixlen:
        return True
    block = egress.block_of(address)
    if own or block is None or block.version != network.version:
        return False
    return network.subnet_of(block)  # type: ignore[arg-type]


# ---- names in first bytes ----

LONGEST = 16_384  # maximum inspected bytes of a first message
MOST_LOOKS = 100  # parse attempts per client: the cost of each grows with the data
_MOST_RECORDS = 64
_HANDSHAKE, _CLIENT_HELLO = 22, 1
_SERVER_NAME, _ENCRYPTED_HELLO = 0, 0xFE0D
_METHODS = (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"TRACE", b"PROPFIND", b"PROPPATCH",
            b"MKCOL", b"COPY", b"MOVE", b"LOCK", b"UNLOCK", b"REPORT", b"SEARCH", b"MERGE", b"QUERY")
_PRINTABLE = bytes([9, 10, 13, *range(32, 127), *range(128, 256)])
_TOKEN = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


class Refused(Exception):
    """The first bytes contain no acceptable name; the message has the reason."""


@dataclass(frozen=True)
class ClientGreeting:
    """The client's name. first: the bytes to forward, in place of the inspected ones."""

    protocol: str
    name: str
    first: bytes


def look(data: bytes) -> ClientGreeting | None:
    """The name in a client's first bytes; None when more bytes are needed. Refused."""
    if not data:
        return None
    if data[0] == _HANDSHAKE:
        found = _tls(data)
        return None if found is None else ClientGreeting("tls", found, data)
    return _http(data)


# ---- TLS ----


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise Refused("malformed TLS hello")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> bytes:
        return self.take(self.number(size))

    def more(self) -> bool:
        return self.at < len(self.data)


def _tls(data: bytes) -> str | None:
    hello = _hello(data)
    if hello is None:
        return None
    reader = _Reader(hello)
    reader.take(2 + 32)  # version, random
    reader.vector(1)  # session
    reader.vector(2)  # ciphers
    reader.vector(1)  # compressions
    if not reader.more():
        raise Refused("TLS without a server name")
    extensions = _Reader(reader.vector(2))
    if reader.more():
        raise Refused("malformed TLS hello")
    name, seen = None, set()
    while extensions.more():
        kind, body = extensions.number(2), extensions.vector(2)
        if kind in seen:
            raise Refused("malformed TLS hello")
        seen.add(kind)
        if kind == _ENCRYPTED_HELLO:
            raise Refused("TLS with an encrypted hello")
        if kind == _SERVER_NAME:
            name = _server_name(body)
    if name is None:
        raise Refused("TLS without a server name")
    return name


def _hello(data: bytes) -> bytes | None:
    """The client hello from its records; None when it is incomplete."""
    whole, at, records = bytearray(), 0, 0
    while at + 5 <= len(data):
        kind, major, length = data[at], data[at + 1], int.from_bytes(data[at + 3 : at + 5], "big")
        if kind != _HANDSHAKE or major != 3 or not 0 < length <= 1 << 14:
            raise Refused("malformed TLS record")
        records += 1
        if records > _MOST_RECORDS:
            raise Refused("TLS hello in too many pieces")
        whole += data[at + 5 : at + 5 + length]
        if whole and whole[0] != _CLIENT_HELLO:
            raise Refused("TLS that does not begin with a hello")
        if len(whole) >= 4:
            size = int.from_bytes(whole[1:4], "big")
            if size + 4 > LONGEST:
                raise Refused("TLS hello too long")
            if len(whole) >= size + 4:
                return bytes(whole[4 : size + 4])
        at += 5 + length
    return None


def _server_name(body: bytes) -> str:
    outer = _Reader(body)
    names = _Reader(outer.vector(2))
    kind, raw = names.number(1), names.vector(2)
    if kind != 0 or names.more() or outer.more():
        raise Refused("malformed TLS server name")
    return _name(raw, "TLS server name")


def _name(raw: bytes, what: str) -> str:
    try:
        return name_of(raw.decode("ascii"))
    except ValueError:
        raise Refused(f"{what} that is no host name") from None


# ---- HTTP ----


def _http(data: bytes) -> ClientGreeting | None:
    word = data[:20].split(b" ", 1)[0]
    if not any(method == word if b" " in data[:20] else method.startswith(word) for method in _METHODS):
        raise Refused("neither TLS nor HTTP")
    end = data.find(b"\r\n\r\n")
    head = data if end < 0 else data[:end]
    if head.translate(None, _PRINTABLE):
        raise Refused("malformed HTTP head")
    if end < 0:
        return None
    lines = head.split(b"\r\n")
    if any(b"\n" in line or b"\r" in line for line in lines):
        raise Refused("malformed HTTP head")
    parts = lines[0].split(b" ")
    if len(parts) != 3 or parts[2] not in (b"HTTP/1.1", b"HTTP/1.0") or not parts[1]:
        raise Refused("malformed HTTP request")
    hosts, kept, upgrade = [], [], False
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        if not colon or not name or not _TOKEN.issuperset(name):
            raise Refused("malformed HTTP head")
        lower = name.lower()
        if lower == b"host":
            hosts.append(value.strip(b" \t"))
        if lower == b"upgrade":
            upgrade = value.strip(b" \t").lower() == b"websocket"  # other upgrades could carry requests of their own
        if lower not in (b"connection", b"keep-alive", b"proxy-connection", b"upgrade"):
            kept.append(line)
    if len(hosts) != 1:
        raise Refused("HTTP without a Host" if not hosts else "HTTP with several Hosts")
    name_told = _host(hosts[0])
    if not parts[1].startswith(b"/") and parts[1] != b"*" and _absolute(parts[1]) != name_told:
        raise Refused("HTTP whose request and Host differ")
    # One request per connection: a later one could name another host.
    kept += [b"Upgrade: websocket", b"Connection: upgrade"] if upgrade else [b"Connection: close"]
    return ClientGreeting("http", name_told, b"\r\n".join([lines[0], *kept, b"", b""]) + data[end + 4 :])


def _absolute(target: bytes) -> str:
    for scheme in (b"http://", b"https://"):
        if target[: len(scheme)].lower() == scheme:
            authority = target[len(scheme) :].replace(b"?", b"/").replace(b"#", b"/").split(b"/", 1)[0]
            return _host(authority)
    raise Refused("malformed HTTP request")


def _host(raw: bytes) -> str:
    name, colon, port = raw.partition(b":")
    if colon and not port.isdigit():
        raise Refused("malformed HTTP Host")
    return _name(name, "HTTP Host")
