"""The egress policy: entries of `SandboxConfig.egress`, and classes of addresses. Standard library only.

    example.com  example.com:443         a name, found by DNS and sent by the client (TLS server name, HTTP Host)
    *.example.org  *.example.org:443     every name below it, not itself
    203.0.113.7  203.0.113.0/24:22       addresses, for any protocol
    [2001:db8::7]:443  2001:db8::/32
    *  *:443                             every public address

An entry without a port means all ports.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

MOST_ENTRIES = 1000
_LONGEST = 300
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Entry:
    """One entry: exactly one of name, suffix (".example.org") and network, or none of them for every public address."""

    name: str | None = None
    suffix: str | None = None
    network: Network | None = None
    port: int | None = None

    def has_name(self, name: str, port: int | None) -> bool:
        """Whether it allows this name; port None matches any port."""
        if port is not None and self.port not in (None, port):
            return False
        return name == self.name or (self.suffix is not None and name.endswith(self.suffix) and name != self.suffix[1:])

    def has_address(self, address: Address, port: int) -> bool:
        """Whether it lists this address explicitly. The entry for every public address does not."""
        return self.network is not None and self.port in (None, port) and address in self.network

    @property
    def is_everything(self) -> bool:
        return self.name is None and self.suffix is None and self.network is None


def parse(text: str) -> Entry:
    """Parse an entry. ValueError names the problem."""
    if len(text) > _LONGEST:
        raise ValueError(f"egress: an entry of {len(text)} characters is too long")
    target, port = _split(text)
    if target == "*":
        return Entry(port=port)
    network = _network(target)
    if network is not None:
        return Entry(network=network, port=port)
    if target.startswith("*."):
        return Entry(suffix="." + name_of(target[2:]), port=port)
    return Entry(name=name_of(target), port=port)


def _split(text: str) -> tuple[str, int | None]:
    if text.startswith("["):
        target, bracket, rest = text[1:].partition("]")
        if not bracket or ":" not in target or (rest and not rest.startswith(":")):
            raise ValueError(f"egress: {text!r} is no address in brackets")
        return target, _port(rest[1:], text) if rest else None
    if text.count(":") != 1:
        return text, None  # an IPv6 address has more colons
    target, _, port = text.partition(":")
    return target, _port(port, text)


def _port(text: str, entry: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 5 or not 1 <= int(text) <= 65535:
        raise ValueError(f"egress: {entry!r} has no port from 1 to 65535 after the colon")
    return int(text)


def _network(text: str) -> Network | None:
    if "%" in text:
        raise ValueError(f"egress: {text!r}: an address with a zone means nothing here")
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        if "/" in text or ":" in text:
            raise ValueError(f"egress: {text!r} is no network: {error}") from None
        return None
    if network.version == 6 and network.network_address.ipv4_mapped is not None:
        raise ValueError(f"egress: write {text!r} as an IPv4 address")
    return network


def name_of(text: str) -> str:
    """A host name in normal form: lower case, ASCII, without the final dot. ValueError for an invalid name."""
    name = text.removesuffix(".")
    if not name.isascii():
        try:
            name = name.encode("idna").decode()
        except UnicodeError:
            raise ValueError(f"egress: {text!r} is no host name") from None
    name = name.lower()
    labels = name.split(".")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"egress: {text!r} is no host name, address or network")
    if labels[-1].isdecimal() or labels[-1].startswith("0x"):
        raise ValueError(f"egress: {text!r} is no address as this is written: write all four numbers in decimal")
    return name


# ---- classes of addresses ----
#
# An address is public, or restricted: a sandbox reaches it only by an explicit entry or never.

# Addresses that no entry can allow: they mean the machine itself, broadcast and multicast, or no destination.
_NEVER = {
    "loopback": ("127.0.0.0/8", "::1/128"),
    "unspecified": ("0.0.0.0/8", "::/96"),
    "multicast": ("224.0.0.0/4", "ff00::/8"),
    "reserved": ("240.0.0.0/4", "192.0.0.0/24", "192.88.99.0/24", "100::/64", "2001::/23", "2002::/16",
                 "64:ff9b:1::/48"),
}
# Addresses that an explicit entry can allow, see policy.py.
_CLOSED = {
    "metadata": ("169.254.169.254/32", "169.254.170.2/32", "100.100.100.200/32", "168.63.129.16/32",
                 "fd00:ec2::254/128", "fe80::a9fe:a9fe/128"),
    "link-local": ("169.254.0.0/16", "fe80::/10"),
    "private": ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "198.18.0.0/15", "fc00::/7",
                "fec0::/10"),
}
_GLOBAL6 = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def _table(kinds: dict[str, tuple[str, ...]]) -> list[tuple[str, Network]]:
    return [(kind, ipaddress.ip_network(text)) for kind, texts in kinds.items() for text in texts]


_NEVER_TABLE, _CLOSED_TABLE = _table(_NEVER), _table(_CLOSED)


def plain(address: Address) -> Address:
    """Convert an IPv4-mapped IPv6 address (::ffff:a.b.c.d) to IPv4."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped if mapped is not None else address


def never(address: Address) -> str | None:
    """The class of an address that no policy can allow; None for others."""
    address = embedded(address)
    found = next((kind for kind, network in _NEVER_TABLE if address in network), None)
    if found is None and address.version == 6 and closed(address) is None and address not in _GLOBAL6:
        return "reserved"
    return found


def closed(address: Address) -> str | None:
    """The class of an address that needs an explicit entry; None for a public one."""
    address = embedded(address)
    return next((kind for kind, network in _CLOSED_TABLE if address in network), None)


def block_of(address: Address) -> Network | None:
    """The largest of the restricted blocks that contains an address."""
    address = embedded(address)
    found = [network for _, network in _CLOSED_TABLE if address in network]
    return min(found, key=lambda network: network.prefixlen, default=None)


def embedded(address: Address) -> Address:
    """The IPv4 address embedded in this IPv6 address (mapped, or by a NAT64 gateway), else the address itself."""
    address = plain(address)
    if isinstance(address, ipaddress.IPv6Address) and address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address
