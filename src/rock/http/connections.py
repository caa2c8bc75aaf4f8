"""HTTP connections: limits on requests and connections, and parsing in portions.

Each limit is applied to bytes before the parser stores them, and no connection occupies the event loop for longer than
BUDGET at a time. Larger data is parsed in portions, between which the loop serves other connections. Data within the
Content-Length of a body is parsed as it arrives, at most 256 KB at once: that costs one copy.

A connection of a client whose requests are queued is not read until its turn. A flood therefore costs the loop only the
reading of its requests, dozens of which arrive in one pass; their execution is queued already (fair_queue.py). The
client of a connection is that of its last request.

| limit | value | response |
|---|---|---|
| request head, trailers of a chunked body | 64 KB, 256 headers | 431 |
| URL | 32 KB | 414 |
| time for a head, from the first byte or from the connection on | 30 s | 408, or none without a byte |
| idle connection between two requests | 75 s | closed |
| connections | see `Admission` | 503 |

After each of these responses the connection is closed.
"""

from __future__ import annotations

import time
from asyncio import BaseTransport, TimerHandle
from collections import OrderedDict
from functools import partial
from typing import Any, Protocol

import orjson
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from rock.errors import ClientError, InvalidConfig, RockError, Unavailable
from rock.http.event_loop import BUDGET, rounds
from rock.http.fair_queue import PLACE, QueuePlace
from rock.http.multiplexing import UPGRADE, MultiplexedConnection
from rock.http.peers import PEER, Peer
from rock.protocol.formats.multiplexing import NAME
from rock.protocol.routes import ERROR_CODE

HEAD_LIMIT = 64 << 10  # bytes
HEADERS = 256
URL_LIMIT = 32 << 10  # bytes
HEAD_WITHIN = 30.0  # seconds
_PIECE = 4 << 10  # bytes parsed at once
_PIPELINED = 16  # requests that are read ahead of the one in progress
_HELD = 64 << 10  # bytes of a waiting request above which its connection is no longer read
_LINGER, _LINGERING = 2.0, 1 << 20  # seconds and bytes for which a rejected client may continue to send


class _Flow(FlowControl):
    """Flow control of a connection. is_held: there is unparsed data, so reading is paused."""

    is_held = False

    def resume_reading(self) -> None:
        if not self.is_held:
            super().resume_reading()


