"""Connections in the reverse direction: a worker without inbound ports opens WebSockets to a server, which uses them as
connections to the worker.

Each WebSocket is one stream of bytes. It waits until the server needs a connection. The first bytes that the server
sends are the beginning of an HTTP connection to the worker's own port; the worker opens that connection, and replaces
the waiting WebSocket by a new one. When one end closes, the other end closes too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections import OrderedDict, deque
from collections.abc import Coroutine, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from rock.errors import QuotaExceeded, Unavailable
from rock.http.asgi import Receive, Request, Send
from rock.http.relay import race
from rock.protocol.routes import ROUTES, UNSENT

log = logging.getLogger("rock.worker")

HOLDER = b"x-rock-holder"  # the identity of the machine that opens a tunnel: of JoinWorker
SCHEME = "tunnel://"
_IDLE = 8  # streams of a worker that wait at each server
_MOST_WAITING = 4 * _IDLE
_MOST_WORKERS = 20_000
_CHUNK = 128 << 10
_TAKEN_WITHIN = 5.0  # seconds that a request waits for a stream
_PAUSE, _LONGEST_PAUSE = 0.2, 5.0  # seconds between attempts of a worker to open a stream
_PING = 10.0  # seconds between pings, and timeout of one


# ---- the side of the server ----

@dataclass
class _Waiting:
    """The waiting streams of one worker. changed: replaced by each new stream."""

    streams: deque[asyncio.Future[socket.socket]] = field(default_factory=deque)
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Tunnels:
    """The streams that workers opened to this server, by name and identity of the worker."""

    def __init__(self) -> None:
        self._workers: OrderedDict[tuple[str, str], _Waiting] = OrderedDict()

    async def dial(self, name: str, holder: str) -> socket.socket:
        """A connected socket, of which the worker has the other end. Unavailable after five seconds without a
        stream."""
        waiting = self._of(name, holder)
        try:
            async with asyncio.timeout(_TAKEN_WITHIN):
                while True:
                    while waiting.streams:
                        stream = waiting.streams.popleft()
                        if not stream.done():
                            own, other = socket.socketpair()
                            own.setblocking(False)
                            other.setblocking(False)
                            stream.set_result(other)
                            return own
                    waiting.changed.clear()
                    await waiting.changed.wait()
        except TimeoutError:
            raise Unavailable(f"worker {name} has no open tunnel to this server",
                              hint="name all servers in its --join, and check that it reaches them",
                              details=UNSENT) from None  # fmt: skip

    def _of(self, name: str, holder: str) -> _Waiting:
        found = self._workers.get((name, holder))
        if found is None:
            found = self._workers[name, holder] = _Waiting()
            while len(self._workers) > _MOST_WORKERS:
                self._workers.popitem(last=False)
        self._workers.move_to_end((name, holder))
        return found

    async def serve(self, name: str, request: Request, receive: Receive, send: Send) -> None:
        """Serve a WebSocket of a worker until it is closed. QuotaExceeded when too many of them wait."""
        holder = next((value.decode("latin-1") for key, value in request.scope["headers"] if key == HOLDER), "")[:64]
        waiting = self._of(name, holder)
        waiting.streams = deque(stream for stream in waiting.streams if not stream.done())
        if len(waiting.streams) >= _MOST_WAITING:
            raise QuotaExceeded(f"{_MOST_WAITING} tunnels of worker {name} wait already",
                                hint="start one rocklet with this name")
        await receive()  # websocket.connect
        await send({"type": "websocket.accept"})
        taken: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
        waiting.streams.append(taken)
        waiting.changed.set()
        message: asyncio.Future[MutableMapping[str, Any]] = asyncio.ensure_future(receive())
        try:
            either: list[asyncio.Future[Any]] = [taken, message]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if taken.done():
                await _bridge(taken.result(), message, receive, send)
        finally:
            message.cancel()
            await asyncio.gather(message, return_exceptions=True)
            if taken.done() and not taken.cancelled():
                taken.result().close()
            taken.cancel()


async def _bridge(
    sock: socket.socket, first: asyncio.Future[MutableMapping[str, Any]], receive: Receive, send: Send
) -> None:
    reader, writer = await asyncio.open_connection(sock=sock, limit=_CHUNK)

    async def from_worker() -> bool:
        message = await first
        while True:
            data = message.get("bytes")
            if message["type"] == "websocket.disconnect" or data is None:
                return True
            writer.write(data)
            await writer.drain()
            message = await receive()

    async def to_worker() -> None:
        while data := await reader.read(_CHUNK):
            await send({"type": "websocket.send", "bytes": data})
        await send({"type": "websocket.close", "code": 1000})

    try:
        await race(from_worker(), to_worker())
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


# ---- the side of the worker ----

class Tunnel:
    """Keeps streams open to each server, for as long as it is open itself. servers: base URLs. port: the worker's own
    port on this machine."""

    def __init__(self, servers: list[str], key: str | None, name: str, holder: str, host: str, port: int) -> None:
        self._servers = servers
        self._name = name
        self._headers = {HOLDER.decode(): holder, **({} if key is None else {"authorization": f"Bearer {key}"})}
        self._own = host, port
        self._tasks: set[asyncio.Task[None]] = set()
        self._warned: set[str] = set()

    def open(self) -> None:
        for server in self._servers:
            for _ in range(_IDLE):
                self._start(self._keep(server), f"tunnel to {server}")

    async def close(self) -> None:
        while self._tasks:  # a stream that begins meanwhile adds a task
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._tasks.difference_update(tasks)

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep(self, server: str) -> None:
        """Keep one stream waiting at a server."""
        url = server.replace("http", "ws", 1) + ROUTES["worker_tunnel"].url(worker=self._name)
        pause = _PAUSE
        while True:
            try:
                stream = await connect(url, additional_headers=self._headers, max_size=16 << 20, open_timeout=10,
                                       ping_interval=_PING, ping_timeout=_PING, compression=None, proxy=None,
                                       ssl=ssl.create_default_context() if url.startswith("wss") else None)  # fmt: skip
            except (OSError, TimeoutError, EOFError, WebSocketException) as error:
                if server not in self._warned:
                    self._warned.add(server)
                    log.warning("no tunnel to %s: %s; trying again", server, error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            self._warned.discard(server)
            pause = _PAUSE
            try:
                first = await stream.recv()
            except (WebSocketException, OSError):
                continue  # the server stopped, or the network broke
            except BaseException:
                stream.transport.abort()
                raise
            self._start(self._carry(stream, first), "tunnel stream")

    async def _carry(self, stream: ClientConnection, first: str | bytes) -> None:
        """Relay one stream to the worker's own port."""
        try:
            reader, writer = await asyncio.open_connection(*self._own, limit=_CHUNK)
        except OSError as error:
            log.warning("the own port of this worker refuses a connection: %s", error)
            await stream.close(1011)
            return

        async def from_server() -> bool:
            message = first
            try:
                while isinstance(message, bytes):
                    writer.write(message)
                    await writer.drain()
                    message = await stream.recv()
            except WebSocketException:
                pass
            return True

        async def to_server() -> None:
            with contextlib.suppress(WebSocketException):
                while data := await reader.read(_CHUNK):
                    await stream.send(data)
                await stream.close()

        try:
            await race(from_server(), to_server())
        finally:
            writer.transport.abort()
            stream.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
