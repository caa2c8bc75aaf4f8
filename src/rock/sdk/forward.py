"""WebSockets to a server, and ports of this machine that lead to one in a sandbox. Without a colour: both faces of the
SDK share it, and a forward has a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from rock.errors import Conflict, RockError, Unavailable, from_wire
from rock.sdk import ownerkey
from rock.sdk.servers import Servers

LOCAL_HOST = "127.0.0.1"
_CHUNK = 128 << 10
_CLOSE_WITHIN = 5.0  # seconds


async def web_socket(base_url: str, target: str, headers: Mapping[str, str]) -> ClientConnection:
    """A WebSocket of a server, open. Any RockError with which it refuses; Unavailable when it cannot be reached."""
    failure: Exception | None = None
    for address in Servers.parse(base_url).read:
        url = f"{'wss' if address.tls else 'ws'}://{address.host_header}{address.path}{target}"
        try:
            own = ownerkey.headers_for(address, headers)
            return await connect(url, additional_headers={**headers, **own}, proxy=None, compression=None,
                                 max_size=None)  # fmt: skip
        except InvalidStatus as error:
            raise _refusal(error.response.status_code, bytes(error.response.body or b"")) from None
        except (OSError, WebSocketException) as error:
            failure = error
    raise Unavailable(f"no WebSocket at {base_url}: {failure}", hint="check the URL of the server") from None


def _refusal(status: int, body: bytes) -> RockError:
    try:
        return from_wire(json.loads(body), status)
    except ValueError:
        return from_wire(body.decode("utf-8", "replace"), status)


class PortForward:
    """A port here, `port` of `host`, that leads to one in a sandbox for as long as it is open.

    failed: called with what kept a connection from being made; whoever connected sees only that it broke.
    """

    def __init__(
        self,
        base_url: str,
        target: str,
        headers: Mapping[str, str],
        local: int = 0,
        failed: Callable[[RockError], None] = lambda error: None,
    ) -> None:
        self.host = LOCAL_HOST
        self.port = local
        self.failed = failed
        self._base_url = base_url
        self._target = target
        self._headers = headers
        self._carriers: set[asyncio.Task[None]] = set()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._enough: asyncio.Event | None = None

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Take connections meanwhile. Conflict: the port here is taken."""
        try:
            server = await asyncio.start_server(self._accept, self.host, self.port, limit=_CHUNK)
        except OSError as error:
            raise Conflict(
                f"cannot listen on {self.address}: {error.strerror or error}", hint="0 takes a port that is free"
            ) from None
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            for task in self._carriers:
                task.cancel()
            await asyncio.gather(*self._carriers, return_exceptions=True)

    # ---- in a thread, for callers of any colour ----

    def open(self) -> None:
        """Listen, in the background. Conflict: the port here is taken."""
        started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="rock-port-forward", daemon=True)
        self._thread.start()
        started.result()

    def close(self) -> None:
        """Break all connections and listen no more."""
        if self._thread is None:
            return
        if self._loop is not None and self._enough is not None:
            with contextlib.suppress(RuntimeError):  # it ended already
                self._loop.call_soon_threadsafe(self._enough.set)
        self._thread.join()
        self._thread = None

    def _run(self, started: concurrent.futures.Future[None]) -> None:
        async def listen() -> None:
            self._loop, self._enough = asyncio.get_running_loop(), asyncio.Event()
            async with self.listening():
                started.set_result(None)
                await self._enough.wait()

        try:
            asyncio.run(listen())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    # ---- connections ----

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._carriers.add(task)
        try:
            if await self._carry(reader, writer):
                writer.close()
                with contextlib.suppress(OSError, TimeoutError):
                    async with asyncio.timeout(_CLOSE_WITHIN):
                        await writer.wait_closed()
        except asyncio.CancelledError:
            pass  # by `listening`, which waits for this
        except RockError as error:
            self.failed(error)
        finally:
            writer.transport.abort()
            self._carriers.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Bytes both ways; True when both directions came to their ends."""
        async with await web_socket(self._base_url, self._target, self._headers) as socket:
            tasks = [asyncio.create_task(_send(reader, socket)), asyncio.create_task(_receive(socket, writer))]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            return socket.close_code == 1000


async def _send(reader: asyncio.StreamReader, socket: ClientConnection) -> None:
    """All that is said here, then its end. Returns when the other side is through or ours broke."""
    with contextlib.suppress(ConnectionClosed, OSError):
        while data := await reader.read(_CHUNK):
            await socket.send(data)
        await socket.send(b"")
        await socket.wait_closed()


async def _receive(socket: ClientConnection, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionClosed, OSError):
        async for message in socket:
            if isinstance(message, bytes) and message:
                writer.write(message)
                await writer.drain()
            else:
                writer.write_eof()
