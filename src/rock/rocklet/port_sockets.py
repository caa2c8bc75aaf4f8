"""WebSockets and plain connections to ports inside, over a WebSocket of the client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.typing import Subprotocol
from websockets.uri import WebSocketURI

from rock.errors import PortFailed, PortTimeout
from rock.rocklet.dialled import CHUNK, dial, given_away, port_of, streams
from rock.rocklet.node import Node
from rock.rocklet.port_headers import Target, target_of
from rock.rocklet.port_headers import inward as inward_headers
from rock.rocklet.port_headers import outward as outward_headers
from rock.rocklet.supervisor import Supervisor
from rock.wire.asgi import Receive, Request, Send, SocketHandler
from rock.wire.sockets import CLOSE_WITHIN, HANDSHAKE_WITHIN, connection_to, inward, outward, plain_headers, race


def web_socket(node: Node) -> SocketHandler:
    async def handle(request: Request, receive: Receive, send: Send) -> None:
        sandbox = node.get(request.path["sandbox_id"])
        target = target_of(request)
        await receive()  # websocket.connect
        with sandbox.active():
            try:
                async with _joined(sandbox, target, request) as program:
                    cookies = _cookies(program, target)
                    await send({"type": "websocket.accept", "subprotocol": program.subprotocol, "headers": cookies})
                    await race(inward(program, receive), outward(program, send, "the program inside"))
            except InvalidStatus as refusal:
                await _refuse(refusal, target, send)

    return handle


# ---- a WebSocket inside ----


@contextlib.asynccontextmanager
async def _joined(sandbox: Supervisor, target: Target, request: Request) -> AsyncIterator[ClientConnection]:
    """The WebSocket of the program. InvalidStatus when it refuses; PortFailed, PortTimeout."""
    path, _, query = target.path.decode("latin-1").partition("?")
    offered = [Subprotocol(name) for name in request.scope.get("subprotocols") or ()]
    address = WebSocketURI(False, "localhost", target.port, path, query)
    headers = plain_headers(inward_headers(request, target))
    sock = await dial(sandbox, target.port)
    with given_away(sock, sandbox, target.port):
        _, program = await asyncio.get_running_loop().create_connection(
            lambda: connection_to(address, offered), sock=sock
        )
    with sandbox.connections.holding(program.transport):
        try:
            async with asyncio.timeout(HANDSHAKE_WITHIN):
                await program.handshake(headers, None)
        except TimeoutError:
            raise PortTimeout(f"port {target.port} did not answer within {HANDSHAKE_WITHIN:g} s") from None
        except InvalidStatus:
            raise
        except (WebSocketException, OSError, EOFError, ValueError) as error:
            raise PortFailed(f"port {target.port} opened no WebSocket: {error}", sandbox_id=sandbox.id) from None
        yield program


def _cookies(program: ClientConnection, target: Target) -> list[tuple[bytes, bytes]]:
    assert program.response is not None
    told = [(name.lower().encode(), value.encode("latin-1", "replace"))
            for name, value in program.response.headers.raw_items() if name.lower() == "set-cookie"]  # fmt: skip
    return [header for header in outward_headers(200, told, target) if header[0] == b"set-cookie"]


async def _refuse(refusal: InvalidStatus, target: Target, send: Send) -> None:
    """The program answered the handshake with something else: the client gets that."""
    said = refusal.response
    told = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in said.headers.raw_items()]
    body = bytes(said.body or b"")
    headers = [(n, v) for n, v in outward_headers(said.status_code, told, target) if n != b"content-length"]
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "websocket.http.response.start", "status": said.status_code, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})


# ---- a plain connection ----


def tunnel(node: Node) -> SocketHandler:
    async def handle(request: Request, receive: Receive, send: Send) -> None:
        sandbox = node.get(request.path["sandbox_id"])
        port = port_of(request.path["port"])
        await receive()  # websocket.connect
        with sandbox.active():
            async with streams(sandbox, port) as (reader, writer):
                await send({"type": "websocket.accept"})
                await _Tunnel(reader, writer, receive, send).run()

    return handle


class _Tunnel:
    """Bytes both ways. Each direction ends by itself, with an empty message."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, receive: Receive, send: Send
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._receive = receive
        self._send = send
        self._quiet = asyncio.Event()  # the client has said all

    async def run(self) -> None:
        self._gone = asyncio.create_task(self._closed())
        try:
            await race(self._inward(), self._outward())
        finally:
            self._writer.transport.abort()
            await self._gone

    async def _closed(self) -> None:
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _inward(self) -> bool:
        while True:
            message = await self._receive()
            if message["type"] == "websocket.disconnect":
                return True
            data = message.get("bytes")
            if data is None or (data and self._quiet.is_set()):
                await self._send({"type": "websocket.close", "code": 1003, "reason": "not bytes, or after their end"})
                return True
            try:
                if data:
                    self._writer.write(data)
                    await self._writer.drain()
                elif not self._quiet.is_set():
                    self._quiet.set()
                    self._writer.write_eof()
            except OSError:
                self._writer.transport.abort()
                return False

    async def _outward(self) -> None:
        whole = await self._copy()
        if whole:
            await self._send({"type": "websocket.send", "bytes": b""})
            await self._both_ended()
            whole = not self._writer.transport.is_closing()
        if not whole:
            await self._send({"type": "websocket.close", "code": 1011, "reason": "the connection inside broke"})
            return
        self._writer.close()  # once all is sent
        await asyncio.wait({self._gone}, timeout=CLOSE_WITHIN)
        await self._send({"type": "websocket.close", "code": 1000})

    async def _copy(self) -> bool:
        """All that the program says; False when the connection broke before its end."""
        while True:
            try:
                data = await self._reader.read(CHUNK)
            except OSError:
                return False
            if not data:
                return not self._writer.transport.is_closing()
            await self._send({"type": "websocket.send", "bytes": data})

    async def _both_ended(self) -> None:
        """Until the client has said all too, or the connection is gone."""
        quiet = asyncio.create_task(self._quiet.wait())
        try:
            await asyncio.wait({quiet, self._gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            quiet.cancel()
