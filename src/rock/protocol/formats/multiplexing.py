"""The frames of an upgraded connection: many requests and responses at once over one TCP or Unix connection.

    client ──► server   GET /v1/connection, Upgrade: rock-frames/1 ──► 101
    client ──► server   REQUEST, DATA, CREDIT, CANCEL
    server ──► client   RESPONSE, DATA, CREDIT, ABORT, CLOSE

A frame is a head of 12 bytes in network byte order, and a payload:

    length of the payload (4 bytes) | kind (1) | flags (1) | value (2) | number of the request (4) | payload

docs/reference/frames.md describes each kind. This module has no I/O; server and clients use it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any

from rock.protocol.routes import METHODS

NAME = "rock-frames/1"
HEAD = struct.Struct(">IBBHI")

REQUEST, DATA, CREDIT, CANCEL = 1, 2, 3, 4
RESPONSE, ABORT, CLOSE = 17, 18, 19
OF_CLIENT = frozenset({REQUEST, DATA, CREDIT, CANCEL})
OF_SERVER = frozenset({RESPONSE, DATA, CREDIT, ABORT, CLOSE})
END = 1  # flag of the last frame of a request or a response

LIMIT = 1 << 20  # bytes of a payload
WINDOW = 256 << 10  # bytes of a request body that may be sent before the first CREDIT
MOST_WINDOW = (1 << 32) - 1
MOST_REQUESTS = 1024  # requests of a connection that have no complete response
MOST_HEADERS = 64  # of a request frame; those of the upgrade request are not counted
_REQUEST = struct.Struct(">IHHB")  # window, length of the target, of the headers, of the key
_HEADERS = struct.Struct(">H")
_NAME, _VALUE = struct.Struct(">B"), struct.Struct(">H")
_CREDIT = struct.Struct(">I")
_LARGE = 32 << 10  # bytes of a payload that gets memory of its own size

Headers = list[tuple[bytes, bytes]]


class Malformed(ValueError):
    """The bytes are not a sequence of frames, or a frame is not what its kind requires. The connection ends."""


def pack(kind: int, number: int, payload: bytes = b"", *, flags: int = 0, value: int = 0) -> bytes:
    """A frame."""
    return HEAD.pack(len(payload), kind, flags, value, number) + payload


def pack_headers(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Headers with the length of each name and value. ValueError for one that is too long."""
    parts = []
    try:
        for name, value in headers:
            parts += [_NAME.pack(len(name)), name, _VALUE.pack(len(value)), value]
    except struct.error:
        raise ValueError("a header is too long for a frame") from None
    return b"".join(parts)


def request(
    method: str, target: bytes, key: bytes, body: bytes, number: int, *, headers: bytes = b"", window: int,
    end: bool = True,
) -> bytes:  # fmt: skip
    """The frame of a request. headers: of `pack_headers`. ValueError for a target, key or headers that are too long."""
    try:
        fixed = _REQUEST.pack(window, len(target), len(headers), len(key))
    except struct.error:
        raise ValueError("the target or the headers of a request are too long for a frame") from None
    length = _REQUEST.size + len(target) + len(key) + len(headers) + len(body)
    head = HEAD.pack(length, REQUEST, END if end else 0, METHODS.index(method), number)
    return b"".join((head, fixed, target, key, headers, body))


def response(status: int, headers: bytes, body: bytes, number: int, *, end: bool) -> bytes:
    """The frame of a response. ValueError for headers that are too long."""
    try:
        fixed = _HEADERS.pack(len(headers))
    except struct.error:
        raise ValueError("the headers of a response are too long for a frame") from None
    head = HEAD.pack(_HEADERS.size + len(headers) + len(body), RESPONSE, END if end else 0, status, number)
    return b"".join((head, fixed, headers, body))


def credit(number: int, count: int) -> bytes:
    """The frame by which the receiver of a body accepts `count` more bytes of it."""
    return pack(CREDIT, number, _CREDIT.pack(count))


def credit_of(payload: bytes) -> int:
    """Malformed."""
    if len(payload) != _CREDIT.size:
        raise Malformed("a credit of another length than 4 bytes")
    return int(_CREDIT.unpack(payload)[0])


