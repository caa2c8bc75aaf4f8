"""Minimal HTTP client for unix sockets: one connection per request, which closes when the caller is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any, NamedTuple

import h11

_CHUNK = 64 << 10
_LONGEST_LINE = 1 << 20
_LARGEST = 64 << 20  # maximum bytes of a response that is read as a whole


class Broken(Exception):
    """The connection ended early, or the data is not HTTP."""


class Answer:
    """The status and headers of a response, and its body as a stream."""

    def __init__(self, connection: h11.Connection, reader: asyncio.StreamReader) -> None:
        self.status = 0
        self._connection = connection
        self._reader = reader

    async def head(self) -> None:
        """Read status and headers."""
        event = await self._next()
        while isinstance(event, h11.InformationalResponse) and event.status_code != 101:
            event = await self._next()
        if not isinstance(event, h11.Response | h11.InformationalResponse):
            raise Broken("the connection ended before an answer")
        self.status = event.status_code

    async def _next(self) -> Any:
        while True:
            try:
                event = self._connection.next_event()
                if event is not h11.NEED_DATA:
                    return event
                self._connection.receive_data(await self._reader.read(_CHUNK))
            except h11.RemoteProtocolError as error:
                raise Broken(f"the connection broke: {error}") from None

    async def pieces(self) -> AsyncGenerator[bytes]:
        while not isinstance(event := await self._next(), h11.EndOfMessage | h11.ConnectionClosed):
            if isinstance(event, h11.Data):
                yield bytes(event.data)

    async def read(self) -> bytes:
        """Read the whole body."""
        data = bytearray()
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                data += piece
                if len(data) > _LARGEST:
                    raise Broken(f"an answer of more than {_LARGEST} bytes")
        return bytes(data)

    async def lines(self) -> AsyncGenerator[bytes]:
        """Yield the body line by line."""
        rest = bytearray()
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                rest += piece
                *whole, last = rest.split(b"\n")
                rest = bytearray(last)
                if len(rest) > _LONGEST_LINE:
                    raise Broken(f"a line of more than {_LONGEST_LINE} bytes")
                for line in whole:
                    yield bytes(line)
        if rest:
            yield bytes(rest)


@contextlib.asynccontextmanager
async def ask(path: str, method: str, target: str, body: bytes, headers: Mapping[str, str]) -> AsyncGenerator[Answer]:
    """Send a request to the socket at `path` and yield the response; the connection closes with the block. OSError,
    Broken."""
    reader, writer = await asyncio.open_unix_connection(path, limit=_CHUNK)
    try:
        yield await _exchange(h11.Connection(h11.CLIENT), reader, writer, method, target, body, headers)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


class Upgraded:
    """A connection that became a plain stream (the engine calls it hijacked)."""

    def __init__(self, first: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._first = first
        self._reader = reader
        self._writer = writer

    async def read(self) -> bytes:
        """Read available bytes; empty at the end."""
        first, self._first = self._first, b""
        return first or await self._reader.read(_CHUNK)

    async def write(self, data: bytes) -> None:
        """Write; returns when more can be written."""
        self._writer.write(data)
        await self._writer.drain()

    def close(self) -> None:
        self._writer.close()


async def upgrade(path: str, target: str) -> Upgraded | Refused:
    """POST with an upgrade to a stream; the caller closes it. OSError, Broken."""
    reader, writer = await asyncio.open_unix_connection(path, limit=_CHUNK)
    try:
        connection = h11.Connection(h11.CLIENT)
        headers = {"Connection": "Upgrade", "Upgrade": "tcp"}
        answer = await _exchange(connection, reader, writer, "POST", target, b"", headers)
        if answer.status == 101:
            return Upgraded(bytes(connection.trailing_data[0]), reader, writer)
        refused = Refused(answer.status, await answer.read())
    except BaseException:
        writer.close()
        raise
    writer.close()
    return refused


class Refused(NamedTuple):
    """A response that is not a stream."""

    status: int
    body: bytes


async def _exchange(connection: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str,
                    target: str, body: bytes, headers: Mapping[str, str]) -> Answer:
    lines = {"Host": "engine", "Connection": "close", "Content-Length": str(len(body)), **headers}
    if body:
        lines["Content-Type"] = "application/json"
    writer.write(connection.send(h11.Request(method=method, target=target, headers=list(lines.items()))) or b"")
    if body:
        writer.write(connection.send(h11.Data(data=body)) or b"")
    writer.write(connection.send(h11.EndOfMessage()) or b"")
    await writer.drain()
    answer = Answer(connection, reader)
    await answer.head()
    return answer
