"""HTTP, WebSocket and TCP to a port inside. The program there is not trusted: its output is bounded and checked."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes, urlsplit

import h11
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.typing import Subprotocol
from websockets.uri import WebSocketURI

from rock.errors import InvalidConfig, PortFailed, PortTimeout, no_such_route
from rock.http.asgi import (
    Answer,
    Disconnected,
    Receive,
    Request,
    Router,
    Send,
    SocketHandler,
    answer_model,
    of_connection,
)
from rock.http.event_loop import BUDGET, rounds
from rock.http.relay import CLOSE_WITHIN, HANDSHAKE_WITHIN, connection_to, inward, outward, plain_headers, race
from rock.protocol.routes import ANSWER_WITHIN, ERROR_CODE, HANDED_ON, OTHER_KEY, ROUTES
from rock.protocol.runs import GatewayPort, GatewayPortInfo
from rock.rocklet.node import Node
from rock.rocklet.port_connections import CHUNK, port_of
from rock.rocklet.sandbox import Supervisor

# ---- headers ----
#
# The headers of requests to a port and of its responses. Pure.

Headers = list[tuple[bytes, bytes]]

PREFIX = "rock.prefix"  # in a scope: the external path prefix of the port, where it differs from ours
MOST_HEADERS = 256
_HOP_BY_HOP = {
    b"connection", b"expect", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection",
    b"te", b"trailer", b"transfer-encoding", b"upgrade",
}  # fmt: skip
_OURS = {name.encode() for name in (ANSWER_WITHIN, OTHER_KEY, ERROR_CODE, HANDED_ON)}
_REPLACED = {b"host", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-prefix", b"x-forwarded-proto"}
# These headers would apply to the whole server, which does not belong to the program.
_FOR_ALL = {b"alt-svc", b"clear-site-data", b"service-worker-allowed", b"strict-transport-security"}
# A browser must not treat a page from a sandbox as a page of this server, because such a page could use its API.
_CONFINED = (b"content-security-policy", b"sandbox allow-downloads allow-forms allow-modals allow-popups allow-scripts")
_CONTROL = bytes([*range(9), *range(10, 32), 127])
_HERE = {"localhost", "127.0.0.1", "::1", "0.0.0.0"}


@dataclass(frozen=True)
class Target:
    """The port and path of a request. path: with the query, as received. prefix: the path of the port from outside."""

    port: int
    path: bytes
    prefix: str
    outside: str

    @property
    def host(self) -> str:
        """The host name as a client on the same machine would send it: development servers reject other names."""
        return f"localhost:{self.port}"


def target_of(request: Request) -> Target:
    """The target of a request. InvalidConfig, NotFound."""
    port = port_of(request.path["port"])
    raw: bytes = request.scope.get("raw_path") or request.scope["path"].encode()
    parts = raw.split(b"/", 6)  # "", v1, sandboxes, ID, ports, PORT, the rest
    known = ["v1", "sandboxes", request.path["sandbox_id"], "ports", request.path["port"]]
    if [unquote_to_bytes(part) for part in parts[1:6]] != [part.encode() for part in known]:
        raise no_such_route(request.scope["path"])  # one of its slashes was encoded as %2F
    rest = b"/" + (parts[6] if len(parts) > 6 else b"")
    query: bytes = request.scope.get("query_string", b"")
    own = request.scope.get(PREFIX) or f"/v1/sandboxes/{request.path['sandbox_id']}/ports/{port}"
    outer = (request.header(b"x-forwarded-prefix") or "").rstrip("/")
    outside = request.header(b"x-forwarded-host") or request.header(b"host") or ""
    return Target(port, rest + (b"?" + query if query else b""), outer + own, outside)


def _kept(headers: Headers, *more: set[bytes]) -> Headers:
    """The headers that are not hop-by-hop."""
    drop = of_connection(headers).union(_HOP_BY_HOP, *more)
    return [(name, value) for name, value in headers if name.lower() not in drop]


def inward_headers(request: Request, target: Target) -> Headers:
    """Headers for the program inside, without Host and framing."""
    client = (request.scope.get("client") or ("",))[0]
    chain = [part.strip() for part in (request.header(b"x-forwarded-for") or "").split(",")]
    if client not in chain:  # a server that trusts its proxy has already taken the client's address from this header
        chain.append(client)
    scheme = {"ws": "http", "wss": "https"}.get(request.scope["scheme"], request.scope["scheme"])
    told = {
        "x-forwarded-for": ", ".join(part for part in chain if part),
        "x-forwarded-host": target.outside,
        "x-forwarded-prefix": target.prefix,
        "x-forwarded-proto": request.header(b"x-forwarded-proto") or scheme,
    }
    kept = _kept(request.headers, _REPLACED, _OURS)
    return [*kept, *((name.encode(), value.encode("latin-1")) for name, value in told.items() if value)]


def outward_headers(status: int, headers: Headers, target: Target) -> Headers:
    """Headers for the client. PortFailed when the program's headers cannot be forwarded."""
    if not 200 <= status < 600:
        raise PortFailed(f"port {target.port} answered with the status {status}")
    if len(headers) > MOST_HEADERS:
        raise PortFailed(f"port {target.port} answered with {len(headers)} headers; {MOST_HEADERS} are let through")
    drop = set(_FOR_ALL | _OURS)
    if status in (204, 304) or any(name == b"transfer-encoding" for name, _ in headers):
        drop.add(b"content-length")
    passed = []
    for name, value in _kept(headers, drop):
        if value.translate(None, _CONTROL) != value:
            raise PortFailed(f"port {target.port} answered with control characters in {name.decode('latin-1')!r}")
        passed.append((name, relocated(value, target) if name == b"location" else value))
    return [*passed, _CONFINED]


