"""Which connections of a sandbox are allowed: pure. Standard library only.

    never (loopback, multicast, ...)          refused, whatever the entries say
    closed (private, link-local, metadata)    refused, unless an entry with a port names the address or a network in
    and the host's own addresses              that block; the host's own only one by one
    public                                    without entries allowed; else by an entry for the address, or by name
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from rock.protocol import addresses
from rock.protocol.egress import Address, Entry, parse


class Verdict(Enum):
    ALLOW = "allow"
    REFUSE = "refuse"
    ASK = "ask"  # what the client says will decide


class Policy:
    """entries: of `SandboxConfig.egress`; None allows every public address."""

    def __init__(self, entries: Sequence[str] | None) -> None:
        self._entries: list[Entry] | None = None if entries is None else [parse(text) for text in entries]

    @property
    def open_dns(self) -> bool:
        """Whether every name may be asked for."""
        return self._entries is None or any(entry.is_everything for entry in self._entries)

    def judge(self, address: Address, port: int, *, own: bool = False) -> tuple[Verdict, str | None]:
        """Whether a connection to an address may be made, and why not. own: it is one of the host's addresses."""
        address = addresses.plain(address)
        kind = addresses.never(address)
        if kind is not None:
            return Verdict.REFUSE, f"{kind} address"
        kind = addresses.closed(address) or ("host's own" if own else None)
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
        """Whether an entry opens this closed address, on some port."""
        return any(entry.port is not None and _opens(entry, address, entry.port, False)
                   for entry in self._entries or ())

    def allows_name(self, name: str, port: int | None = None) -> bool:
        """Whether an entry has this name; port None asks for any port, as DNS does not tell one."""
        return any(entry.has_name(name, port) for entry in self._entries or ())


def _opens(entry: Entry, address: Address, port: int, own: bool) -> bool:
    """Whether an entry names a closed address: with a port, and so narrowly that it can have meant nothing else."""
    network = entry.network
    if network is None or entry.port != port or address not in network:
        return False
    if network.prefixlen == network.max_prefixlen:
        return True
    block = addresses.block_of(address)
    if own or block is None or block.version != network.version:
        return False
    return network.subnet_of(block)  # type: ignore[arg-type]
