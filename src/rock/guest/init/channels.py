"""Frames of the carrier: many streams over one stream of bytes, between a sandbox's pid 1 and the server.

    kind (1 byte)  channel (4)  length (4)  payload  0xA5

Either side may find the stream in any state, as one before it broke off somewhere: it begins with `begin(nonce)`, in
which no frame of before can live on, and what comes before the answer to that is thrown away.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

HEAD = struct.Struct(">BII")
MOST = 32 << 10  # bytes of a payload
WINDOW = 128 << 10  # bytes of a channel on the way in one direction, that nobody has taken yet
MOST_CHANNELS = 1024
MAGIC = bytes.fromhex("c3524f434b2d63617272696572b1e59d")
NONCE = 16
_END = b"\xa5"
PAD, BEGIN, READY, PACKET, OPEN, DATA, END, GONE, CREDIT, SIZE = range(10)
# Kinds of OPEN: the server reads it, writes it, both; or it is a file whose content comes, or which is to be written.
READ, WRITE, SOCKET, TERMINAL, CONTENT, FILE = b"r", b"w", b"s", b"t", b"f", b"g"


class Nonsense(ValueError):
    """What came is no frame."""


def frame(kind: int, channel: int = 0, payload: bytes | memoryview = b"") -> bytes:
    return b"".join((HEAD.pack(kind, channel, len(payload)), payload, _END))


def begin(nonce: bytes) -> bytes:
    """What a server sends first: it ends whatever frame was broken off, without making it a whole one."""
    return bytes(HEAD.size + MOST + 1) + frame(BEGIN, 0, MAGIC + nonce)


def packet(message: bytes) -> Iterator[bytes]:
    """A message in frames, of which the last has the channel 0."""
    view = memoryview(message)
    while len(view) > MOST:
        yield frame(PACKET, 1, view[:MOST])
        view = view[MOST:]
    yield frame(PACKET, 0, view)


class Parser:
    """Takes bytes as they come, gives whole frames. After nonsense it waits for BEGIN; if `strict` it raises it."""

    def __init__(self, *, strict: bool = False) -> None:
        self._rest = bytearray()
        self._strict = strict
        self._lost = not strict

    def feed(self, data: bytes) -> Iterator[tuple[int, int, bytes]]:
        """Frames of these bytes and of those before. Frames that break the rules are passed over."""
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
        """Go to the next BEGIN, if it has come."""
        start = HEAD.pack(BEGIN, 0, len(MAGIC) + NONCE) + MAGIC
        at = self._rest.find(start)
        if at < 0:
            del self._rest[: max(0, len(self._rest) - len(start) + 1)]
            return False
        del self._rest[:at]
        self._lost = False
        return True
