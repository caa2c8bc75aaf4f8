"""What kind of address one is: public, or one that a sandbox must not reach by itself. Standard library only: the
network proxy has nothing else."""

from __future__ import annotations

import ipaddress

from rock.protocol.egress import Address, Network

# What no entry can open: these mean the machine itself, everybody, or nobody.
_NEVER = {
    "loopback": ("127.0.0.0/8", "::1/128"),
    "unspecified": ("0.0.0.0/8", "::/96"),
    "multicast": ("224.0.0.0/4", "ff00::/8"),
    "reserved": ("240.0.0.0/4", "192.0.0.0/24", "192.88.99.0/24", "100::/64", "2001::/23", "2002::/16",
                 "64:ff9b:1::/48"),
}
# What an entry can open that names it, see policy.py.
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
    """An IPv4 address that is written as an IPv6 one (::ffff:a.b.c.d) as IPv4."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped if mapped is not None else address


def never(address: Address) -> str | None:
    """The kind of an address that no sandbox may reach, whatever its policy says."""
    address = embedded(address)
    found = next((kind for kind, network in _NEVER_TABLE if address in network), None)
    if found is None and address.version == 6 and closed(address) is None and address not in _GLOBAL6:
        return "reserved"
    return found


def closed(address: Address) -> str | None:
    """The kind of an address that is reached only where an entry names it; None for a public one."""
    address = embedded(address)
    return next((kind for kind, network in _CLOSED_TABLE if address in network), None)


def block_of(address: Address) -> Network | None:
    """The largest of our blocks of closed addresses around one."""
    address = embedded(address)
    found = [network for _, network in _CLOSED_TABLE if address in network]
    return min(found, key=lambda network: network.prefixlen, default=None)


def embedded(address: Address) -> Address:
    """The IPv4 address to which this IPv6 one leads (mapped, or by a NAT64 gateway), else itself."""
    address = plain(address)
    if isinstance(address, ipaddress.IPv6Address) and address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address