class HttpConnection(HttpToolsProtocol):
    """One connection. The next request of a client with a queue waits in that queue as unparsed bytes."""

    def __init__(self, *args: Any, admission: Admission, head_within: float = HEAD_WITHIN, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.address = ""
        self.made_at = time.monotonic()
        self._admission = admission
        self._head_within = head_within
        self._peer = Peer(self._prove)
        self.app_state = {**self.app_state, PEER: self._peer}
        self._place = QueuePlace()
        self._held: bytes | None = None
        self._whole = True  # there is no incomplete request
        self._head = False  # there is an incomplete head of a request
        self._silent = 0  # bytes of a head, or of the framing of a body, that were parsed without a result
        self._body = 0  # body bytes in the last portion
        self._announced = 0  # the Content-Length of this request
        self._chunked = False  # the request has a Transfer-Encoding
        self._counted = 0  # remaining bytes of the body, once the head is complete
        self._size = _PIECE  # size of the next portion in bytes
        self._error: RockError | None = None  # the reason why parsing was stopped
        self._status = 0
        self._discarded = -1  # bytes that arrived after a rejection; -1: no rejection
        self._deadline: TimerHandle | None = None
        self._upgraded: Upgraded | None = None

    # ---- connection ----

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self.flow: _Flow = _Flow(self.transport)
        self._peer.made(transport)
        self.address = self.client[0] if self.client else ""
        if self._admission.admit(self):
            self._deadline = self.loop.call_later(self._head_within, self._late)
        else:
            self._refuse(503, Unavailable(f"this server has {self._admission.total} connections, which is its limit",
                                          hint="close idle connections, or try again"))  # fmt: skip

    def connection_lost(self, exc: Exception | None) -> None:
        self._admission.leave(self)
        self._no_deadline()
        self._held = None
        super().connection_lost(exc)

    def drop(self) -> None:
        """Close the connection now, to make room for others."""
        self.transport.abort()

    def _prove(self, who: str, bounded: bool) -> bool:
        return self._admission.prove(self, who, bounded)

    # ---- data ----

    def data_received(self, data: bytes) -> None:
        if self._discarded >= 0:
            self._discard(len(data))
        elif self._held is not None:
            self._held += data
            if len(self._held) > _HELD:
                self.flow.pause_reading()
                self.flow.is_held = True
        elif self._is_between and self._place.wait(self._go_on):
            self._unset_keepalive_if_required()
            self._held = data
        elif len(data) <= self._counted and len(self.pipeline) < _PIPELINED:
            super().data_received(data)  # only body data, whose parsing costs one copy
        elif len(data) <= _PIECE and len(self.pipeline) < _PIPELINED:
            self._parse_small(data)
        else:
            self._parse(data)

    def _parse_small(self, data: bytes) -> None:
        """Parse at once: the data is no larger than a portion."""
        super().data_received(data)
        if not self._whole or self._deadline is None:
            self._watch(len(data))

    def _parse(self, data: bytes) -> None:
        """Parse in portions. The rest is held when the time slice is over, or too many requests wait."""
        end = self.loop.time() + BUDGET
        at, size = 0, self._size
        while at < len(data):
            if self._upgraded is not None:
                self._upgraded.data_received(data[at:])
                return
            if self.parser is None or self._discarded >= 0 or self.transport.is_closing():
                return
            full = len(self.pipeline) >= _PIPELINED
            if full or (at and size == _PIECE and self.loop.time() > end):
                self._held = data[at:]
                self.flow.pause_reading()
                self.flow.is_held = True
                if not full:
                    rounds().soon(self._go_on)
                return
            counted = self._counted
            piece = data[at : at + max(size, counted)]
            self._body = 0
            super().data_received(piece)
            if counted < len(piece):
                self._watch(len(piece))
            at += len(piece)
            # larger portions within one body
            size = self._size = min(2 * size, _HELD) if self._body == len(piece) else _PIECE

    @property
    def _is_between(self) -> bool:
        return self._whole and self.cycle is not None and self.cycle.response_complete

    def _go_on(self) -> None:
        """Continue with held data at its turn."""
        data, self._held = self._held, None
        self.flow.is_held = False
        if data is None or self.parser is None or self.transport.is_closing():
            return
        if not self.pipeline:
            self.flow.resume_reading()
        if len(data) <= _PIECE and len(self.pipeline) < _PIPELINED and self._upgraded is None:
            self._parse_small(data)
        else:
            self._parse(data)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._held is not None and len(self.pipeline) == _PIPELINED - 1:
            rounds().soon(self._go_on)

    # ---- limits ----

    def _watch(self, count: int) -> None:
        """Check the limits after `count` bytes were parsed."""
        if not self._whole:
            self._silent += count
            if self._silent > HEAD_LIMIT:
                what = "head of the request" if self._head else "framing of the request's body"
                self._refuse(431, InvalidConfig(f"the {what} is over {HEAD_LIMIT} bytes",
                                                hint="send shorter headers, and fewer of them"))
                return
        if self._deadline is None and (self._head or self._is_between):
            self._deadline = self.loop.call_later(self._head_within, self._late)

    def _late(self) -> None:
        """No complete head arrived in time."""
        self._deadline = None
        if self._head:
            self._refuse(408, ClientError(f"no whole request head has come within {self._head_within:g} s"))
        elif self._whole and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()

    def _no_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def on_message_begin(self) -> None:
        self._whole = False
        self._head = True
        self._size = _PIECE
        self._silent = 0
        self._announced = self._counted = 0
        self._chunked = False
        super().on_message_begin()
        self.scope[PLACE] = self._place  # type: ignore[literal-required]

    def on_url(self, url: bytes) -> None:
        if len(self.url) + len(url) > URL_LIMIT:
            self._stop(414, f"the URL is over {URL_LIMIT} bytes")
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= HEADERS:
            self._stop(431, f"the request has more than {HEADERS} headers")
        name = name.lower()
        self.headers.append((name, value))
        if name == b"content-length":
            if value.isdigit():
                self._announced = int(value[:18])
        elif name == b"transfer-encoding":
            self._chunked = True
        elif name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True

    def on_headers_complete(self) -> None:
        self._head = False
        self._silent = 0
        self._no_deadline()
        if not self._chunked:
            self._counted = self._announced
        super().on_headers_complete()
        if self.parser.should_upgrade() and self._get_upgrade() == NAME.encode():
            self._offer(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._silent = 0
        self._body = len(body)
        self._counted -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._whole = True
        self._counted = 0
        super().on_message_complete()

    def _stop(self, status: int, message: str) -> None:
        """Stop the parser with an error response."""
        self._status, self._error = status, InvalidConfig(message,
                                                          hint="shorten the URL and the headers; put large values into "
                                                               "the body")
        raise ValueError(message)

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._status or 400, self._error or ClientError("the request is not HTTP"))

    def _refuse(self, status: int, error: RockError) -> None:
        """Send an error response, and close the connection once the client has had time to read it."""
        if self._discarded >= 0 or self.transport.is_closing():
            return
        self._discarded = 0
        self._held = None
        self._no_deadline()
        self._unset_keepalive_if_required()
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.close()  # another response is in progress
            return
        body = orjson.dumps(error.to_wire())
        self.transport.write(
            b"%scontent-type: application/json\r\ncontent-length: %d\r\n%s: %s\r\nconnection: close\r\n\r\n%s"
            % (STATUS_LINE[status], len(body), ERROR_CODE.encode(), error.code.encode(), body)
        )
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.flow.is_held = False
            self.flow.resume_reading()  # otherwise a client that is still sending would lose the response
            self._deadline = self.loop.call_later(_LINGER, self.transport.abort)
        else:
            self.transport.close()

    def _discard(self, count: int) -> None:
        self._discarded += count
        if self._discarded > _LINGERING:
            self.transport.abort()

    def eof_received(self) -> None:
        if self._discarded >= 0:
            self.transport.close()

    # ---- upgrade and shutdown ----

    def handle_websocket_upgrade(self) -> None:
        self.ws_protocol_class = self._upgrade  # type: ignore[assignment]
        super().handle_websocket_upgrade()

    def _upgrade(self, **given: Any) -> Upgraded:
        self._no_deadline()
        self._upgraded = Upgraded(lambda: self._admission.leave(self), **given)
        return self._upgraded

    def _offer(self, cycle: RequestResponseCycle) -> None:
        """The client asks for frames: a response with the status 101 hands the socket to them."""
        self.scope[UPGRADE] = NAME  # type: ignore[literal-required]
        send = cycle.send

        async def switch(message: Any) -> None:
            if message.get("status") == 101:
                self._switch(cycle, message["headers"])
            elif not cycle.response_complete:
                await send(message)

        cycle.send = switch  # type: ignore[method-assign]

    def _switch(self, cycle: RequestResponseCycle, headers: list[tuple[bytes, bytes]]) -> None:
        if cycle.disconnected or self.transport.is_closing() or self.pipeline:
            return
        self._no_deadline()
        self._unset_keepalive_if_required()
        cycle.response_started = cycle.response_complete = True
        self.connections.discard(self)
        told = [b"%s: %s\r\n" % header for header in headers if header[0] not in (b"content-length", b"content-type")]
        common = {name: value for name, value in cycle.scope.items() if name not in (PLACE, UPGRADE)}
        left = partial(self._admission.leave, self)
        framed = MultiplexedConnection(self.app, self.transport, self.loop, common, self.headers,
                                       self.server_state, left)  # fmt: skip
        self.transport.write(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: %s\r\n%s\r\n"
                             % (NAME.encode(), b"".join(told)))  # fmt: skip
        self.transport.set_protocol(framed)

    def _unsupported_upgrade_warning(self) -> None:
        """A request with another header Upgrade is served as one without it."""

    def shutdown(self) -> None:
        """The server stops: waiting requests get an error response."""
        self._place.line = ""
        self._go_on()
        super().shutdown()


class Upgraded(WebSocketsSansIOProtocol):
    """A WebSocket. Many small frames that arrive at once are parsed in portions. left: called when it is closed."""

    def __init__(self, left: Any, **given: Any) -> None:
        super().__init__(**given)
        self._left = left
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        if self._rest:
            self._rest += data
            return
        if len(data) <= _PIECE:
            super().data_received(data)
            return
        end = self.loop.time() + BUDGET
        for at in range(0, len(data), _PIECE):
            if self.transport.is_closing() or self.conn.parser_exc is not None:
                return
            if at and self.loop.time() > end:
                self._rest = data[at:]
                self.transport.pause_reading()
                rounds().soon(self._go_on)
                return
            super().data_received(data[at : at + _PIECE])

    def _go_on(self) -> None:
        data, self._rest = self._rest, b""
        if self.transport.is_closing():
            return
        if not self.read_paused:
            self.transport.resume_reading()
        self.data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._left()
        super().connection_lost(exc)


# ---- connection limits ----
#
# A server limits its open connections: in total, per client address before authentication, and per tenant afterwards. A
# connection without an authenticated request has the lowest priority: the oldest of them is closed to make room.
# Descriptors above the total are reserved for sandboxes.

UNPROVEN_EACH = 512  # connections of one address without an authenticated request
GRACE = 1.0  # seconds that a new connection has for one, before it may be closed to make room
_LEAST = 64


class Connection(Protocol):
    """A counted connection."""

    address: str
    made_at: float

    def drop(self) -> None:
        """Close it now."""


def most_connections() -> int:
    """Half of the descriptors that this process may have."""
    try:
        import resource
    except ImportError:  # the platform has no such limits
        return 8192
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else max(_LEAST, soft // 2)


class Admission:
    """The connection limits of one server. total: maximum number; unproven_each: see UNPROVEN_EACH."""

    def __init__(self, total: int | None = None, unproven_each: int = UNPROVEN_EACH) -> None:
        self.total = most_connections() if total is None else total
        self.open = 0
        self.refused = 0
        self._each = min(unproven_each, self.total)
        self._unproven: OrderedDict[Connection, None] = OrderedDict()  # the oldest first
        self._by_address: dict[str, OrderedDict[Connection, None]] = {}
        self._owners: dict[Connection, str] = {}
        self._owned: dict[str, int] = {}

    def admit(self, connection: Connection) -> bool:
        """Count a new connection; False when the limit is reached. `leave` has to follow in both cases."""
        self.open += 1
        same = self._by_address.setdefault(connection.address, OrderedDict())
        if len(same) >= self._each:
            self._make_room(same)
        if self.open > self.total and not self._make_room(self._unproven):
            self.refused += 1
            return False
        same[connection] = self._unproven[connection] = None
        return True

    def prove(self, connection: Connection, who: str, bounded: bool) -> bool:
        """An authenticated request of `who` arrived. bounded: the tenant may use at most half of the total; False above
        that."""
        if connection in self._owners:
            return True
        if bounded and self._owned.get(who, 0) >= max(1, self.total // 2):
            return False
        self._forget(connection)
        self._owners[connection] = who
        self._owned[who] = self._owned.get(who, 0) + 1
        return True

    def leave(self, connection: Connection) -> None:
        """The connection is closed."""
        self.open -= 1
        self._forget(connection)
        who = self._owners.pop(connection, None)
        if who is not None:
            self._owned[who] -= 1
            if not self._owned[who]:
                del self._owned[who]

    def _forget(self, connection: Connection) -> None:
        self._unproven.pop(connection, None)
        same = self._by_address.get(connection.address)
        if same is not None:
            same.pop(connection, None)
            if not same:
                del self._by_address[connection.address]

    def _make_room(self, among: OrderedDict[Connection, None]) -> bool:
        oldest = next(iter(among), None)
        if oldest is None or time.monotonic() - oldest.made_at < GRACE:
            return False
        self._forget(oldest)
        oldest.drop()
        return True