def relocated(location: bytes, target: Target) -> bytes:
    """A redirection as seen by the client: a redirection to the same port stays on it."""
    text = location.decode("latin-1")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return location
    if host is None:
        if parts.scheme or not text.startswith("/"):
            return location  # relative to the page, or not an HTTP address
    elif parts.netloc != target.outside and (host not in _HERE or port != target.port):
        return location
    path = text[len(text) - len(text.split("//", 1)[1]) + len(parts.netloc) :] if host is not None else text
    if path == target.prefix or path.startswith(target.prefix + "/"):
        return path.encode("latin-1")  # the program supports X-Forwarded-Prefix
    return f"{target.prefix}{path if path.startswith('/') else '/' + path}".encode("latin-1")


# ---- WebSockets and tunnels ----
#
# Both run over a WebSocket of the client: a WebSocket of the program, or a plain TCP connection to it.

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
    """Connect to the WebSocket of the program. InvalidStatus when it rejects the handshake; PortFailed, PortTimeout."""
    path, _, query = target.path.decode("latin-1").partition("?")
    offered = [Subprotocol(name) for name in request.scope.get("subprotocols") or ()]
    address = WebSocketURI(False, "localhost", target.port, path, query)
    headers = plain_headers(inward_headers(request, target))
    sock = await sandbox.connections.dial(target.port)
    with sandbox.connections.given_away(sock, target.port):
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
    """Forward the program's response to a rejected handshake to the client."""
    said = refusal.response
    told = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in said.headers.raw_items()]
    body = bytes(said.body or b"")
    headers = [(n, v) for n, v in outward_headers(said.status_code, told, target) if n != b"content-length"]
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "websocket.http.response.start", "status": said.status_code, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})


# ---- a TCP connection inside ----


def tunnel(node: Node) -> SocketHandler:
    async def handle(request: Request, receive: Receive, send: Send) -> None:
        sandbox = node.get(request.path["sandbox_id"])
        port = port_of(request.path["port"])
        await receive()  # websocket.connect
        with sandbox.active():
            async with sandbox.connections.streams(port) as (reader, writer):
                await send({"type": "websocket.accept"})
                await _Tunnel(reader, writer, receive, send).run()

    return handle


