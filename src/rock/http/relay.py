"""Requests that another server relays to this one: the end of their connection is not the end of their client.

    client ──► server ──► this one        x-rock-call: ID on each relayed request
    the client disconnects:  DELETE /node/v1/calls/ID, then the connection closes
    the server dies:         the connection closes, and no cancellation is sent

A handler sees a disconnect (`http.disconnect`) at once in the first case, and in the second only after the reconnect
period, unless the request is repeated with its idempotency key: then the new request replaces the old one. A request
without the header comes from a client directly, so the state of its connection is that of the client. The module also
relays WebSockets between a client and another server.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any

from websockets.asyncio.client import ClientConnection
from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.frames import EXTERNAL_CLOSE_CODES
from websockets.typing import Subprotocol
from websockets.uri import WebSocketURI

from rock.errors import InvalidConfig
from rock.http.asgi import Answer, App, Receive, Scope, Send, failure
from rock.protocol.keys import caller_of
from rock.protocol.routes import CALL, IDEMPOTENCY_KEY, ROUTES

_CALL = CALL.encode()
_KEY = IDEMPOTENCY_KEY.encode()
_PREFIX = ROUTES["cancel_call"].path.partition("{")[0]
_EARLY = 1000  # cancellations that are stored because their request was not read yet
_LONGEST = 100  # maximum length of an id in characters

Place = tuple[str, bytes]


class RelayedCalls:
    """Wraps `app` for relayed requests. reconnect: seconds for which a request continues after its connection broke."""

    def __init__(self, app: App, reconnect: float) -> None:
        self._app = app
        self._reconnect = reconnect
        self._left: dict[bytes, asyncio.Event] = {}  # set when the client of a call has disconnected
        self._places: dict[Place, bytes] = {}  # the last call of an idempotency key
        self._early: OrderedDict[bytes, None] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "DELETE" and scope["path"].startswith(_PREFIX):
            await self._cancel(scope["path"][len(_PREFIX) :].encode("utf-8", "replace"), scope, send)
            return
        call = key = None
        for name, value in scope["headers"]:
            if name == _CALL:
                call = value
            elif name == _KEY:
                key = value
        if not call or len(call) > _LONGEST or call in self._left:
            await self._app(scope, receive, send)
            return
        left = self._left[call] = asyncio.Event()
        if call in self._early:
            del self._early[call]
            left.set()
        place = None if key is None else (scope["path"], key)
        if place is not None:
            before = self._left.get(self._places.get(place, b""))
            if before is not None:
                before.set()
            self._places[place] = call
        try:
            await self._app(scope, self._held(receive, left), send)
        finally:
            del self._left[call]
            if place is not None and self._places.get(place) == call:
                del self._places[place]

    def _held(self, receive: Receive, left: asyncio.Event) -> Receive:
        """A `receive` that reports a broken connection only after a cancellation or the end of the reconnect period."""
        whole = False

        async def held() -> MutableMapping[str, Any]:
            nonlocal whole
            message = await receive()
            if message["type"] == "http.request":
                whole = not message.get("more_body", False)
            elif whole:  # an incomplete request cannot be executed
                try:
                    async with asyncio.timeout(self._reconnect):
                        await left.wait()
                except TimeoutError:
                    pass
            return message

        return held

    async def _cancel(self, call: bytes, scope: Scope, send: Send) -> None:
        """The client of a call has disconnected. Only this server and the server that made the id know it."""
        caller_of(scope)
        if not call or len(call) > _LONGEST:
            await failure(InvalidConfig("the id of the call to cancel is missing or too long",
                                        hint=f"pass the id that was sent with the call, 1 to {_LONGEST} "
                                             "bytes")).send(send)
            return
        left = self._left.get(call)
        if left is not None:
            left.set()
        else:  # it has ended, or it arrives later over another connection
            self._early[call] = None
            while len(self._early) > _EARLY:
                self._early.popitem(last=False)
        await Answer(b"{}").send(send)


class Ids:
    """Ids of the calls that one server relays; they cannot be guessed."""

    def __init__(self) -> None:
        self._prefix = os.urandom(16).hex()
        self._count = 0

    def next(self) -> bytes:
        self._count += 1
        return f"{self._prefix}{self._count:x}".encode()


# ---- WebSockets ----
#
# A relayed WebSocket forwards messages between the client and another server in both directions.

CLOSE_WITHIN = 5.0
HANDSHAKE_WITHIN = 30.0  # seconds
MESSAGE_LIMIT = 16 << 20
HANDSHAKE = b"sec-websocket-"
_FRAMING = (b"content-length", b"transfer-encoding", b"connection")


def connection_to(address: WebSocketURI, offered: list[Subprotocol]) -> ClientConnection:
    """A connection that waits for its socket. Pings are disabled, because both ends detect a closed connection."""
    protocol = ClientProtocol(address, subprotocols=offered or None, max_size=MESSAGE_LIMIT)
    return ClientConnection(protocol, ping_interval=None, close_timeout=CLOSE_WITHIN, max_queue=2)


def plain_headers(headers: list[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    """The headers of a handshake, without those of the WebSocket protocol."""
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers
            if not name.startswith(HANDSHAKE) and name != b"content-length"]  # fmt: skip


async def joined(
    host: str, port: int, tls: ssl.SSLContext | None, scope: Scope, headers: list[tuple[bytes, bytes]],
    receive: Receive, send: Send, dial: Callable[[], Awaitable[socket.socket]] | None = None,
) -> None:
    """Relay a client's WebSocket to a server. OSError, TimeoutError, EOFError before the client got a response. dial:
    opens the connection to the server; Unavailable."""
    await receive()  # websocket.connect
    path = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")
    query = scope.get("query_string", b"").decode("latin-1")
    address = WebSocketURI(tls is not None, host, port, path, query)
    offered = [Subprotocol(name) for name in scope.get("subprotocols") or ()]
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(HANDSHAKE_WITHIN):
        if dial is None:
            _, there = await loop.create_connection(lambda: connection_to(address, offered), host, port, ssl=tls)
        else:
            _, there = await loop.create_connection(lambda: connection_to(address, offered), sock=await dial())
        try:
            await there.handshake(plain_headers(headers), None)
        except InvalidStatus as refusal:
            there.transport.abort()
            await _refuse(refusal, send)
            return
        except BaseException as error:
            there.transport.abort()
            if isinstance(error, WebSocketException | ValueError):
                raise ConnectionError(f"it opens no WebSocket: {error}") from None
            raise
    try:
        assert there.response is not None
        headers = [(name.lower().encode(), value.encode("latin-1", "replace"))
                   for name, value in there.response.headers.raw_items()
                   if not name.lower().startswith("sec-websocket-")
                   and name.lower() not in ("upgrade", "connection", "date", "server")]  # fmt: skip
        await send({"type": "websocket.accept", "subprotocol": there.subprotocol, "headers": headers})
        await race(inward(there, receive), outward(there, send, "the worker"))
    finally:
        there.transport.abort()


async def _refuse(refusal: InvalidStatus, send: Send) -> None:
    """Forward the server's response to a rejected handshake to the client."""
    said = refusal.response
    received = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in said.headers.raw_items()]
    body = bytes(said.body or b"")
    headers = [(name, value) for name, value in received if name not in _FRAMING]
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "websocket.http.response.start", "status": said.status_code, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})


