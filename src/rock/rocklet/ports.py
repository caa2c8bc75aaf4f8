"""HTTP to a port inside. The program there is not trusted: what it says is bounded and checked."""

from __future__ import annotations

import asyncio
import logging

import h11

from rock.errors import InvalidConfig, PortFailed, PortTimeout
from rock.protocol.routes import ANSWER_WITHIN, ROUTES
from rock.rocklet import port_sockets
from rock.rocklet.dialled import CHUNK, streams
from rock.rocklet.node import Node
from rock.rocklet.port_headers import Target, inward, outward, target_of
from rock.rocklet.supervisor import Supervisor
from rock.wire.asgi import Answer, Disconnected, Request, Router, Send
from rock.wire.rounds import BUDGET, rounds

log = logging.getLogger("rock.ports")

HEAD_LIMIT = 64 << 10  # bytes, of all heads that come before the answer's body
INFORMATIONAL = 32  # answers 1xx before the answer
_LINES = 1024
_PIECE = 4 << 10  # bytes of heads parsed at once
_Event = h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]


def patience_of(request: Request) -> float:
    """Seconds that a program has for the head of its answer."""
    text = request.header(ANSWER_WITHIN.encode())
    try:
        value = float(text) if text else 120.0
    except ValueError:
        value = -1.0
    if not 0 < value <= 3600:
        raise InvalidConfig(f"{ANSWER_WITHIN}: {text!r} is no number of seconds from 0 to 3600")
    return value


class Relay(Answer):
    """The answer of a port, asked for and passed on when it is sent."""

    def __init__(self, sandbox: Supervisor, request: Request) -> None:
        super().__init__()
        self._sandbox = sandbox
        self._request = request

    async def send(self, send: Send) -> None:
        target, patience = target_of(self._request), patience_of(self._request)
        with self._sandbox.active():
            async with streams(self._sandbox, target.port) as (reader, writer):
                await _Exchange(self._request, target, reader, writer, patience).run(send)


class _Exchange:
    """One request over a connection of its own. Either side may stop before the other has."""

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
        self._in_head = True  # the answer's own has not come
        self._bytes = self._lines = 0  # of heads
        self._limit: asyncio.Timeout | None = None  # while the head of the answer is awaited
        self._left = False
        self._heard = False
        self._unparsed = b""
        self._since = 0.0  # when the parsing began that others wait for

    async def run(self, send: Send) -> None:
        head = self._first()
        client = asyncio.create_task(self._serve_client(head))
        try:
            answer = await self._head()
            headers = outward(answer.status_code, list(answer.headers), self._target)
            await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
            await self._body(send)
        finally:
            client.cancel()
            await asyncio.gather(client, return_exceptions=True)

    # ---- to the program ----

    def _first(self) -> bytes:
        """The head of the request. InvalidConfig when it cannot be said in HTTP/1.1."""
        headers = inward(self._request, self._target)
        coding = (self._request.header(b"transfer-encoding") or "").strip().lower()
        if coding:
            if coding != "chunked":
                raise InvalidConfig(f"a body in the transfer coding {coding[:40]!r} is not passed on")
            headers = [(name, value) for name, value in headers if name != b"content-length"]
            headers.append((b"transfer-encoding", b"chunked"))
        headers = [(b"host", self._target.host.encode()), *headers, (b"connection", b"close")]
        try:
            head = self._http.send(
                h11.Request(method=self._request.scope["method"], target=self._target.path, headers=headers)
            )
        except h11.LocalProtocolError as error:
            raise InvalidConfig(f"the request cannot be passed on: {error}") from None
        return head or b""

    async def _serve_client(self, head: bytes) -> None:
        """Pass the body on, then watch whether the client stays."""
        try:
            try:
                await self._put(head)
                async for part in self._request.chunks():
                    await self._put(self._http.send(h11.Data(data=part)))
                await self._put(self._http.send(h11.EndOfMessage()))
                self._expect(self._patience)
            except (OSError, h11.LocalProtocolError):
                # It does not read, and may have answered all the same. The client shall get to hear that.
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
        self._expect(None)  # it is the client's turn

    def _expect(self, seconds: float | None) -> None:
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(None if seconds is None else asyncio.get_running_loop().time() + seconds)

    # ---- from the program ----

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
            # The head is out: an answer without its end is the only honest sign left, and makes the server hang up.
            log.debug("port %d: an answer broke off: %s", self._target.port, error)
            return
        await send({"type": "http.response.body", "body": b""})

    async def _event(self) -> _Event:
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                what = f"answered with what is no HTTP: {error}" if self._heard else "hung up without an answer"
                raise PortFailed(f"port {self._target.port} {what}") from None
            if event is not h11.NEED_DATA:
                await self._yield()
                return event
            data, self._unparsed = self._unparsed or await self._more(), b""
            if self._in_head:
                data, self._unparsed = data[:_PIECE], data[_PIECE:]
                self._refuse_endless(data)
            self._http.receive_data(data)

    def _refuse_endless(self, data: bytes) -> None:
        """Before one more piece of heads is parsed. PortFailed."""
        if self._bytes > HEAD_LIMIT or self._lines > _LINES:
            raise PortFailed(f"port {self._target.port} answered with what is no HTTP: more than {HEAD_LIMIT} bytes or "
                             f"{_LINES} lines of headers")  # fmt: skip
        self._bytes += len(data)
        self._lines += data.count(b"\n")

    async def _more(self) -> bytes:
        """What comes next; b"" at the end."""
        try:
            data = await self._reader.read(CHUNK)
            cut = not data and self._writer.transport.is_closing()
        except OSError:
            data, cut = b"", True
        if self._left:
            raise Disconnected
        if cut:  # by us or by it; its own end is told from that, for answers which have no length
            raise PortFailed(f"the connection to port {self._target.port} broke")
        self._heard = self._heard or bool(data)
        self._since = asyncio.get_running_loop().time()
        return data

    async def _yield(self) -> None:
        """Let others have the loop, once this has had it for long: what came at once may be thousands of pieces."""
        loop = asyncio.get_running_loop()
        if loop.time() - self._since > BUDGET:
            await rounds().wait()
            self._since = loop.time()


def add_routes(router: Router, node: Node) -> None:
    async def port(request: Request) -> Answer:
        return Relay(node.get(request.path["sandbox_id"]), request)

    router.add(ROUTES["port"], port)
    router.add(ROUTES["port_socket"], port_sockets.web_socket(node))
    router.add(ROUTES["tunnel"], port_sockets.tunnel(node))