def request_of(value: int, payload: bytes) -> tuple[str, bytes, bytes, Headers, bytes, int]:
    """(method, target, key, headers, body, window) of a request. Malformed."""
    if value >= len(METHODS):
        raise Malformed(f"there is no method {value}")
    if len(payload) < _REQUEST.size:
        raise Malformed("a request ends in its head")
    window, target, headers, key = _REQUEST.unpack_from(payload)
    at = _REQUEST.size
    after_target = at + target
    after_key = after_target + key
    begin = after_key + headers
    if begin > len(payload):
        raise Malformed("a request ends in its target or its headers")
    found = headers_of(payload[after_key:begin]) if headers else []
    return METHODS[value], payload[at:after_target], payload[after_target:after_key], found, payload[begin:], window


def response_of(payload: bytes) -> tuple[Headers, bytes]:
    """(headers, body) of a response. The body of a memoryview is one too. Malformed."""
    if len(payload) < _HEADERS.size:
        raise Malformed("a response ends in its head")
    begin = _HEADERS.size + int(_HEADERS.unpack_from(payload)[0])
    if begin > len(payload):
        raise Malformed("a response ends in its headers")
    return headers_of(bytes(payload[_HEADERS.size : begin])), payload[begin:]


def headers_of(data: bytes) -> Headers:
    """The headers of `pack_headers`. Malformed."""
    found: Headers = []
    at, end = 0, len(data)
    while at < end:
        if len(found) >= MOST_HEADERS:
            raise Malformed(f"a frame has more than {MOST_HEADERS} headers")
        name_end = at + 1 + data[at]
        value_at = name_end + _VALUE.size
        if value_at > end:
            raise Malformed("a frame ends in a header")
        value_end = value_at + int(_VALUE.unpack_from(data, name_end)[0])
        if value_end > end:
            raise Malformed("a frame ends in the value of a header")
        found.append((data[at + 1 : name_end], data[value_at:value_end]))
        at = value_end
    return found


class FrameReader:
    """Splits bytes in any portions into frames: (kind, flags, value, number, payload).

    kinds: that the sender may use. The length of a payload is checked before the payload is stored. Malformed. views: a
    payload of more than 32 KiB that comes in several portions is a memoryview, without further copies; a caller can
    receive the rest of such a frame into `room`.
    """

    __slots__ = ("_buffer", "_filled", "_kinds", "_room", "_views", "_wanted")

    def __init__(self, kinds: frozenset[int], *, views: bool = False) -> None:
        self._kinds = kinds
        self._views = views
        self._buffer = bytearray()
        self._wanted = HEAD.size
        self._room: memoryview | None = None  # of a whole frame
        self._filled = 0

    @property
    def incomplete(self) -> bool:
        """Whether a frame has begun and not ended."""
        return bool(self._buffer) or self._room is not None

    @property
    def missing(self) -> int:
        """Bytes until a frame that has begun ends."""
        if self._room is not None:
            return len(self._room) - self._filled
        return self._wanted - len(self._buffer) if self._buffer else 0

    @property
    def room(self) -> memoryview | None:
        """Where the rest of a large frame belongs, if there is one; `filled` follows."""
        return None if self._room is None else self._room[self._filled :]

    def filled(self, count: int) -> Iterator[tuple[int, int, int, int, Any]]:
        """So many bytes were received into `room`."""
        assert self._room is not None
        self._filled += count
        if self._filled == len(self._room):
            whole, self._room = self._room, None
            _, kind, flags, value, number = HEAD.unpack_from(whole)
            yield kind, flags, value, number, whole[HEAD.size :]

    def feed(self, data: bytes) -> Iterator[tuple[int, int, int, int, Any]]:
        if self._room is not None:
            taken = data[: self.missing]
            self._room[self._filled : self._filled + len(taken)] = taken
            yield from self.filled(len(taken))
            data = data[len(taken) :]
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._wanted:
                return
            data = bytes(self._buffer)
            self._buffer.clear()
        at, size, head = 0, len(data), HEAD.size
        while size - at >= head:
            length, kind, flags, value, number = HEAD.unpack_from(data, at)
            if length > LIMIT:
                raise Malformed(f"a frame of {length} bytes is over the limit of {LIMIT}")
            if kind not in self._kinds:
                raise Malformed(f"there is no frame of kind {kind}")
            end = at + head + length
            if end > size:
                self._wanted = end - at
                if self._views and length >= _LARGE:
                    self._room = memoryview(bytearray(self._wanted))
                    self._filled = size - at
                    self._room[: self._filled] = data[at:]
                    return
                break
            yield kind, flags, value, number, data[at + head : end]
            at = end
        else:
            self._wanted = head
        if at < size:
            self._buffer += data[at:] if at else data
