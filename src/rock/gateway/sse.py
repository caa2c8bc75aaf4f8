"""Server-sent events: parsing in any portions, and rendering."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SSEEvent:
    event: str
    data: str

    def render(self) -> bytes:
        head = f"event: {self.event}\n" if self.event else ""
        return (head + "".join(f"data: {line}\n" for line in self.data.split("\n")) + "\n").encode()


class SSEParser:
    def __init__(self, limit: int = 64 << 20) -> None:
        self._rest = b""
        self._limit = limit

    def feed(self, data: bytes) -> list[SSEEvent]:
        self._rest += data
        text = self._rest.replace(b"\r\n", b"\n")
        *blocks, self._rest = text.split(b"\n\n")
        found = []
        for block in blocks:
            event, lines = "", []
            for line in block.decode("utf-8", "replace").split("\n"):
                name, _, value = line.partition(":")
                value = value.removeprefix(" ")
                if name == "event":
                    event = value
                elif name == "data":
                    lines.append(value)
            if lines:
                found.append(SSEEvent(event, "\n".join(lines)))
        return found
