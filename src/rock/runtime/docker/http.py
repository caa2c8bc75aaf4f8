"""HTTP to a unix socket, one connection a request: what an engine needs, and nothing that a cancelled caller leaves
open."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import h11

_CHUNK = 64 << 10
_LONGEST_LINE = 1 << 20
_LARGEST = 64 << 20  # bytes of one answer that is read as a whole


class Broken(Exception):
    """The connection ended early, or what came over it is no HTTP."""


class Answer:
    """The head of an answer, and its body as it comes."""

    def __init__(self, connection: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.status = 0
        self._connection = connection
        self._reader = reader
        self._writer = writer

    async def head(self) -> None:
        """Wait for it."""
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
        """The whole body."""
        data = bytearray()
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                data += piece
                if len(data) > _LARGEST:
                    raise Broken(f"an answer of more than {_LARGEST} bytes")
        return bytes(data)

    async def lines(self) -> AsyncGenerator[bytes]:
        """The body line by line."""
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

    def stream(self) -> tuple[bytes, asyncio.StreamReader, asyncio.StreamWriter]:
        """The connection itself, after an upgrade, and what has come over it already."""
        return bytes(self._connection.trailing_data[0]), self._reader, self._writer


@contextlib.asynccontextmanager
async def ask(path: str, method: str, target: str, body: bytes, headers: Mapping[str, str]) -> AsyncGenerator[Answer]:
    """Send a request to the socket at `path`; its answer, until the end of the block. OSError, Broken."""
    reader, writer = await asyncio.open_unix_connection(path, limit=_CHUNK)
    try:
        connection = h11.Connection(h11.CLIENT)
        lines = {"Host": "engine", "Connection": "close", "Content-Length": str(len(body)), **headers}
        if body:
            lines["Content-Type"] = "application/json"
        writer.write(connection.send(h11.Request(method=method, target=target, headers=list(lines.items()))) or b"")
        if body:
            writer.write(connection.send(h11.Data(data=body)) or b"")
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        await writer.drain()
        answer = Answer(connection, reader, writer)
        await answer.head()
        yield answer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
