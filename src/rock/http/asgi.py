"""A minimal ASGI toolkit for the data plane, where the 200 microseconds per request of a framework would dominate.

`Router` maps rows of protocol/routes.py to handlers; `call` runs a request through an ASGI application in this process:
the same wire format without a socket. `Configs` caches parsed sandbox configs.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar, cast
from urllib.parse import parse_qsl

import orjson
from pydantic import BaseModel, ValidationError

from rock.errors import InvalidConfig, RockError, Unavailable, no_such_route, unexpected
from rock.protocol.keys import CALLER, Caller, caller_of
from rock.protocol.route import Route
from rock.protocol.routes import ERROR_CODE, SENT
from rock.protocol.sandbox import ID_PATTERN, SandboxConfig
from rock.telemetry.context import CURRENT

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Model = TypeVar("Model", bound=BaseModel)

MAX_BODY = 64 << 20
JSON_OBJECT = "send a JSON object with content-type application/json"  # hint of errors
log = logging.getLogger("rock.wire")


def of_connection(headers: Iterable[tuple[bytes, bytes]]) -> frozenset[bytes]:
    """The lower-case names of headers that a message declares, by Connection, as those of its connection."""
    named = [value for name, value in headers if name.lower() == b"connection"]
    return frozenset(word.strip().lower() for value in named for word in value.split(b","))


class Disconnected(Exception):
    """The client disconnected before its request was complete."""


@functools.lru_cache(maxsize=256)
def _query(raw: bytes) -> Mapping[str, str]:
    """A parsed query string; cached, because most requests have one of a few."""
    return MappingProxyType(dict(parse_qsl(raw.decode("latin-1"), keep_blank_values=True)))


class Request:
    """One HTTP request: path variables, query, headers, body."""

    __slots__ = ("_receive", "headers", "path", "query", "scope")

    def __init__(self, scope: Scope, receive: Receive, path: dict[str, str]) -> None:
        self.scope = scope
        self._receive = receive
        self.path = path
        raw: bytes = scope.get("query_string", b"")
        self.query: Mapping[str, str] = _query(raw) if raw else {}
        self.headers: list[tuple[bytes, bytes]] = scope["headers"]

    @property
    def client(self) -> Receive:
        """The source of disconnect messages, once the body was read."""
        return self._receive

    def header(self, name: bytes) -> str | None:
        for key, value in self.headers:
            if key == name:
                return value.decode("latin-1")
        return None

    def number(self, name: str, default: float, *, low: float = 0, high: float = float("inf")) -> float:
        """A number from the query; InvalidConfig names the problem."""
        text = self.query.get(name)
        if text is None or text == "":
            return default
        try:
            value = float(text)
        except ValueError:
            raise InvalidConfig(f"query {name}={text!r} is not a number",
                                hint=f"give a number, as in {name}={low:g}") from None
        if not low <= value <= high:
            raise InvalidConfig(f"query {name}={text} is not between {low:g} and {high:g}",
                                hint=f"give a number from {low:g} to {high:g}")
        return value

    def integer(self, name: str, default: int, *, low: int = 0, high: int = 1 << 53) -> int:
        """An integer from the query; InvalidConfig names the problem."""
        return int(self.number(name, default, low=low, high=high))

    def flag(self, name: str, default: bool = False) -> bool:
        text = self.query.get(name)
        return default if text is None else text.lower() not in ("", "0", "false", "no")

    def required(self, name: str) -> str:
        value = self.query.get(name)
        if not value:
            raise InvalidConfig(f"the query parameter {name!r} is missing",
                                hint=f"add {name}=VALUE to the URL; /docs lists the parameters")
        return value

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives."""
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            if message.get("body"):
                yield message["body"]
            if not message.get("more_body", False):
                return

    async def body(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            return message.get("body", b"")  # type: ignore[no-any-return]
        if message["type"] == "http.disconnect":
            raise Disconnected
        parts = [message.get("body", b"")]
        size = len(parts[0])
        async for part in self.chunks():
            size += len(part)
            if size > MAX_BODY:
                raise InvalidConfig(f"the body is over {MAX_BODY} bytes", hint="send files with write_file")
            parts.append(part)
        return b"".join(parts)

    async def json(self) -> Any:
        return parsed(await self.body())

    async def model(self, kind: type[Model]) -> Model:
        return validate(kind, await self.json())

    async def disconnected(self) -> None:
        """Return when the client disconnects; call it only after the body was read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass


def parsed(data: bytes) -> Any:
    """The JSON body; {} where there is none. InvalidConfig."""
    try:
        return orjson.loads(data) if data else {}
    except orjson.JSONDecodeError as error:
        raise InvalidConfig(f"the body is not JSON: {error}",
                            hint=JSON_OBJECT) from None


def validate(kind: type[Model], value: Any) -> Model:
    """A model from plain data; InvalidConfig names each wrong field."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise InvalidConfig(tell_validation(error),
                            hint="/docs on this server lists the fields and their types") from None


def tell_validation(error: ValidationError) -> str:
    parts = []
    for item in error.errors(include_url=False, include_input=False):
        where = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        parts.append(f"{where}: {message}" if where else message)
    return "; ".join(parts)


