"""Frames: the protocol of environments, between the client and the rocklet and between the rocklet and the sandbox.

    length of the payload (4 bytes) | op (1) | flags (1) | environment (4) | request id (8) | index (8) | payload

in network byte order. The payload of a request or a response is a value (values.py), or JSON with the flag PLAIN; the
rocklet forwards it unread. With the flag IN_MEMORY in the request, a large response may have the flag too: its payload
is then 8 bytes, the length of the real payload, which starts at the beginning of the environment's part of the shared
memory. The client of an environment on this machine, or else the rocklet, sends the flag if no other response of the
environment is outstanding. Ops:

    HELLO   token                     response OK with the token: synchronizes the rocklet with the start of a frame
    MAKE    {"env_id", "kwargs", ..}  response OK
    RESET   {"seed", "options"}       response OK [observation, info]
    STEP    action                    response OK [observation, reward, terminated, truncated, info]
    CALL    [what, *arguments]        see worker.py
    CLOSE                             response OK, then the process exits
    KILL                              of the environment in the frame, by the zygote
    FORK    see host.py               by the zygote, and by the environment that it forwards it to
    ENDED   from the zygote: its process is gone. JSON {"status", "stderr"}
    ERROR   instead of OK: JSON {"kind", "type", "message", "traceback", "next"}

The index of a STEP is its number in the episode; other ops may use any number. A repeated op and index returns the
first response and is not executed again. -1 is no index.

On a pipe with several writers, frames are split into pieces of at most 4096 bytes, which the kernel writes atomically:

    length (2 bytes) | flags (1: 1 the first, 2 the last of its frame) | environment (4) | bytes of the frame
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

HELLO, MAKE, RESET, STEP, CALL, CLOSE, KILL, FORK = range(8)
OK, ERROR, ENDED = 16, 17, 18
NAMES = {MAKE: "make", RESET: "reset", STEP: "step", CALL: "call", CLOSE: "close", FORK: "fork"}
PLAIN = 1
IN_MEMORY = 2
MEMORY = 197  # the descriptor of the shared memory inside
PART = 16 << 20  # bytes of the memory of an environment with pipes of its own
NO_INDEX = -1

HEAD = struct.Struct(">IBBIQq")
LIMIT = 257 << 20  # maximum bytes of one payload

FIRST, LAST = 1, 2
HEADER = struct.Struct(">HBI")
PIECE = 4096 - HEADER.size  # PIPE_BUF: the size of an atomic write
MOST_STREAMS = 4096  # streams with incomplete messages, and
MOST_JOINING = 2 * LIMIT  # bytes of all of them: the writers may be hostile
_WEIGHT = 64  # bytes of overhead per piece, also for an empty one


def pieces(stream: int, payload: bytes) -> Iterator[bytes]:
    """Split a message into pieces."""
    if len(payload) <= PIECE:
        yield HEADER.pack(len(payload), FIRST | LAST, stream) + payload
        return
    for start in range(0, len(payload), PIECE):
        part = payload[start : start + PIECE]
        flags = (FIRST if start == 0 else 0) | (LAST if start + PIECE >= len(payload) else 0)
        yield HEADER.pack(len(part), flags, stream) + part


class Joiner:
    """Reassembles messages from pieces. A message whose beginning was lost is dropped.

    Incomplete messages are bounded per stream, in total, and in their number: ValueError beyond that.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._parts: dict[int, list[bytes]] = {}
        self._sizes: dict[int, int] = {}
        self._held = 0  # bytes, with the overhead of each piece

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """(stream, message) for all messages that are complete now."""
        self._buffer += data
        position = 0
        try:
            while len(self._buffer) - position >= HEADER.size:
                length, flags, stream = HEADER.unpack_from(self._buffer, position)
                end = position + HEADER.size + length
                if end > len(self._buffer):
                    break
                part = bytes(self._buffer[position + HEADER.size : end])
                position = end
                if flags & FIRST:
                    self.forget(stream)
                    if flags & LAST:
                        yield stream, part
                        continue
                    self._parts[stream] = []
                    self._sizes[stream] = 0
                elif stream not in self._parts:
                    continue
                self._hold(stream, part)
                if flags & LAST:
                    whole = b"".join(self._parts[stream])
                    self.forget(stream)
                    yield stream, whole
        finally:
            del self._buffer[:position]

    def _hold(self, stream: int, part: bytes) -> None:
        self._parts[stream].append(part)
        self._sizes[stream] += len(part)
        self._held += len(part) + _WEIGHT
        if self._sizes[stream] > LIMIT + HEAD.size:
            raise ValueError(f"a message is over the limit of {LIMIT} bytes")
        if len(self._parts) > MOST_STREAMS:
            raise ValueError(f"more than {MOST_STREAMS} messages have begun and not ended")
        if self._held > MOST_JOINING:
            raise ValueError(f"messages that have not ended are over the limit of {MOST_JOINING} bytes")

    def forget(self, stream: int) -> None:
        """Drop the incomplete message of a stream."""
        parts = self._parts.pop(stream, None)
        if parts is not None:
            self._held -= self._sizes.pop(stream) + _WEIGHT * len(parts)


Frame = tuple[int, int, int, int, int, Any]


def unpack(message: bytes | memoryview) -> Frame:
    """(op, flags, environment, request id, index, payload) of a complete frame; ValueError when it is invalid."""
    if len(message) < HEAD.size:
        raise ValueError("a frame ends in its head")
    length, op, flags, env, id, index = HEAD.unpack_from(message)
    if length != len(message) - HEAD.size:
        raise ValueError("a frame of another length than it says")
    return op, flags, env, id, index, message[HEAD.size :]


def split(data: bytes) -> Iterator[Frame]:
    """The frames of a message; ValueError when they do not end with the message."""
    view = memoryview(data)
    position = 0
    while position < len(data):
        if len(data) - position < HEAD.size:
            raise ValueError("a frame ends in its head")
        length, op, flags, env, id, index = HEAD.unpack_from(view, position)
        position += HEAD.size + length
        if position > len(data):
            raise ValueError("a frame ends too early")
        yield op, flags, env, id, index, view[position - length : position]
