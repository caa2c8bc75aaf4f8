"""The server side of an upgraded connection (protocol/formats/multiplexing.py): each request frame is a request of the
same ASGI application as over HTTP.

    GET /v1/connection ──► authentication ──► 101 ──► HttpConnection hands its socket to MultiplexedConnection
    REQUEST ──► scope ──► ids, authentication, fair queue, audit, proxy, handler ──► RESPONSE

The headers of the upgrade request belong to each request, so each request is authenticated, also after its key was
revoked. Limits are checked before a payload is stored:

| limit | value | effect |
|---|---|---|
| payload of a frame | 1 MiB | CLOSE |
| headers of a request frame | 64, 64 KB each | CLOSE |
| target | 32 KB | CLOSE |
| requests without a complete response | 1,024 | this request gets QuotaExceeded |
| body that the application has not read | 256 KiB of a request | CLOSE |
| the same of all requests | 16 MiB | reading pauses |
| responses that the client does not read | 64 KiB | reading pauses, and handlers wait |
| time for a frame, from its first byte | 30 s | CLOSE |
| idle connection | 300 s | CLOSE |
"""

from __future__ import annotations

import asyncio
import logging
import re
import urllib.parse
from collections.abc import Callable, MutableMapping
from typing import Any

from rock.errors import QuotaExceeded, RockError, Unsupported, unexpected
from rock.http.asgi import Answer, App, Request, failure
from rock.http.event_loop import BUDGET, rounds
from rock.protocol.formats import multiplexing as wire
from rock.protocol.formats.multiplexing import ABORT, CANCEL, CLOSE, DATA, END, HEAD, LIMIT, MOST_REQUESTS, NAME, WINDOW
from rock.protocol.routes import IDEMPOTENCY_KEY, ROUTES

UPGRADE = "rock.upgrade"  # in a scope: the protocol that the client asks for
FRAME_WITHIN = 30.0  # seconds
IDLE = 300.0  # seconds
_TARGET_LIMIT = 32 << 10
_HELD = 16 << 20  # bytes of unread bodies
_PIECE = 8 << 10  # bytes parsed at once
_LINGER = 2.0  # seconds for which a client may read the reason of a CLOSE
_COPIED = 16 << 10  # a larger body is written without a copy
_ROOM = LIMIT - (66 << 10)  # bytes of a body beside the longest headers
_TARGETS = 256  # parsed targets of a connection
_TARGET = re.compile(rb"/[\x21\x22\x24-\x7e]*")
_HEADER = re.compile(rb"[a-z0-9!#$%&'*+.^_`|~-]+")
_TEXT = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_KEY = IDEMPOTENCY_KEY.encode()
_JSON = (b"content-type", b"application/json")
# Headers of one HTTP message or of its framing: not of the requests that follow, and of no frame.
_OF_MESSAGE = frozenset({b"connection", b"upgrade", b"keep-alive", b"transfer-encoding", b"content-length", b"te",
                         b"trailer", b"expect", b"proxy-connection"})  # fmt: skip
_OF_UPGRADE = _OF_MESSAGE | {_KEY, b"content-type", b"x-request-id", b"eagleeye-traceid", b"traceparent"}
_NOT_SENT = _OF_MESSAGE | {b"date"}

log = logging.getLogger("rock.wire")

Message = MutableMapping[str, Any]


async def connection(request: Request) -> Answer:
    """The handler of GET /v1/connection. Unsupported without the header Upgrade, which a proxy may have removed."""
    if request.scope.get(UPGRADE) != NAME:
        raise Unsupported(f"this request upgrades a connection to {NAME}, and has no such header Upgrade",
                          hint="send Connection: upgrade and Upgrade: rock-frames/1; a proxy may have removed them")
    return Answer(status=101)


def add_route(router: Any, setting: str) -> None:
    """Add the handler to a router. setting: ROCK_MULTIPLEX."""
    if setting == "on":
        router.add(ROUTES["connection"], connection)