@dataclass(slots=True)
class Answer:
    """The response of a handler: bytes, or a stream of them."""

    body: bytes = b""
    status: int = 200
    content_type: bytes = b"application/json"
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    stream: AsyncGenerator[bytes] | None = None
    length: int | None = None

    async def send(self, send: Send) -> None:
        headers = [(b"content-type", self.content_type), *self.headers]
        if self.stream is None:
            headers.append((b"content-length", str(len(self.body)).encode()))
            await send({"type": "http.response.start", "status": self.status, "headers": headers})
            await send({"type": "http.response.body", "body": self.body})
            return
        if self.length is not None:
            headers.append((b"content-length", str(self.length).encode()))
        # Closed at once when it cannot be sent: the resources of a stream (a program, a descriptor) must not wait for
        # garbage collection.
        async with contextlib.aclosing(self.stream) as stream:
            await send({"type": "http.response.start", "status": self.status, "headers": headers})
            async for part in stream:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.__dict__
    raise TypeError(f"{type(value).__name__} is not JSON")


def dumps(value: Any) -> bytes:
    """JSON of plain data and of models (their fields unchanged)."""
    return orjson.dumps(
        value.__dict__ if isinstance(value, BaseModel) else value, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY
    )


def answer(value: Any, status: int = 200) -> Answer:
    return Answer(dumps(value), status)


def answer_model(model: BaseModel, status: int = 200) -> Answer:
    """A model as its own serializers encode it: enums, times and nested models."""
    return Answer(model.model_dump_json().encode(), status)


def failure(error: RockError) -> Answer:
    headers = [(ERROR_CODE.encode(), error.code.encode())]
    if error.retryable:
        headers.append((b"retry-after", b"%d" % retry_after(error)))
    return Answer(orjson.dumps(error.to_wire(), default=repr), error.status, headers=headers)


def retry_after(error: RockError) -> int:
    """The Retry-After value in whole seconds for an error."""
    seconds = error.details.get("retry_after", 1)
    return max(1, math.ceil(seconds)) if isinstance(seconds, int | float) else 1


async def deny(scope: Scope, send: Send, error: RockError) -> None:
    """Reject a WebSocket with the error as the HTTP response to its handshake, where the server supports that."""
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1011, "reason": error.code})
        return

    async def translate(message: MutableMapping[str, Any]) -> None:
        await send({**message, "type": f"websocket.{message['type']}"})

    await failure(error).send(translate)


async def refuse_upgrade(scope: Scope, receive: Receive, send: Send) -> None:
    """Reject a WebSocket with 426, for an application that serves HTTP only."""
    await receive()
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008, "reason": "use HTTP"})
        return
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    body = b'{"error":{"message":"WebSockets are not served here; use HTTP","type":"invalid_request_error"}}'
    await send({"type": "websocket.http.response.start", "status": 426, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})


Handler = Callable[[Request], Awaitable[Answer]]
SocketHandler = Callable[[Request, Receive, Send], Awaitable[None]]


def fit(wanted: tuple[str, ...], given: list[str]) -> dict[str, str] | None:
    """The path variables of a row, or None when the path matches another row."""
    if len(wanted) != len(given):
        return None
    values: dict[str, str] = {}
    for want, have in zip(wanted, given, strict=True):
        if want[:1] == "{":
            values[want[1:-1]] = have
        elif want != have:
            return None
    return values


_MATCHED, _LONGEST_PATH = 1024, 300  # paths of a router that are remembered, and their length
Found = tuple[Handler | SocketHandler, dict[str, str], Route]


