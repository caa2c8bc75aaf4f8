"""A small real HTTP server for tests of the transport: it does on the wire exactly what a test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field


@dataclass
class Request:
    line: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Wire:
    """What the server saw. `connections` counts those that were opened."""

    port: int = 0
    connections: int = 0
    requests: list[Request] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


Reply = Callable[[Request, asyncio.StreamWriter, Wire], Awaitable[bool | None]]


def answer(body: bytes = b"{}", status: str = "200 OK", *headers: str) -> bytes:
    lines = "".join(f"{header}\r\n" for header in headers)
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{lines}\r\n".encode() + body


def say(raw: bytes, close: bool = False) -> Reply:
    """A reply of these bytes, after which the connection stays open unless `close`."""

    async def reply(request: Request, writer: asyncio.StreamWriter, wire: Wire) -> bool:
        writer.write(raw)
        return close

    return reply


async def echo(request: Request, writer: asyncio.StreamWriter, wire: Wire) -> None:
    writer.write(answer(request.body))


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    line, *rest = head[:-4].split("\r\n")
    headers = {name.lower(): value for name, value in (item.split(": ", 1) for item in rest)}
    body = b""
    if headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    elif size := int(headers.get("content-length", 0)):
        body = await reader.readexactly(size)
    return Request(line, headers, body)


@contextlib.contextmanager
def serve(reply: Reply, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1", port: int = 0) -> Iterator[Wire]:
    """Run the server in a thread of its own."""
    wire = Wire()
    ready = threading.Event()
    stop: list[Callable[[], object]] = []
    writers: list[asyncio.StreamWriter] = []

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire.connections += 1
        writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.CancelledError, ssl.SSLError):
            while (request := await read_request(reader)) is not None:
                wire.requests.append(request)
                if await reply(request, writer, wire):
                    break
                await writer.drain()
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(client, host, port, ssl=tls)
        wire.port = server.sockets[0].getsockname()[1]
        done = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(done.set))
        ready.set()
        await done.wait()
        server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0.01)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    ready.wait(10)
    try:
        yield wire
    finally:
        stop[0]()
        thread.join(10)


def number_of(request: Request) -> int:
    found = re.search(r"/(\d+) ", request.line)
    assert found
    return int(found[1])
