"""WebSockets that are handed on: what a client says to us goes to another server, and the other way round."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Coroutine
from typing import Any

from websockets.asyncio.client import ClientConnection
from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.frames import EXTERNAL_CLOSE_CODES
from websockets.typing import Subprotocol
from websockets.uri import WebSocketURI

from rock.wire.asgi import Receive, Scope, Send

CLOSE_WITHIN = 5.0
HANDSHAKE_WITHIN = 30.0  # seconds
MESSAGE_LIMIT = 16 << 20
HANDSHAKE = b"sec-websocket-"
_FRAMING = (b"content-length", b"transfer-encoding", b"connection")


def connection_to(address: WebSocketURI, offered: list[Subprotocol]) -> ClientConnection:
    """A connection that waits for its socket; nobody is pinged, as both ends see when the other one goes."""
    protocol = ClientProtocol(address, subprotocols=offered or None, max_size=MESSAGE_LIMIT)
    return ClientConnection(protocol, ping_interval=None, close_timeout=CLOSE_WITHIN, max_queue=2)


def plain_headers(headers: list[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    """Those of a handshake that are not the handshake's own."""
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers
            if not name.startswith(HANDSHAKE) and name != b"content-length"]  # fmt: skip


async def joined(
    host: str, port: int, tls: ssl.SSLContext | None, scope: Scope, headers: list[tuple[bytes, bytes]],
    receive: Receive, send: Send,
) -> None:
    """Hand a client's WebSocket on to a server. OSError, TimeoutError, EOFError before the client was answered."""
    await receive()  # websocket.connect
    path = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")
    query = scope.get("query_string", b"").decode("latin-1")
    address = WebSocketURI(tls is not None, host, port, path, query)
    offered = [Subprotocol(name) for name in scope.get("subprotocols") or ()]
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(HANDSHAKE_WITHIN):
        _, there = await loop.create_connection(lambda: connection_to(address, offered), host, port, ssl=tls)
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
        told = [(name.lower().encode(), value.encode("latin-1", "replace"))
                for name, value in there.response.headers.raw_items()
                if not name.lower().startswith("sec-websocket-")
                and name.lower() not in ("upgrade", "connection", "date", "server")]  # fmt: skip
        await send({"type": "websocket.accept", "subprotocol": there.subprotocol, "headers": told})
        await race(inward(there, receive), outward(there, send, "the worker"))
    finally:
        there.transport.abort()


async def _refuse(refusal: InvalidStatus, send: Send) -> None:
    """The server answered the handshake with something else: the client gets that."""
    said = refusal.response
    told = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in said.headers.raw_items()]
    body = bytes(said.body or b"")
    headers = [(name, value) for name, value in told if name not in _FRAMING]
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "websocket.http.response.start", "status": said.status_code, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})


async def race(inward: Coroutine[Any, Any, bool], outward: Coroutine[Any, Any, None]) -> None:
    """Both directions, until the client left or the other side is through."""
    tasks = [asyncio.create_task(inward), asyncio.create_task(outward)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done() and tasks[0].exception() is None and not tasks[0].result():
            await asyncio.wait(tasks)  # it is the other side that ended: what it said last comes first
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        # A client that left raises OSError from `send`: nobody is there to be told.
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, OSError):
            raise error


async def inward(there: ClientConnection, receive: Receive) -> bool:
    """True when the client left, False when the other side did."""
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