class Router:
    """An ASGI application over rows of the route table. Every error of a handler becomes a typed response.

    The access check happens here, before the handler receives the request.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._rows: dict[tuple[str, int], list[tuple[tuple[str, ...], Handler | SocketHandler, Route]]] = {}
        self._tails: list[tuple[str, tuple[str, ...], Handler | SocketHandler, Route]] = []
        self._known: dict[tuple[str, str], Found | None] = {}

    def add(self, route: Route, handler: Handler | SocketHandler) -> None:
        self._known.clear()
        parts = tuple(route.path.split("/"))
        if route.tail:
            self._tails.append((route.method, parts[:-1], handler, route))
            return
        self._rows.setdefault((route.method, len(parts)), []).append((parts, handler, route))

    def match(self, method: str, path: str) -> Found | None:
        """The handler of a row, the path variables, and the row. Equal paths share the variables."""
        try:
            return self._known[method, path]
        except KeyError:
            found = self._search(method, path)
        if len(path) <= _LONGEST_PATH:
            if len(self._known) >= _MATCHED:
                self._known.clear()
            self._known[method, path] = found
        return found

    def _search(self, method: str, path: str) -> Found | None:
        given = path.split("/")
        for parts, handler, route in self._rows.get((method, len(given)), ()):
            values = fit(parts, given)
            if values is not None:
                return handler, values, route
        for kind, parts, handler, route in self._tails:
            if kind == method or (kind == "ANY" and method != "WEBSOCKET"):
                values = fit(parts, given[: len(parts)])
                if values is not None:
                    return handler, values, route
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        method = "WEBSOCKET" if kind == "websocket" else scope["method"]
        await self.serve(self.match(method, scope["path"]), scope, receive, send)

    async def serve(self, found: Found | None, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request whose row was looked up by `match`."""
        kind = scope["type"]
        method = "WEBSOCKET" if kind == "websocket" else scope["method"]
        if found is not None and (context := CURRENT.get()) is not None and not context.route:
            context.route = found[2].name
            context.sandbox_id = context.sandbox_id or found[1].get("sandbox_id", "")[:128]
        if kind == "websocket":
            await self._socket(found, scope, receive, send)
            return
        started = False

        async def track(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            if found is None:
                raise no_such_route(scope["path"], method)
            caller_of(scope).require(found[2].access)
            handler = cast(Handler, found[0])
            reply = await handler(Request(scope, receive, found[1]))
            await reply.send(track)
        except Disconnected:
            return
        except RockError as error:
            if started:
                raise
            await failure(error).send(send)
        except asyncio.CancelledError:
            if not started:
                await failure(Unavailable("the server stopped before the request was complete", details=SENT,
                                          hint="check whether the operation took effect, then send the request "
                                               "again")).send(send)
            raise
        except Exception as error:
            if started:
                raise  # the head was sent; closing the connection is the only remaining error signal
            if isinstance(error, ValueError) and "embedded null" in str(error):  # of Python, for a path or a word
                refused = InvalidConfig("a path or an argument has a NUL character",
                                        hint="remove it; no path or argument of Linux can contain one")
                await failure(refused).send(send)
                return
            log.exception("%s %s", method, scope["path"])
            await failure(unexpected(error)).send(send)

    async def _socket(self, found: Any, scope: Scope, receive: Receive, send: Send) -> None:
        if found is None:
            await send({"type": "websocket.close", "code": 1008, "reason": "no such route"})
            return
        opened = False

        async def track(message: MutableMapping[str, Any]) -> None:
            nonlocal opened
            opened = True
            await send(message)

        try:
            caller_of(scope).require(found[2].access)
            await found[0](Request(scope, receive, found[1]), receive, track)
        except RockError as error:
            if not opened:
                await deny(scope, send, error)
                return
            try:
                await send({"type": "websocket.send", "text": orjson.dumps(error.to_wire(), default=repr).decode()})
                await send({"type": "websocket.close", "code": 1011, "reason": error.code})
            except (RuntimeError, OSError):
                log.debug("the client disconnected before it received the error: %s", error)


async def call(
    app: App,
    method: str,
    path: str,
    *,
    body: bytes | AsyncIterator[bytes] = b"",
    query: str = "",
    headers: Mapping[str, str] | None = None,
    caller: Caller,
    client: Receive | None = None,
    address: tuple[str, int] | None = None,
) -> tuple[int, bytes]:
    """(status, body) of one request to an ASGI application in this process.

    body: complete, or a stream. caller: the authenticated caller of the request. client: the source of disconnect
    messages (the `receive` of the original request, once its body was read); after a disconnect the call is canceled
    and Disconnected is raised. address: of the original client, for the audit log.
    """
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "scheme": "http",
        "client": address,
        "server": None,
        "headers": [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()],
        CALLER: caller,
    }
    status: int | None = None
    parts: list[bytes] = []
    pending = None if isinstance(body, bytes) else body
    whole = False

    async def receive() -> MutableMapping[str, Any]:
        nonlocal whole
        if pending is not None and not whole:
            async for part in pending:
                return {"type": "http.request", "body": part, "more_body": True}
        if not whole:
            whole = True
            return {"type": "http.request", "body": b"" if pending is not None else body, "more_body": False}
        if client is not None:
            return await client()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    if status is None:  # only a canceled call returns no response
        raise Disconnected
    return status, b"".join(parts)


# ---- cache of configs ----
#
# The sandboxes of a burst usually share one config, so equal text returns the same object. Callers must not change it.

_MOST = 64
_LONGEST = 4096  # bytes
_ID = re.compile(ID_PATTERN, re.ASCII)


class Configs:
    """The last parsed configs, by their text."""

    def __init__(self) -> None:
        self._known: dict[bytes, SandboxConfig] = {}

    def read_named(self, text: bytes) -> tuple[SandboxConfig, str | None]:
        """Parse a config, apart from the id that its client chose: each create has another one."""
        value = parsed(text)
        if isinstance(value, dict) and isinstance(chosen := value.get("sandbox_id"), str) and _ID.fullmatch(chosen):
            del value["sandbox_id"]
            return self.read(orjson.dumps(value)), chosen
        config = self.read(text)
        return config, config.sandbox_id

    def read(self, text: bytes) -> SandboxConfig:
        """Parse a config. InvalidConfig names each wrong field."""
        known = self._known.get(text)
        if known is not None:
            return known
        config = validate(SandboxConfig, parsed(text))
        if len(text) <= _LONGEST and config.registry_password is None:
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[text] = config
        return config
