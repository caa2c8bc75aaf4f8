"""Requests of the dialect to a sandbox: the native request of the same meaning, through the data plane in this process.

`Native.call` returns the whole response; `Native.open` returns one whose body is streamed, with back pressure.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, MutableMapping
from typing import Any
from urllib.parse import quote, urlencode

import orjson

from rock.dialects.e2b.errors import NotRunning
from rock.errors import Conflict, NotFound, RockError, SandboxError, Unavailable, from_wire
from rock.http.asgi import App, Disconnected
from rock.protocol.keys import CALLER, Caller
from rock.protocol.routes import ROUTES

_AHEAD = 4  # parts of a body that are read ahead of the client
Body = bytes | AsyncIterator[bytes]
Headers = list[tuple[bytes, bytes]]


class Reply:
    """A response whose body is read as a stream. `close` ends the request; it is idempotent."""

    def __init__(
        self, status: int, headers: list[tuple[bytes, bytes]], task: asyncio.Future[None],
        queue: asyncio.Queue[bytes | None],
    ) -> None:  # fmt: skip
        self.status = status
        self.headers = headers
        self._task = task
        self._queue = queue

    def header(self, name: str) -> str:
        wanted = name.encode()
        return next((value.decode("latin-1") for key, value in self.headers if key.lower() == wanted), "")

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The parts of the body until its end. An application that fails before the end raises here."""
        while True:
            if self._queue.empty() and not self._task.done():
                waiting = asyncio.ensure_future(self._queue.get())
                both: set[asyncio.Future[Any]] = {self._task, waiting}
                try:
                    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not waiting.done():
                        waiting.cancel()
                        await asyncio.gather(waiting, return_exceptions=True)
                if waiting.cancelled():
                    continue
                part = waiting.result()
            elif not self._queue.empty():
                part = self._queue.get_nowait()
            else:
                self._task.result()
                return
            if part is None:
                return
            yield part

    async def read(self) -> bytes:
        try:
            return b"".join([part async for part in self.chunks()])
        finally:
            await self.close()

    async def close(self) -> None:
        if not self._task.done():
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class Sandbox:
    """One sandbox, as a caller may use it through the data plane."""

    def __init__(self, data: App, sandbox_id: str, caller: Caller) -> None:
        self.id = sandbox_id
        self.caller = caller
        self._data = data
        self._open: set[Reply] = set()

    def copy(self) -> Sandbox:
        """The same sandbox, for requests that outlive this object."""
        return Sandbox(self._data, self.id, self.caller)

    def done(self, reply: Reply) -> None:
        """A response was read completely."""
        self._open.discard(reply)

    async def close(self) -> None:
        """End the requests whose responses were not read completely."""
        while self._open:
            await self._open.pop().close()

    async def json(self, route: str, body: Any = b"", query: Mapping[str, Any] | None = None, **path: str) -> Any:
        """The response as plain data. RockError, NotRunning."""
        return orjson.loads(await self.read(route, body, query, **path))

    async def read(self, route: str, body: Any = b"", query: Mapping[str, Any] | None = None, **path: str) -> bytes:
        """The response. body: bytes, a stream of them, or plain data to be sent as JSON. RockError, NotRunning."""
        reply = await self.open(route, body, query, **path)
        try:
            return await reply.read()
        finally:
            self.done(reply)

    async def open(self, route: str, body: Any = b"", query: Mapping[str, Any] | None = None, **path: str) -> Reply:
        """The response as a stream. RockError, NotRunning."""
        row = ROUTES[route]
        if not isinstance(body, bytes | AsyncIterator):
            body = orjson.dumps(body)
        target = row.path.format(sandbox_id=self.id, **path)
        reply = await self.request(row.method, target, urlencode(query or {}), [], body)
        if reply.status < 400:
            return reply
        try:
            raise raised(await reply.read(), reply.status, self.id)
        finally:
            self.done(reply)

    async def request(
        self, method: str, path: str, query: str, headers: Headers, body: Body
    ) -> Reply:
        """Any request to the data plane; an error is a response with its status."""
        scope: dict[str, Any] = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
            "raw_path": quote(path).encode(), "query_string": query.encode("latin-1", "replace"), "scheme": "http",
            "client": None, "server": None, "headers": headers, CALLER: self.caller,
        }  # fmt: skip
        reply = await send(self._data, scope, body)
        self._open.add(reply)
        return reply


async def send(app: App, scope: dict[str, Any], body: Body) -> Reply:
    """Send a request to an application in this process and return the head of its response."""
    started: asyncio.Future[tuple[int, list[tuple[bytes, bytes]]]] = asyncio.get_running_loop().create_future()
    queue: asyncio.Queue[bytes | None] = asyncio.Queue(_AHEAD)
    given = False

    async def receive() -> MutableMapping[str, Any]:
        nonlocal given
        if not given and not isinstance(body, bytes):
            async for part in body:
                return {"type": "http.request", "body": part, "more_body": True}
        if not given:
            given = True
            return {"type": "http.request", "body": body if isinstance(body, bytes) else b"", "more_body": False}
        await asyncio.Event().wait()  # the client of this request leaves by cancellation
        raise AssertionError

    async def take(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            if not started.done():
                started.set_result((message["status"], list(message.get("headers", ()))))
            return
        if message.get("body"):
            await queue.put(message["body"])
        if not message.get("more_body", False):
            await queue.put(None)

    task = asyncio.ensure_future(app(scope, receive, take))

    def ended(done: asyncio.Future[None]) -> None:
        if not started.done():
            error = None if done.cancelled() else done.exception()
            started.set_exception(error or Disconnected())

    task.add_done_callback(ended)
    try:
        status, headers = await started
    except BaseException:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise
    return Reply(status, headers, task, queue)


def raised(reply: bytes, status: int, sandbox_id: str) -> RockError | NotRunning:
    """The error of a native response; NotRunning where the sandbox is missing, paused or over."""
    try:
        error = from_wire(orjson.loads(reply), status)
    except orjson.JSONDecodeError:
        return from_wire(reply.decode(errors="replace"), status)
    missing = isinstance(error, NotFound) and error.message == f"Sandbox {sandbox_id} not found"
    over = isinstance(error, SandboxError) or "cause" in error.details
    paused = isinstance(error, Conflict) and "is paused" in error.message
    pending = isinstance(error, Unavailable) and "has not started" in error.message
    return NotRunning(sandbox_id) if missing or over or paused or pending else error