class Exchange:
    """One request: the `receive` and `send` of its application."""

    __slots__ = ("_body", "_connection", "_credit", "_delivered", "_early", "_head", "_waiter", "complete",
                 "disconnected", "headless", "held", "number", "started", "status", "whole", "window")  # fmt: skip

    def __init__(self, connection: MultiplexedConnection, number: int, body: bytes, whole: bool, window: int) -> None:
        self._connection = connection
        self.number = number
        self._body = body
        self.held = len(body)  # bytes that arrived and were not read
        self.window = window  # bytes that the client accepts
        self.whole = whole
        self.status = 0
        self.headless = False  # a response to HEAD has no body
        self.started = False  # the head of the response was sent
        self.complete = False
        self.disconnected = False
        self._delivered = False
        self._waiter: asyncio.Future[None] | None = None
        self._credit: asyncio.Future[None] | None = None
        self._head = b""
        self._early: asyncio.Handle | None = None

    @property
    def transport(self) -> asyncio.Transport:
        """Of the connection."""
        return self._connection.transport

    # ---- request ----

    async def receive(self) -> Message:
        while not self.disconnected and not self.complete:
            if self._body or (self.whole and not self._delivered):
                body, self._body = self._body, b""
                self._delivered = self.whole
                if body:
                    self._connection.was_read(self, len(body))
                return {"type": "http.request", "body": body, "more_body": not self.whole}
            self._waiter = self._connection.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return {"type": "http.disconnect"}

    def arrived(self, data: bytes, whole: bool) -> None:
        """More of the body. Malformed above the window."""
        if self.whole or self.held + len(data) > WINDOW:
            raise wire.Malformed("more of a body than was accepted")
        self._body += data
        self.held += len(data)
        self.whole = whole
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def left(self) -> None:
        """The client has disconnected."""
        self.disconnected = True
        self.wake()
        self.accept(0)

    def accept(self, count: int) -> None:
        """The client accepts more of the response. Malformed."""
        self.window += count
        if self.window > wire.MOST_WINDOW:
            raise wire.Malformed("a window is too large")
        if self._credit is not None and not self._credit.done():
            self._credit.set_result(None)

    # ---- response ----

    async def send(self, message: Message) -> None:
        connection = self._connection
        if connection.paused:
            await connection.writable.wait()
        if self.disconnected or self.complete:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = message.get("headers", ())
            kept = [header for header in headers if header != _JSON and header[0] not in _NOT_SENT]
            if len(kept) < len(headers) and (b"connection", b"close") in headers:
                connection.retire()
            self._head = wire.pack_headers(kept)
            self._early = connection.loop.call_soon(self._send_head)  # unless the body follows at once
            return
        body: bytes = b"" if self.headless else message.get("body", b"")
        more = message.get("more_body", False)
        if not self.started and len(body) <= min(self.window, _ROOM) and not more:
            assert self._early is not None
            self._early.cancel()
            self.started = self.complete = True
            if len(body) > _COPIED:
                frame = wire.response(self.status, self._head, b"", self.number, end=True)
                length = len(frame) - HEAD.size + len(body)
                connection.transport.writelines([length.to_bytes(4, "big") + frame[4:], body])
            else:
                connection.transport.write(wire.response(self.status, self._head, body, self.number, end=True))
            return
        self._send_head()
        await self._send_parts(body, more)

    def _send_head(self) -> None:
        if not self.started and not self.disconnected:
            self.started = True
            self.transport.write(wire.response(self.status, self._head, b"", self.number, end=False))

    async def _send_parts(self, body: bytes, more: bool) -> None:
        connection, at = self._connection, 0
        while True:
            part = body[at : at + min(self.window, LIMIT)]
            at += len(part)
            self.window -= len(part)
            end = at == len(body) and not more
            if part or end:
                self.complete = end
                connection.transport.write(wire.pack(DATA, self.number, part, flags=END if end else 0))
            if at == len(body):
                return
            if connection.paused:
                await connection.writable.wait()
            while not self.window and not self.disconnected:
                self._credit = connection.loop.create_future()
                try:
                    await self._credit
                finally:
                    self._credit = None
            if self.disconnected:
                return

    def fail(self, error: RockError) -> None:
        """End the response: with an error, or cut off when its head was sent."""
        if self.complete or self.disconnected:
            return
        self.complete = True
        if self._early is not None:
            self._early.cancel()
        if self.started:
            self.transport.write(wire.pack(ABORT, self.number))
            return
        answer = failure(error)
        self.started = True
        headers = wire.pack_headers(answer.headers)
        self.transport.write(wire.response(answer.status, headers, answer.body, self.number, end=True))


