"""A worker elsewhere as an ASGI application: requests and answers are streamed both ways over HTTP/1.1.

A connection a request: what keeps one open between requests may come when the wire between machines is measured.
WebSockets are not carried yet, and refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import quote, urlsplit

import h11

from rock.errors import InvalidConfig, RockError, Unavailable, Unsupported
from rock.protocol.routes import OTHER_KEY
from rock.wire.asgi import Receive, Scope, Send, deny, failure

_CONNECT = 10.0  # seconds
_PIECE = 1 << 16
_HOP_BY_HOP = {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
               b"expect"}  # fmt: skip


class Remote:
    """Requests to a worker at `url`, which asks for `key`."""

    def __init__(self, url: str, key: str | None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidConfig(f"{url!r} is no address of a worker", hint="http://HOST:PORT")
        self._name = f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
        self._host, self._port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await deny(scope, send, Unsupported("WebSockets of sandboxes on other machines are not carried yet"))
            return
        begun = False

        async def track(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            async with asyncio.timeout(_CONNECT):
                reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        except (OSError, TimeoutError) as error:
            await failure(Unavailable(f"worker {self._name} does not answer: {error}", hint="retry")).send(send)
            return
        exchange = _Exchange(reader, writer, track)
        try:
            await exchange.run(self._head(scope), receive)
        except (OSError, h11.RemoteProtocolError) as error:
            if begun:
                raise
            told: RockError = Unavailable(f"the connection to worker {self._name} broke: {error}", hint="retry")
            await failure(told).send(send)
        finally:
            writer.close()
            with contextlib.suppress(OSError, ssl.SSLError):
                await writer.wait_closed()

    def _head(self, scope: Scope) -> h11.Request:
        raw: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
        query: bytes = scope.get("query_string", b"")
        headers = [(name, value) for name, value in scope["headers"] if name not in _HOP_BY_HOP]
        if not any(name == b"host" for name, _ in headers):
            headers.append((b"host", self._name.encode()))
        if self._key is not None:  # not as Authorization: that may be for a program inside
            headers.append((OTHER_KEY.encode(), self._key.encode()))
        if not any(name == b"content-length" for name, _ in headers) and scope["method"] not in ("GET", "HEAD"):
            headers.append((b"transfer-encoding", b"chunked"))
        headers.append((b"connection", b"close"))
        return h11.Request(method=scope["method"], target=raw + (b"?" + query if query else b""), headers=headers)


class _Exchange:
    """One request and its answer. The body goes in while the answer comes out."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, send: Send) -> None:
        self._reader, self._writer, self._send = reader, writer, send
        self._state = h11.Connection(h11.CLIENT, max_incomplete_event_size=256 << 10)

    async def run(self, head: h11.Request, receive: Receive) -> None:
        self._write(head)
        going = asyncio.create_task(self._body(receive), name="body to a worker")
        coming = asyncio.create_task(self._answer(), name="answer of a worker")
        try:
            await asyncio.wait({going, coming}, return_when=asyncio.FIRST_COMPLETED)
            if going.done() and not coming.done():
                going.result()
                gone = asyncio.create_task(self._left(receive))
                try:
                    await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    gone.cancel()
                    await asyncio.gather(gone, return_exceptions=True)
            if coming.done():
                coming.result()
        finally:
            for task in (going, coming):
                task.cancel()
            await asyncio.gather(going, coming, return_exceptions=True)

    def _write(self, event: h11.Request | h11.Data | h11.EndOfMessage) -> None:
        data = self._state.send(event)
        if data:
            self._writer.write(data)

    async def _body(self, receive: Receive) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError("the client left")
            if message.get("body"):
                try:
                    self._write(h11.Data(data=message["body"]))
                except h11.LocalProtocolError as error:
                    raise ConnectionError(f"the body is not as long as was said: {error}") from None
                await self._writer.drain()
            if not message.get("more_body", False):
                self._write(h11.EndOfMessage())
                await self._writer.drain()
                return

    @staticmethod
    async def _left(receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def _answer(self) -> None:
        while True:
            event = self._state.next_event()
            if event is h11.NEED_DATA:
                self._state.receive_data(await self._reader.read(_PIECE))
            elif isinstance(event, h11.Response):
                headers = [(name, value) for name, value in event.headers if name not in _HOP_BY_HOP]
                await self._send({"type": "http.response.start", "status": event.status_code, "headers": headers})
            elif isinstance(event, h11.Data):
                await self._send({"type": "http.response.body", "body": bytes(event.data), "more_body": True})
            elif isinstance(event, h11.EndOfMessage):
                await self._send({"type": "http.response.body", "body": b""})
                return
            elif isinstance(event, h11.ConnectionClosed):
                raise ConnectionError("the worker closed the connection")