class _Tunnel:
    """Bytes in both directions. Each direction ends separately, with an empty message."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, receive: Receive, send: Send
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._receive = receive
        self._send = send
        self._quiet = asyncio.Event()  # set when the client has ended its direction

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
        self._writer.close()  # after all data is sent
        await asyncio.wait({self._gone}, timeout=CLOSE_WITHIN)
        await self._send({"type": "websocket.close", "code": 1000})

    async def _copy(self) -> bool:
        """Copy the program's output; False when the connection broke before its end."""
        while True:
            try:
                data = await self._reader.read(CHUNK)
            except OSError:
                return False
            if not data:
                return not self._writer.transport.is_closing()
            await self._send({"type": "websocket.send", "bytes": data})

    async def _both_ended(self) -> None:
        """Wait until the client has ended its direction too, or the connection is closed."""
        quiet = asyncio.create_task(self._quiet.wait())
        try:
            await asyncio.wait({quiet, self._gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            quiet.cancel()


# ---- HTTP ----


log = logging.getLogger("rock.ports")

HEAD_LIMIT = 64 << 10  # bytes, of all heads before the body of the response
INFORMATIONAL = 32  # responses 1xx before the final response
_LINES = 1024
_PIECE = 4 << 10  # bytes of heads that are parsed at once
_Event = h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]


def patience_of(request: Request) -> float:
    """Seconds until the program has to send the head of its response."""
    text = request.header(ANSWER_WITHIN.encode())
    try:
        value = float(text) if text else 120.0
    except ValueError:
        value = -1.0
    if not 0 < value <= 3600:
        raise InvalidConfig(f"the header {ANSWER_WITHIN} has the invalid value {text!r}",
                            hint="send a number of seconds above 0 and at most 3600")
    return value


class Relay(Answer):
    """The response of a port; the request runs when the response is sent."""

    def __init__(self, sandbox: Supervisor, request: Request) -> None:
        super().__init__()
        self._sandbox = sandbox
        self._request = request

    async def send(self, send: Send) -> None:
        target, patience = target_of(self._request), patience_of(self._request)
        with self._sandbox.active():
            async with self._sandbox.connections.streams(target.port) as (reader, writer):
                await _Exchange(self._request, target, reader, writer, patience).run(send)


class _Exchange:
    """One request over a connection of its own. Either side may end before the other."""

    def __init__(
        self,
        request: Request,
        target: Target,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        patience: float,
    ) -> None:
        self._request = request
        self._target = target
        self._reader = reader
        self._writer = writer
        self._patience = patience
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_LIMIT)
        self._in_head = True  # the head of the final response is incomplete
        self._bytes = self._lines = 0  # of heads
        self._limit: asyncio.Timeout | None = None  # set while the head of the response is awaited
        self._left = False
        self._heard = False
        self._unparsed = b""
        self._since = 0.0  # start time of the current parsing, for which other tasks wait

    async def run(self, send: Send) -> None:
        head = self._first()
        client = asyncio.create_task(self._serve_client(head))
        try:
            answer = await self._head()
            headers = outward_headers(answer.status_code, list(answer.headers), self._target)
            await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
            await self._body(send)
        finally:
            client.cancel()
            await asyncio.gather(client, return_exceptions=True)

    # ---- request ----

    def _first(self) -> bytes:
        """The head of the request. InvalidConfig when HTTP/1.1 cannot represent it."""
        headers = inward_headers(self._request, self._target)
        coding = (self._request.header(b"transfer-encoding") or "").strip().lower()
        if coding:
            if coding != "chunked":
                raise InvalidConfig(f"a body with the transfer coding {coding[:40]!r} is not supported",
                                    hint="send it with content-length, or with transfer-encoding: chunked")
            headers = [(name, value) for name, value in headers if name != b"content-length"]
            headers.append((b"transfer-encoding", b"chunked"))
        headers = [(b"host", self._target.host.encode()), *headers, (b"connection", b"close")]
        try:
            head = self._http.send(
                h11.Request(method=self._request.scope["method"], target=self._target.path, headers=headers)
            )
        except h11.LocalProtocolError as error:
            raise InvalidConfig(f"the request cannot be sent to the port as HTTP/1.1: {error}",
                                hint="correct its method, its path and its headers") from None
        return head or b""

    async def _serve_client(self, head: bytes) -> None:
        """Forward the body, then watch whether the client stays connected."""
        try:
            try:
                await self._put(head)
                async for part in self._request.chunks():
                    await self._put(self._http.send(h11.Data(data=part)))
                await self._put(self._http.send(h11.EndOfMessage()))
                self._expect(self._patience)
            except (OSError, h11.LocalProtocolError):
                # The program stopped reading, and may have sent a response before. The client has to receive that
                # response.
                self._expect(self._patience)
                async for _ in self._request.chunks():
                    pass
            await self._request.disconnected()
        except Disconnected:
            pass
        self._left = True
        self._writer.transport.abort()

    async def _put(self, data: bytes | None) -> None:
        if data:
            self._expect(self._patience)
            self._writer.write(data)
            async with asyncio.timeout(self._patience):
                await self._writer.drain()
        self._expect(None)  # the client has to send next

    def _expect(self, seconds: float | None) -> None:
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(None if seconds is None else asyncio.get_running_loop().time() + seconds)

    # ---- response ----

    async def _head(self) -> h11.Response:
        try:
            async with asyncio.timeout(self._patience) as self._limit:
                for _ in range(INFORMATIONAL + 1):
                    event = await self._event()
                    if isinstance(event, h11.Response):
                        self._in_head = False
                        return event
                raise PortFailed(f"port {self._target.port} sent more than {INFORMATIONAL} informational answers (1xx)",
                                 hint="the program there has to answer the request")  # fmt: skip
        except TimeoutError:
            raise PortTimeout(
                f"port {self._target.port} did not answer within {self._patience:g} s",
                hint=f"give it longer with the header {ANSWER_WITHIN}",
            ) from None
        finally:
            self._limit = None

    async def _body(self, send: Send) -> None:
        try:
            while not isinstance(event := await self._event(), h11.EndOfMessage):
                if isinstance(event, h11.Data) and event.data:
                    await send({"type": "http.response.body", "body": bytes(event.data), "more_body": True})
        except (PortFailed, Disconnected) as error:
            # The head was sent already. An incomplete response is the only remaining error signal, and makes the server
            # close the connection.
            log.debug("port %d: an answer broke off: %s", self._target.port, error)
            return
        await send({"type": "http.response.body", "body": b""})

    async def _event(self) -> _Event:
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                what = f"sent invalid HTTP: {error}" if self._heard else "closed the connection without a response"
                raise PortFailed(f"the program at port {self._target.port} {what}") from None
            if event is not h11.NEED_DATA:
                await self._yield()
                return event
            data, self._unparsed = self._unparsed or await self._more(), b""
            if self._in_head:
                data, self._unparsed = data[:_PIECE], data[_PIECE:]
                self._refuse_endless(data)
            self._http.receive_data(data)

    def _refuse_endless(self, data: bytes) -> None:
        """Check the limits before one more piece of heads is parsed. PortFailed."""
        if self._bytes > HEAD_LIMIT or self._lines > _LINES:
            raise PortFailed(f"the program at port {self._target.port} sent invalid HTTP: more than {HEAD_LIMIT} bytes "
                             f"or {_LINES} lines of headers")  # fmt: skip
        self._bytes += len(data)
        self._lines += data.count(b"\n")

    async def _more(self) -> bytes:
        """The next bytes; b"" at the end."""
        try:
            data = await self._reader.read(CHUNK)
            cut = not data and self._writer.transport.is_closing()
        except OSError:
            data, cut = b"", True
        if self._left:
            raise Disconnected
        if cut:  # closed by either side; a response without a length relies on a regular end
            raise PortFailed(f"the connection to port {self._target.port} broke")
        self._heard = self._heard or bool(data)
        self._since = asyncio.get_running_loop().time()
        return data

    async def _yield(self) -> None:
        """Yield to the event loop after a long time slice: the received data may contain thousands of chunks."""
        loop = asyncio.get_running_loop()
        if loop.time() - self._since > BUDGET:
            await rounds().wait()
            self._since = loop.time()


def add_routes(router: Router, node: Node) -> None:
    async def port(request: Request) -> Answer:
        return Relay(node.get(request.path["sandbox_id"]), request)

    async def open_gateway_port(request: Request) -> Answer:
        sandbox = node.get(request.path["sandbox_id"])
        wanted = await request.model(GatewayPort)
        opened = await sandbox.open_gateway_port(wanted.port)
        return answer_model(GatewayPortInfo(port=opened, connections=sandbox.gateway_port.connections))

    async def close_gateway_port(request: Request) -> Answer:
        sandbox = node.get(request.path["sandbox_id"])
        before = sandbox.gateway_port.port or 0
        await sandbox.close_gateway_port()
        return answer_model(GatewayPortInfo(port=before))

    router.add(ROUTES["open_gateway_port"], open_gateway_port)
    router.add(ROUTES["close_gateway_port"], close_gateway_port)
    router.add(ROUTES["port"], port)
    router.add(ROUTES["port_socket"], web_socket(node))
    router.add(ROUTES["tunnel"], tunnel(node))