async def race(inward: Coroutine[Any, Any, bool], outward: Coroutine[Any, Any, None]) -> None:
    """Run both directions, until the client disconnects or the other side ends."""
    tasks = [asyncio.create_task(inward), asyncio.create_task(outward)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done() and tasks[0].exception() is None and not tasks[0].result():
            await asyncio.wait(tasks)  # the other side ended: its last messages are forwarded first
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        # A client that disconnected raises OSError from `send`; there is no recipient for the error.
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, OSError):
            raise error


async def inward(there: ClientConnection, receive: Receive) -> bool:
    """True when the client disconnected, False when the other side ended."""
    try:
        while True:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                code = message.get("code") or 1005
                known = code in EXTERNAL_CLOSE_CODES or 3000 <= code < 5000
                await there.close(code if known else 1000 if code == 1005 else 1001, message.get("reason") or "")
                return True
            data = message.get("bytes")
            await there.send(data if data is not None else message["text"])
    except ConnectionClosed:
        return False


async def outward(there: ClientConnection, send: Send, who: str) -> None:
    with contextlib.suppress(ConnectionClosed):
        async for message in there:
            kind = "text" if isinstance(message, str) else "bytes"
            await send({"type": "websocket.send", kind: message})
    code, reason = there.close_code, there.close_reason or ""
    if code in (None, 1006):
        code, reason = 1011, f"{who} broke the connection"
    await send({"type": "websocket.close", "code": 1000 if code == 1005 else code, "reason": reason})
