"""Server-sent events: an incremental parser with limits, and rendering."""

from __future__ import annotations

from dataclasses import dataclass

MAX_EVENT = 64 << 20  # bytes
_COMMENT = b":"


class SSEError(ValueError):
    """The stream is not one of server-sent events, or one event is over the limit."""


@dataclass(frozen=True, slots=True)
class SSEEvent:
    """event: its type, "" without one. data: lines joined by "\\n"."""

    event: str
    data: str

    def render(self) -> bytes:
        head = f"event: {self.event}\n" if self.event else ""
        return (head + "".join(f"data: {line}\n" for line in self.data.split("\n")) + "\n").encode("utf-8", "replace")


class SSEParser:
    """Events from bytes in any portions. Line ends: LF, CR LF and CR. Invalid UTF-8 is replaced.

    An event without its empty line at the end of the stream is incomplete; `rest` has its bytes. limit: bytes of one
    event; SSEError above it.
    """

    def __init__(self, limit: int = MAX_EVENT) -> None:
        self._limit = limit
        self._line = bytearray()
        self._type = ""
        self._data: list[str] = []
        self._size = 0
        self._after_cr = False

    @property
    def rest(self) -> bool:
        """Whether an event is incomplete."""
        return bool(self._line or self._data)

    def feed(self, data: bytes) -> list[SSEEvent]:
        """The events that these bytes complete. SSEError."""
        if self._after_cr and data:
            self._after_cr = False
            if data[:1] == b"\n":
                data = data[1:]
        if b"\r" in data:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        found: list[SSEEvent] = []
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            line = data[start:end]
            if self._line:
                self._line += line
                line = bytes(self._line)
                self._line.clear()
            self._accept(line, found)
            start = end + 1
        self._line += data[start:] if start else data
        if self._size + len(self._line) > self._limit:
            raise SSEError(f"an event of the stream is over {self._limit} bytes")
        return found

    def _accept(self, line: bytes, found: list[SSEEvent]) -> None:
        if not line:
            if self._data:
                found.append(SSEEvent(self._type, "\n".join(self._data)))
            self._type, self._data, self._size = "", [], 0
            return
        if line.startswith(_COMMENT):
            return
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._size += len(value)
            if self._size > self._limit:
                raise SSEError(f"an event of the stream is over {self._limit} bytes")
            self._data.append(value.decode("utf-8", "replace"))
        elif name == b"event":
            self._type = value[:200].decode("utf-8", "replace")
