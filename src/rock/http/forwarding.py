"""An ASGI application that runs in another process: requests are forwarded to it over keep-alive connections.

    scope, receive ──► one connection of the pool ──► the rocklet elsewhere
    send ◄── status, headers, body as they arrive ◄──

Bodies are streamed in pieces with backpressure in both directions. When a client disconnects, the other server receives
a cancellation, so that its request ends there too; a connection that breaks without one means that the forwarding
server died, and its requests continue (relay.py). Unavailable is raised, before any part of a response was sent, when
no connection succeeds. It is also raised after some seconds when a worker accepts connections and sends no response,
not even to a health probe.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, unquote, urlsplit

import httptools

from rock.errors import InvalidConfig, Unavailable
from rock.http import relay, unix
from rock.http.asgi import Receive, Scope, Send, deny, failure, of_connection
from rock.http.relay import Ids
from rock.protocol.routes import CALL, OUTAGE, ROUTES, SENT, UNSENT

_CONNECT_WITHIN = 5.0
_IDLE = 30.0  # seconds that an unused connection stays open: less than the server at its other end keeps it open
_MOST_IDLE = 64
_BODY_WITHIN = 0.2  # seconds for the first piece of a body, before the head is sent without it
_MOST_WAITING = 256 << 10  # unread bytes of a response above which reading is paused
_PROMPT = 0.5  # seconds after which the connection of the client is watched
_END = b"0\r\n\r\n"
_CALL = CALL.encode()
_CANCELS = (0.0, 0.2, 1.0, 3.0)  # pauses, in seconds, before each attempt to cancel a call
_QUIET = 3.0  # seconds without a response after which a worker is probed, and timeout of a probe; two in a row may fail
_HEALTH = ROUTES["health"].path
_DESCRIBES_BODY = frozenset({b"content-length", b"content-type", b"idempotency-key", _CALL})
_HOP_BY_HOP = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"te", b"trailer", b"expect",
                         b"proxy-connection"})  # fmt: skip
_OUTSIDE, _FOR = b"x-forwarded-host", b"x-forwarded-for"
_NEEDED = frozenset({b"host", b"content-length", b"content-type", b"authorization", _CALL})  # no client removes these

log = logging.getLogger("rock.proxy")


class Broken(Exception):
    """The connection ended, or its data is not valid HTTP."""


class ClientConnection(asyncio.Protocol):
    """One connection, and the response that arrives over it."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.used_at = 0.0
        self._loop = asyncio.get_running_loop()
        self._ended: str | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._waiter: asyncio.Future[None] | None = None
        self._begin(False)

    def _begin(self, bodiless: bool) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._bodiless = bodiless
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._paused = False
        self._whole = False
        self._keep = False
        self.sent = False  # the complete request was sent
        self.silent = False  # abandoned, because the worker does not respond

    # ---- asyncio.Protocol ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop has its own transport class

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"what it answered is no HTTP: {error}")
            self.close()
        if self._size > _MOST_WAITING and not self._paused and self.transport is not None:
            self._paused = True
            self.transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.status and not self._whole and exc is None and not self._framed():
            self._whole = True  # a response without a length ends with its connection
        self._end(f"the connection broke{f': {exc}' if exc else ''}")
        self._writable.set()
        self._wake()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # ---- httptools ----

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            self.headers = []
            return
        self.status = status
        self._keep = self._parser.should_keep_alive()
        if self._bodiless:
            self._whole = True
            self._keep = False  # the parser waits for a body

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
        self._size += len(body)

    def on_message_complete(self) -> None:
        if self.status:
            self._whole = True

    # ---- requests and responses ----

    def _framed(self) -> bool:
        return any(name in (b"content-length", b"transfer-encoding") for name, _ in self.headers)

    def _end(self, why: str) -> None:
        self._ended = self._ended or why

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _news(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    @property
    def alive(self) -> bool:
        return self._ended is None and self.transport is not None and not self.transport.is_closing()

    @property
    def reusable(self) -> bool:
        return self.alive and self._whole and self._keep and self.sent and not self._pieces

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def give_up(self, why: str) -> None:
        """Fail the waiting request, with the reason why there is no response."""
        self.silent = True
        self.fail(why)

    def fail(self, why: str) -> None:
        """Fail the waiting request, and close the connection."""
        self._end(why)
        self.close()
        self._wake()

    def ask(self, head: bytes, bodiless: bool) -> None:
        """Begin a request."""
        self._begin(bodiless)
        assert self.transport is not None
        self.transport.write(head)

    async def write(self, data: bytes) -> None:
        """Write data. Broken when the connection is closed."""
        if not self.alive:
            raise Broken(self._ended or "the connection is closing")
        assert self.transport is not None
        self.transport.write(data)
        await self._writable.wait()

    async def answered(self) -> None:
        """Wait for status and headers. Broken."""
        while not self.status:
            if self._ended is not None:
                raise Broken(self._ended)
            await self._news()

    async def pieces(self) -> AsyncGenerator[bytes]:
        """The body as it arrives. Broken when it ends too early."""
        while True:
            while self._pieces:
                piece = self._pieces.popleft()
                self._size -= len(piece)
                yield piece
            if self._paused and self.transport is not None:
                self._paused = False
                self.transport.resume_reading()  # also at the end: the next response arrives on this connection
            if self._whole:
                return
            if self._ended is not None:
                raise Broken(self._ended)
            if not self._pieces:
                await self._news()


class RemoteApp:
    """A server at `url`, http://HOST:PORT or unix:/FILE, as an ASGI application. headers: added to each request, such
    as an API key. most_idle: connections that stay open for later requests. dial: opens a connection, in place of one
    to the host in `url`."""

    def __init__(
        self, url: str, headers: dict[str, str] | None = None, tls: ssl.SSLContext | None = None,
        most_idle: int = _MOST_IDLE, dial: Callable[[], Awaitable[socket.socket]] | None = None,
    ) -> None:  # fmt: skip
        self.url = url.rstrip("/")
        if dial is None and url.startswith(unix.SCHEME):
            dial, url = partial(unix.dial, Path(unquote(url.removeprefix(unix.SCHEME)))), "http://localhost"
        parts = urlsplit(url)
        if (parts.scheme not in ("http", "https") and dial is None) or not parts.hostname:
            raise InvalidConfig(f"{url!r} is no address of a server", hint="write http://HOST:PORT")
        self._most_idle = most_idle
        self._dial = dial
        self._host, self._port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        own = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        self._own = [(b"host", parts.netloc.rpartition("@")[2].encode()), *own]
        self._names = frozenset(name for name, _ in self._own)
        self._dropped = _HOP_BY_HOP | self._names | {_FOR, _CALL}
        self._idle: list[ClientConnection] = []
        self._busy: set[ClientConnection] = set()
        self._sockets: set[asyncio.Task[None]] = set()
        self._calls = Ids()
        self._cancels: set[asyncio.Task[None]] = set()
        # forwarded requests without a response, with their start times
        self._waiting: dict[ClientConnection, float] = {}
        self._probing: asyncio.Task[None] | None = None

    @property
    def host(self) -> str:
        """The host name or address in the URL."""
        return self._host

    async def close(self) -> None:
        """Close every connection. Pending requests and WebSockets are broken."""
        for connection in (*self._idle, *self._busy):
            connection.close()
        for task in (*self._sockets, *self._cancels, *filter(None, (self._probing,))):
            task.cancel()
        self._idle.clear()
        await asyncio.sleep(0)  # lets the transports close their sockets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._socket(scope, receive, send)
            return
        try:
            connection = await self._connection()
        except Unavailable as error:
            await failure(error).send(send)
            return
        await self._exchange(connection, scope, receive, send)

    # ---- connection pool ----

    async def _connection(self) -> ClientConnection:
        now = time.monotonic()
        while self._idle:
            found = self._idle.pop()
            if found.alive and now - found.used_at < _IDLE:
                self._busy.add(found)
                return found
            found.close()
        loop = asyncio.get_running_loop()
        try:
            if self._dial is not None:
                _, made = await loop.create_connection(ClientConnection, sock=await self._dial())
            else:
                async with asyncio.timeout(_CONNECT_WITHIN):
                    _, made = await loop.create_connection(ClientConnection, self._host, self._port, ssl=self._tls)
        except (OSError, TimeoutError) as error:
            why = str(error) or f"no answer within {_CONNECT_WITHIN:g} s"
            raise self._unreached(why, **UNSENT) from None
        self._busy.add(made)
        return made

    async def is_reached(self) -> bool:
        """Whether the server accepts a connection now; the connection is used for the next request."""
        try:
            made = await self._connection()
        except Unavailable:
            return False
        self._busy.discard(made)
        made.used_at = time.monotonic()
        self._idle.append(made)
        return True

    def _unreached(self, why: str, **details: bool) -> Unavailable:
        return Unavailable(f"the worker at {self.url} is not reached: {why}", hint="retry", details=details)

    def _done(self, connection: ClientConnection) -> None:
        self._busy.discard(connection)
        if connection.reusable and len(self._idle) < self._most_idle:
            connection.used_at = time.monotonic()
            self._idle.append(connection)
        else:
            connection.close()

    # ---- HTTP ----

    def _head(self, scope: Scope, headers: list[tuple[bytes, bytes]]) -> bytes:
        path: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
        query: bytes = scope.get("query_string", b"")
        lines = [b"%s %s HTTP/1.1" % (scope["method"].encode(), path + (b"?" + query if query else b""))]
        lines += [b"%s: %s" % header for header in headers]
        return b"\r\n".join([*lines, b"", b""])

    def _kept(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        headers = scope["headers"]
        drop = self._dropped | (of_connection(headers) - _NEEDED)
        kept = [header for header in headers if header[0] not in drop] + self._own
        if all(name != _OUTSIDE for name, _ in headers):  # the name by which the client knows this server
            kept += [(_OUTSIDE, value) for name, value in headers if name == b"host"][:1]
        chain = [value for name, value in headers if name == _FOR]
        if client := scope.get("client"):
            chain.append(str(client[0]).encode())
        return [*kept, (_FOR, b", ".join(chain))] if chain else kept

    async def _exchange(
        self, connection: ClientConnection, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """One request. An error before the response has begun is Unavailable; after that the client's own connection
        has to be closed."""
        first: MutableMapping[str, Any] = {"type": "http.request", "more_body": True}
        with contextlib.suppress(TimeoutError):  # a response may precede the body
            async with asyncio.timeout(_BODY_WITHIN):
                first = await receive()
        if first["type"] == "http.disconnect":
            self._done(connection)
            return
        body: bytes = first.get("body", b"")
        call = self._calls.next()
        kept = self._kept(scope)
        headers = [*kept, (_CALL, call)]
        more = bool(first.get("more_body", False))
        sized = any(name == b"content-length" for name, _ in headers)
        if not sized and (more or body):
            headers.append((b"transfer-encoding", b"chunked") if more else (b"content-length", b"%d" % len(body)))
        chunked = more and not sized
        connection.ask(self._head(scope, headers) + (_chunk(body) if chunked and body else body),
                       scope["method"] == "HEAD")
        begun = False
        rest = asyncio.create_task(self._rest(connection, receive, chunked, more), name="remote-request")
        # The client disconnected: its request ends.
        rest.add_done_callback(lambda task: None if task.cancelled() else self._left(connection, call, kept))
        try:
            self._waits(connection)
            try:
                await connection.answered()
            finally:
                self._waiting.pop(connection, None)
            begun = True
            drop = _HOP_BY_HOP | (of_connection(connection.headers) - _NEEDED)
            headers = [header for header in connection.headers if header[0] not in drop]
            await send({"type": "http.response.start", "status": connection.status, "headers": headers})
            async with contextlib.aclosing(connection.pieces()) as pieces:
                async for piece in pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except Broken as error:
            if rest.done():
                return
            if begun:
                # An incomplete response is the only remaining error signal, and makes the server close the connection.
                log.warning("a response of %s broke off: %s", self.url, error)
                return
            await failure(self._unreached(str(error), **SENT, silent=connection.silent)).send(send)
        finally:
            rest.cancel()
            await asyncio.gather(rest, return_exceptions=True)
            self._done(connection)

    def _left(self, connection: ClientConnection, call: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        """The client disconnected before it received its response."""
        complete = connection.sent  # an incomplete body ends the request without a cancellation
        connection.close()
        if complete:
            task = asyncio.create_task(self._cancel(call, headers), name="remote-cancel")
            self._cancels.add(task)
            task.add_done_callback(self._cancels.discard)

    async def _cancel(self, call: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        """Send a cancellation of a call whose client disconnected. If it fails, the reconnect period ends the call."""
        own = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers
               if name not in _DESCRIBES_BODY and name not in self._names}  # fmt: skip
        for pause in _CANCELS:
            await asyncio.sleep(pause)
            with contextlib.suppress(Unavailable, TimeoutError):
                async with asyncio.timeout(_CONNECT_WITHIN):
                    await self.request("DELETE", ROUTES["cancel_call"].url(call=call.decode()), headers=own)
                    return

    # ---- workers that accept connections and do not respond ----

    def _waits(self, connection: ClientConnection) -> None:
        self._waiting[connection] = time.monotonic()
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._probe(), name="remote-probe")

    async def _probe(self) -> None:
        """While requests wait for long: probe the worker, and fail the requests when the probe gets no response."""
        failed = 0
        while self._waiting:
            await asyncio.sleep(_QUIET / 2 if not failed else 0)
            asked = time.monotonic()
            old = [connection for connection, since in self._waiting.items() if since < asked - _QUIET]
            if not old:
                failed = 0
                continue
            try:
                async with asyncio.timeout(_QUIET):
                    await self.request("GET", _HEALTH)
                failed = 0
                continue
            except (Unavailable, TimeoutError):
                failed += 1
            if failed >= 2:
                failed = 0
                for connection in old:
                    if connection in self._waiting:
                        connection.give_up("it takes connections, and has not answered a probe of its health twice")

    async def _rest(self, connection: ClientConnection, receive: Receive, chunked: bool, more: bool) -> None:
        """Forward the rest of the request's body; then wait for the client's disconnect."""
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = message.get("body", b""), bool(message.get("more_body", False))
            with contextlib.suppress(Broken):  # the task that waits for the response reports it
                if body:
                    await connection.write(_chunk(body) if chunked else body)
                if not more and chunked:
                    await connection.write(_END)
        connection.sent = True
        await asyncio.sleep(_PROMPT)
        while (await receive())["type"] != "http.disconnect":
            pass

    # ---- WebSocket ----

    async def _socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [header for header in self._kept(scope) if header[0] != b"host"]
        work = relay.joined(self._host, self._port, self._tls, scope, headers, receive, send, self._dial)
        task = asyncio.create_task(work, name="remote-socket")
        self._sockets.add(task)
        try:
            await asyncio.wait({task})
        finally:
            self._sockets.discard(task)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if task.cancelled():
            with contextlib.suppress(RuntimeError, OSError):  # it may be closed already
                await send({"type": "websocket.close", "code": 1011, "reason": "the worker is gone"})
        elif isinstance(error := task.exception(), OSError | TimeoutError | EOFError):
            await deny(scope, send, self._unreached(str(error), **OUTAGE))
        elif error is not None:
            raise error

    # ---- requests of this server ----

    async def request(
        self, method: str, path: str, query: str = "", body: bytes = b"", headers: dict[str, str] | None = None,
        *, probed: bool = False,
    ) -> tuple[int, bytes]:  # fmt: skip
        """(status, body) of one request. probed: fail the request when the server does not respond to a probe.
        Unavailable."""
        stream = self.stream(method, path, query, None, body, headers, probed)
        async with contextlib.aclosing(stream):
            status = await anext(stream)
            parts = [part async for part in stream if isinstance(part, bytes)]
        assert isinstance(status, int)
        return status, b"".join(parts)

    async def stream(
        self, method: str, path: str, query: str, body: AsyncIterator[bytes] | None, whole: bytes = b"",
        headers: dict[str, str] | None = None, probed: bool = False,
    ) -> AsyncGenerator[int | bytes]:  # fmt: skip
        """The status, then the response as it arrives. Unavailable, also in the middle of it."""
        connection = await self._connection()
        writing: asyncio.Task[None] | None = None
        try:
            scope: MutableMapping[str, Any] = {"method": method, "path": path, "query_string": query.encode()}
            framing = (b"content-length", b"%d" % len(whole)) if body is None else (b"transfer-encoding", b"chunked")
            more = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
            head = self._head(scope, [*self._own, *more, (b"content-type", b"application/json"), framing])
            connection.ask(head + whole, method == "HEAD")
            connection.sent = body is None
            if body is not None:
                writing = asyncio.create_task(_write_all(connection, body), name="remote-body")
                writing.add_done_callback(partial(_unsendable, connection))
            if probed:
                self._waits(connection)
            try:
                await connection.answered()
            finally:
                self._waiting.pop(connection, None)
            yield connection.status
            async with contextlib.aclosing(connection.pieces()) as pieces:
                async for piece in pieces:
                    yield piece
        except Broken as error:
            unread = None if writing is None or not writing.done() or writing.cancelled() else writing.exception()
            if unread is not None and not isinstance(unread, Broken):
                raise unread from None
            raise self._unreached(str(error), **SENT, silent=connection.silent) from None
        finally:
            if writing is not None:
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)
            self._done(connection)


async def first_reached(remotes: Sequence[RemoteApp]) -> RemoteApp:
    """The first server that accepts a connection; the last one when none does, so that its error is reported."""
    for remote in remotes[:-1]:
        if await remote.is_reached():
            return remote
    return remotes[-1]


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _unsendable(connection: ClientConnection, writing: asyncio.Task[None]) -> None:
    """The body of a request could not be read to its end: the worker would wait for the rest of it."""
    if not writing.cancelled() and writing.exception() is not None:
        connection.fail("the body of the request broke off")


async def _write_all(connection: ClientConnection, body: AsyncIterator[bytes]) -> None:
    async for part in body:
        if part:
            await connection.write(_chunk(part))
    await connection.write(_END)
    connection.sent = True