class MultiplexedConnection(asyncio.Protocol):
    """A connection after its upgrade. common: fields of all scopes. headers: of the upgrade request. left: called when
    the connection is closed."""

    def __init__(
        self, app: App, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, common: dict[str, Any],
        headers: wire.Headers, server_state: Any, left: Callable[[], None],
        frame_within: float = FRAME_WITHIN, idle: float = IDLE,
    ) -> None:  # fmt: skip
        self._app = app
        self.transport = transport
        self.loop = loop
        self._common = common
        self._headers = [header for header in headers if header[0] not in _OF_UPGRADE]
        self._tasks: set[asyncio.Task[None]] = server_state.tasks
        self._connections: set[Any] = server_state.connections
        self._connections.add(self)
        self._left = left
        self._frame_within = frame_within
        self._idle = idle
        self.paused = False  # the client does not read
        self.writable = asyncio.Event()  # set while it does
        self.writable.set()
        self._reader = wire.FrameReader(wire.OF_CLIENT)
        self._exchanges: dict[int, Exchange] = {}
        self._targets: dict[bytes, tuple[str, bytes, bytes]] = {}
        self._last = 0  # number of the last request
        self._held = 0  # bytes of bodies that were not read
        self._rest = b""  # that arrived and is parsed later
        self._stopped = False  # reading is paused
        self._retired = False  # the client was told to send no more requests
        self._closing = False
        self._deadline: asyncio.TimerHandle | None = None
        self._used = loop.time()
        self._watch = loop.call_later(idle, self._is_idle)

    # ---- connection ----

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._connections.discard(self)
        self._watch.cancel()
        if self._deadline is not None:
            self._deadline.cancel()
        self._rest = b""
        for exchange in self._exchanges.values():
            exchange.left()
        self.resume_writing()
        self._left()

    def pause_writing(self) -> None:
        self.paused = True
        self.writable.clear()
        self._regulate()

    def resume_writing(self) -> None:
        self.paused = False
        self.writable.set()
        self._regulate()

    def _regulate(self) -> None:
        """Pause or resume reading."""
        stop = bool(self._rest) or self.paused or self._held > _HELD
        if stop != self._stopped and not self.transport.is_closing():
            self._stopped = stop
            (self.transport.pause_reading if stop else self.transport.resume_reading)()

    def _is_idle(self) -> None:
        left = self._used + self._idle - self.loop.time()
        if not self._exchanges and left <= 0:
            self.shutdown()
            return
        self._watch = self.loop.call_later(max(left, 1.0), self._is_idle)

    def retire(self) -> None:
        """Tell the client to send no more requests over this connection. Those under way are served."""
        if not self._retired:
            self._retired = True
            self.transport.write(wire.pack(CLOSE, 0))

    def shutdown(self) -> None:
        """Of uvicorn, when the server stops."""
        self.retire()
        if not self._exchanges:
            self.transport.close()

    def _refuse(self, message: str) -> None:
        """Close the connection, whose client does not keep to the protocol."""
        if self._closing:
            return
        log.info("a connection is closed: %s", message)
        self._closing = True
        self._rest = b""
        self.transport.write(wire.pack(CLOSE, 0, message.encode()[:1000]))
        for exchange in self._exchanges.values():
            exchange.left()
        self.transport.close()  # sends what is buffered
        self.loop.call_later(_LINGER, self.transport.abort)

    def _late(self) -> None:
        self._deadline = None
        self._refuse(f"no whole frame has come within {self._frame_within:g} s")

    # ---- frames ----

    def data_received(self, data: bytes) -> None:
        if self._rest:
            self._rest += data
            return
        if self._closing:
            return
        self._used = self.loop.time()
        try:
            if len(data) <= _PIECE:
                for frame in self._reader.feed(data):
                    self._take(*frame)
            else:
                self._parse(data)
        except wire.Malformed as error:
            self._refuse(str(error))
            return
        if self._reader.incomplete:
            if self._deadline is None:
                self._deadline = self.loop.call_later(self._frame_within, self._late)
        elif self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _parse(self, data: bytes) -> None:
        """Parse in portions. The rest is held when the time slice is over."""
        end = self._used + BUDGET
        at = 0
        while at < len(data) and not self._closing:
            if at and self.loop.time() > end:
                self._rest = data[at:]
                self._regulate()
                rounds().soon(self._go_on)
                return
            piece = data[at : at + max(_PIECE, self._reader.missing)]
            for frame in self._reader.feed(piece):
                self._take(*frame)
            at += len(piece)

    def _go_on(self) -> None:
        data, self._rest = self._rest, b""
        if data and not self._closing:
            self.data_received(data)
            self._regulate()

    def _take(self, kind: int, flags: int, value: int, number: int, payload: bytes) -> None:
        if self._closing:
            return
        if kind == wire.REQUEST:
            self._begin(number, flags, value, payload)
            return
        if not 0 < number <= self._last:
            raise wire.Malformed(f"there was no request {number}")
        exchange = self._exchanges.get(number)
        if kind == wire.CREDIT:
            count = wire.credit_of(payload)
            if exchange is not None:
                exchange.accept(count)
        elif exchange is None:
            return  # its response is complete
        elif kind == CANCEL:
            exchange.left()
        else:
            exchange.arrived(payload, bool(flags & END))
            self._held += len(payload)
            if self._held > _HELD:
                self._regulate()

    def _begin(self, number: int, flags: int, value: int, payload: bytes) -> None:
        if number <= self._last:
            raise wire.Malformed(f"request {number} follows request {self._last}")
        self._last = number
        method, target, key, more, body, window = wire.request_of(value, payload)
        whole = bool(flags & END)
        if not whole and len(body) > WINDOW:
            raise wire.Malformed("more of a body than was accepted")
        path, raw, query = self._targets.get(target) or self._parsed(target)
        headers = _merged(self._headers, more) if more else self._headers.copy()
        if (body or not whole) and not (more and any(name == b"content-type" for name, _ in more)):
            headers.append(_JSON)
        if key:
            if not _TEXT.fullmatch(key):
                raise wire.Malformed("a key has characters that no header has")
            headers.append((_KEY, key))
        if whole:
            headers.append((b"content-length", b"%d" % len(body)))
        common = self._common
        scope = {**common, "headers": headers, "method": method, "path": path, "raw_path": raw, "query_string": query,
                 "state": common["state"].copy()}  # fmt: skip
        exchange = Exchange(self, number, body, whole, window)
        exchange.headless = method == "HEAD"
        if len(self._exchanges) >= MOST_REQUESTS and self._is_full():
            exchange.fail(QuotaExceeded(f"this connection has {MOST_REQUESTS} requests without a response",
                                        hint="wait for responses, or open another connection"))  # fmt: skip
            return
        self._exchanges[number] = exchange
        self._held += len(body)
        task = self.loop.create_task(self._serve(scope, exchange))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _is_full(self) -> bool:
        """A handler may end a moment after its response."""
        waiting = sum(not exchange.complete for exchange in self._exchanges.values())
        return waiting >= MOST_REQUESTS or len(self._exchanges) >= 2 * MOST_REQUESTS

    def _parsed(self, target: bytes) -> tuple[str, bytes, bytes]:
        """(path, raw path, query). Malformed."""
        if len(target) > _TARGET_LIMIT or not _TARGET.fullmatch(target):
            raise wire.Malformed("the target of a request is no path of a URL")
        raw, _, query = target.partition(b"?")
        path = raw.decode("ascii")
        found = urllib.parse.unquote(path) if "%" in path else path, raw, query
        if len(target) <= 1024:
            if len(self._targets) >= _TARGETS:
                self._targets.clear()
            self._targets[target] = found
        return found

    def was_read(self, exchange: Exchange, count: int) -> None:
        """The application has read a part of a body, so the client may send as much more."""
        exchange.held -= count
        self._held -= count
        if not exchange.whole:
            self.transport.write(wire.credit(exchange.number, count))
        if self._stopped:
            self._regulate()

    async def _serve(self, scope: dict[str, Any], exchange: Exchange) -> None:
        try:
            await self._app(scope, exchange.receive, exchange.send)
            if not exchange.complete and not exchange.disconnected:
                log.error("%s %s ended without a response", scope["method"], scope["path"])
                exchange.fail(unexpected(RuntimeError("no response")))
        except BaseException as error:  # as uvicorn does for HTTP
            log.error("%s %s", scope["method"], scope["path"], exc_info=error)
            exchange.fail(unexpected(error if isinstance(error, Exception) else RuntimeError(type(error).__name__)))
        finally:
            self._ended(exchange)

    def _ended(self, exchange: Exchange) -> None:
        exchange.complete = True
        self._exchanges.pop(exchange.number, None)
        self._held -= exchange.held
        exchange.held = 0
        if self._stopped:
            self._regulate()
        self._used = self.loop.time()
        if self._retired and not self._exchanges:
            self.transport.close()


def _merged(common: wire.Headers, more: wire.Headers) -> wire.Headers:
    """The headers of a request, which replace those of the connection. Malformed."""
    for name, value in more:
        if not _HEADER.fullmatch(name) or not _TEXT.fullmatch(value) or name in _OF_MESSAGE:
            raise wire.Malformed(f"a frame cannot have the header {name[:40]!r}")
    names = {name for name, _ in more}
    return [*(header for header in common if header[0] not in names), *more]
