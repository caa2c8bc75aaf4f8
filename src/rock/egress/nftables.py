"""Packet filter rules as nftables netlink messages. Standard library only.

A rule is a list of expressions, each a function here; registers 1 and 2 are scratch.
"""

from __future__ import annotations

import socket
import struct

from rock.egress.netlink import ACK, APPEND, CREATE, NETFILTER, Netlink, attribute, nested

DROP, ACCEPT = 0, 1
PREROUTING, OUTPUT = 0, 3
_SUBSYSTEM = 10
_NEW_TABLE, _NEW_CHAIN, _NEW_RULE = 0, 3, 6
_BATCH_BEGIN, _BATCH_END = 16, 17
_BOTH = 1  # the family of tables for IPv4 and IPv6
_IPV4, _IPV6 = 2, 10
_ADMIN_PROHIBITED = 3
Expressions = list[bytes]


class Table:
    """A table of rules, sent to the kernel as one atomic batch."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._link = Netlink(NETFILTER)
        self._parts = [self._edge(_BATCH_BEGIN)]
        self._count = 0
        self._add(_NEW_TABLE, _text(1, name))

    def _edge(self, kind: int) -> bytes:
        return self._link.message(kind, 0, struct.pack(">BBH", 0, 0, _SUBSYSTEM))

    def _add(self, what: int, body: bytes, flags: int = 0) -> None:
        head = struct.pack(">BBH", _BOTH, 0, 0)
        self._parts.append(self._link.message(_SUBSYSTEM << 8 | what, ACK | CREATE | flags, head + body))
        self._count += 1

    def chain(self, name: str, hook: int, priority: int, policy: int) -> None:
        place = nested(4, _number(1, hook), _number(2, priority & 0xFFFFFFFF))
        body = [_text(1, self._name), _text(3, name), place, _number(5, policy), _text(7, "filter")]
        self._add(_NEW_CHAIN, b"".join(body))

    def rule(self, chain: str, *parts: Expressions) -> None:
        listed = nested(4, *(nested(1, expression) for part in parts for expression in part))
        self._add(_NEW_RULE, _text(1, self._name) + _text(2, chain) + listed, APPEND)

    def commit(self) -> None:
        """Apply the batch. OSError when the kernel rejects it."""
        try:
            self._link.ask(b"".join([*self._parts, self._edge(_BATCH_END)]), self._count)
        finally:
            self._link.close()


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">I", value))


def _text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def _expression(name: str, *parts: bytes) -> bytes:
    return _text(1, name) + nested(2, *parts)


def _load(register: int, data: bytes) -> bytes:
    return _expression("immediate", _number(1, register), nested(2, attribute(1, data)))


def _equals(data: bytes) -> bytes:
    return _expression("cmp", _number(1, 1), _number(2, 0), nested(3, attribute(1, data)))


def _payload(base: int, offset: int, length: int) -> bytes:
    return _expression("payload", _number(1, 1), _number(2, base), _number(3, offset), _number(4, length))


def protocol(number: int) -> Expressions:
    """Match packets of this protocol above IP."""
    return [_expression("meta", _number(1, 1), _number(2, 16)), _equals(bytes([number]))]


def destination(address: str, bits: int) -> Expressions:
    """Match packets to this network."""
    family, offset, kind = (socket.AF_INET6, 24, _IPV6) if ":" in address else (socket.AF_INET, 16, _IPV4)
    packed = socket.inet_pton(family, address)
    found = [_expression("meta", _number(1, 1), _number(2, 15)), _equals(bytes([kind])),
             _payload(1, offset, len(packed))]
    if bits < len(packed) * 8:
        mask = ((1 << bits) - 1 << len(packed) * 8 - bits).to_bytes(len(packed), "big")
        found.append(_expression("bitwise", _number(1, 1), _number(2, 1), _number(3, len(packed)),
                                 nested(4, attribute(1, mask)), nested(5, attribute(1, bytes(len(packed))))))
    return [*found, _equals(packed)]


def port(number: int) -> Expressions:
    """Match packets of TCP or UDP to this port."""
    return [_payload(2, 2, 2), _equals(struct.pack(">H", number))]


def to_socket(number: int, address: str = "") -> Expressions:
    """Redirect the packet to a transparent listener on this port and accept it; continue without a listener."""
    if not address:
        return [_load(1, struct.pack(">H", number)), _expression("tproxy", _number(1, 0), _number(3, 1)),
                *verdict(ACCEPT)]
    return [_load(1, socket.inet_aton(address)), _load(2, struct.pack(">H", number)),
            _expression("tproxy", _number(1, _IPV4), _number(2, 1), _number(3, 2)), *verdict(ACCEPT)]


def verdict(code: int) -> Expressions:
    return [_expression("immediate", _number(1, 0), nested(2, nested(2, _number(1, code))))]


def refuse() -> Expressions:
    """Drop the packet, and send an error to the sender."""
    return [_expression("reject", _number(1, 2), attribute(2, bytes([_ADMIN_PROHIBITED])))]
