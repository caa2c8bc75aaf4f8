"""Frames of the multiplexer: many channels over one byte stream, between a sandbox's pid 1 and the server.

    kind (1 byte)  channel (4)  length (4)  payload  0xA5

A former peer may have stopped in the middle of a frame. Each connection therefore starts with `begin(nonce)`, which no
earlier frame can span, and data before the response to it is discarded.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

HEAD = struct.Struct(">BII")
MOST = 32 << 10  # maximum bytes of a payload
WINDOW = 128 << 10  # maximum unread bytes of a channel in one direction
MOST_CHANNELS = 1024
MAGIC = bytes.fromhex("c3524f434b2d63617272696572b1e59d")
NONCE = 16
_END = b"\xa5"
PAD, BEGIN, READY, PACKET, OPEN, DATA, END, GONE, CREDIT, SIZE = range(10)
# Kinds of OPEN: the server reads, writes, or both; or a file whose content follows; or a file to be written.
READ, WRITE, SOCKET, TERMINAL, CONTENT, FILE = b"r", b"w", b"s", b"t", b"f", b"g"


class Nonsense(ValueError):
    """The data is not a frame."""


def frame(kind: int, channel: int = 0, payload: bytes | memoryview = b"") -> bytes:
    return b"".join((HEAD.pack(kind, channel, len(payload)), payload, _END))


def begin(nonce: bytes) -> bytes:
    """A server's first message: terminates an interrupted frame without completing it."""
    return bytes(HEAD.size + MOST + 1) + frame(BEGIN, 0, MAGIC + nonce)


def packet(message: bytes) -> Iterator[bytes]:
    """Split a message into frames, of which the last has the channel 0."""
    view = memoryview(message)
    while len(view) > MOST:
        yield frame(PACKET, 1, view[:MOST])
        view = view[MOST:]
    yield frame(PACKET, 0, view)


class Parser:
    """Parses frames incrementally. After invalid data it waits for BEGIN; if `strict` it raises."""

    def __init__(self, *, strict: bool = False) -> None:
        self._rest = bytearray()
        self._strict = strict
        self._lost = not strict

    def feed(self, data: bytes) -> Iterator[tuple[int, int, bytes]]:
        """The complete frames of these and earlier bytes. Invalid frames are skipped."""
        self._rest += data
        while (found := self._next()) is not None:
            if found[0] != PAD:
                yield found

    def _next(self) -> tuple[int, int, bytes] | None:
        rest = self._rest
        if self._lost and not self._find():
            return None
        if rest[:1] == b"\0":
            del rest[: len(rest) - len(rest.lstrip(b"\0"))]
        if len(rest) < HEAD.size:
            return None
        kind, channel, length = HEAD.unpack_from(rest)
        if length > MOST or kind > SIZE:
            return self._wrong()
        whole = HEAD.size + length + 1
        if len(rest) < whole:
            return None
        if rest[whole - 1 : whole] != _END:
            return self._wrong()
        payload = bytes(rest[HEAD.size : whole - 1])
        del rest[:whole]
        return kind, channel, payload

    def _wrong(self) -> tuple[int, int, bytes] | None:
        if self._strict:
            raise Nonsense("this is no frame")
        self._lost = True
        del self._rest[:1]
        return self._next()

    def _find(self) -> bool:
        """Skip to the next BEGIN, if it has arrived."""
        start = HEAD.pack(BEGIN, 0, len(MAGIC) + NONCE) + MAGIC
        at = self._rest.find(start)
        if at < 0:
            del self._rest[: max(0, len(self._rest) - len(start) + 1)]
            return False
        del self._rest[:at]
        self._lost = False
        return True
