"""The Connect protocol with JSON messages: unary calls, streams, and the JSON form of protobuf fields."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any

import orjson

from rock.dialects.e2b.errors import GONE, NotRunning, RpcError, rpc_body, rpc_code, rpc_failure, text_of
from rock.errors import RockError
from rock.http.asgi import Answer, Request

Message = dict[str, Any]
Events = AsyncGenerator[Message]
UNARY, STREAM = "application/json", "application/connect+json"
LIMIT = 16 << 20  # bytes of a message
_HEAD = struct.Struct(">BI")
_COMPRESSED, _END = 1, 2
_LONGEST_TIMEOUT = 10**10  # milliseconds: the protocol has at most ten digits


def content_type(request: Request) -> str:
    return (request.header(b"content-type") or "").partition(";")[0].strip().lower()


def is_rpc(request: Request) -> bool:
    """Whether a request is one of this protocol, so that its errors have the format of the protocol."""
    return content_type(request) in (UNARY, STREAM)


def seconds_of(request: Request) -> float | None:
    """The time limit of a call; None is no limit. RpcError."""
    text = request.header(b"connect-timeout-ms")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and int(text[:12]) < _LONGEST_TIMEOUT):
        raise RpcError("invalid_argument", f"connect-timeout-ms: {text[:20]!r} is not a number of milliseconds")
    return int(text) / 1000


def _check(request: Request, expected: str) -> None:
    found = content_type(request)
    if found != expected:
        raise RpcError("unimplemented", f"content-type {found[:80]!r} is not supported here: use {expected}; "
                                        "the JSON codec is the only one")  # fmt: skip
    for name in (b"content-encoding", b"connect-content-encoding"):
        encoding = request.header(name)
        if encoding not in (None, "", "identity"):
            raise RpcError("unimplemented", f"{name.decode()} {encoding[:40]!r} is not supported: send it uncompressed")


def _object(data: bytes) -> Message:
    try:
        value = orjson.loads(data) if data else {}
    except orjson.JSONDecodeError as error:
        raise RpcError("invalid_argument", f"the message is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RpcError("invalid_argument", "the message is not a JSON object")
    return value


async def _body(request: Request, limit: int) -> bytes:
    parts, size = [], 0
    async for part in request.chunks():
        size += len(part)
        if size > limit:
            raise RpcError("resource_exhausted", f"the message is over {limit} bytes: send it in parts")
        parts.append(part)
    return b"".join(parts)


# ---- unary calls ----


async def unary(request: Request, method: Callable[[Message], Awaitable[Message]]) -> Answer:
    """Serve a unary call."""
    try:
        _check(request, UNARY)
        message = _object(await _body(request, LIMIT))
        return Answer(orjson.dumps(await method(message)))
    except RpcError as error:
        return rpc_failure(error.code, str(error))
    except RockError as error:
        return rpc_failure(rpc_code(error), text_of(error))


# ---- streams ----


def envelope(message: Message, flags: int = 0) -> bytes:
    data = orjson.dumps(message)
    return _HEAD.pack(flags, len(data)) + data


def end_of(error: RpcError | RockError | None) -> bytes:
    """The last envelope of a stream."""
    if error is None:
        return envelope({}, _END)
    code, text = (error.code, str(error)) if isinstance(error, RpcError) else (rpc_code(error), text_of(error))
    return envelope({"error": rpc_body(code, text)}, _END)


class Envelopes:
    """The messages of a request body, one after the other. RpcError for a malformed or too long one."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._buffer = bytearray()
        self._over = False

    async def next(self) -> Message | None:
        """The next message; None at the end."""
        if self._over or not await self._fill(_HEAD.size):
            return None
        flags, length = _HEAD.unpack_from(self._buffer)
        if flags & _END:
            self._over = True
            return None
        if flags & _COMPRESSED:
            raise RpcError("unimplemented", "the message is compressed: send it uncompressed")
        if length > LIMIT:
            raise RpcError("resource_exhausted", f"a message of {length} bytes is over {LIMIT} bytes")
        if not await self._fill(_HEAD.size + length):
            raise RpcError("invalid_argument", "the body ends within a message")
        data = bytes(self._buffer[_HEAD.size : _HEAD.size + length])
        del self._buffer[: _HEAD.size + length]
        return _object(data)

    async def _fill(self, size: int) -> bool:
        """Whether so many bytes are there; False at the end of the body between two messages."""
        while len(self._buffer) < size:
            part = await anext(self._chunks, None)
            if part is None:
                if self._buffer and len(self._buffer) < _HEAD.size:
                    raise RpcError("invalid_argument", "the body ends within the head of a message")
                return False
            self._buffer += part
        return True


async def server_stream(
    request: Request, method: Callable[[Message], Events], cleanup: contextlib.AsyncExitStack
) -> Answer:
    """Serve a call with one request message and a stream of responses. The first response is awaited here, so that an
    error of a sandbox that does not run has its HTTP status. cleanup: runs after the response was sent."""
    try:
        _check(request, STREAM)
        chunks = request.chunks()
        message = await Envelopes(chunks).next()
        if message is None:
            raise RpcError("invalid_argument", "the request has no message")
        async for _ in chunks:  # disconnect messages come after the body
            pass
        interval = _keepalive(request)
        events = method(message)
        cleanup.push_async_callback(events.aclose)
        first = await anext(events, None)
    except (RpcError, RockError) as error:
        return Answer(end_of(error), content_type=STREAM.encode())
    return Answer(stream=_stream(request, first, events, interval), content_type=STREAM.encode())


async def client_stream(request: Request, method: Callable[[Envelopes], Awaitable[Message]]) -> Answer:
    """Serve a call with a stream of request messages and one response."""
    try:
        _check(request, STREAM)
        reply = await method(Envelopes(request.chunks()))
    except (RpcError, RockError) as error:
        return Answer(end_of(error), content_type=STREAM.encode())
    return Answer(envelope(reply) + end_of(None), content_type=STREAM.encode())


def _keepalive(request: Request) -> float:
    text = request.header(b"keepalive-ping-interval") or ""
    return min(max(float(text), 1.0), 3600.0) if text.isascii() and text.isdigit() and len(text) < 6 else 90.0


async def _stream(request: Request, first: Message | None, events: Events, interval: float) -> AsyncGenerator[bytes]:
    """The envelopes of a stream until its end, or until the client disconnects. interval: seconds between two
    keepalive messages of a silent stream."""
    gone = asyncio.ensure_future(request.disconnected())
    pending: asyncio.Future[Message | None] | None = None
    failed: RpcError | RockError | None = None
    try:
        async with contextlib.aclosing(events):
            if first is not None:
                yield envelope(first)
            while first is not None and not gone.done():
                if pending is None:
                    pending = asyncio.ensure_future(_next(events))
                both: set[asyncio.Future[Any]] = {pending, gone}
                await asyncio.wait(both, timeout=interval, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    return
                if not pending.done():
                    yield envelope({"event": {"keepalive": {}}} if "event" in first else {"keepalive": {}})
                    continue
                done, pending = pending, None
                try:
                    found = done.result()
                except (RpcError, RockError) as error:
                    failed = error
                    break
                except NotRunning:
                    failed = RpcError("unavailable", GONE)
                    break
                if found is None:
                    break
                yield envelope(found)
            yield end_of(failed)
    finally:
        left = [task for task in (gone, pending) if task is not None and not task.done()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def _next(events: Events) -> Coroutine[Any, Any, Message | None]:
    async def step() -> Message | None:
        return await anext(events, None)

    return step()


# ---- fields of messages ----
#
# JSON names are lowerCamelCase; the names of the protobuf definition are accepted too. A missing field has its default.


def _value(message: Mapping[str, Any], name: str) -> Any:
    if name in message:
        return message[name]
    snake = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)
    return message.get(snake)


def _wrong(name: str, kind: str) -> RpcError:
    return RpcError("invalid_argument", f"field {name!r} is not {kind}")


def text(message: Mapping[str, Any], name: str) -> str:
    value = _value(message, name)
    if value is None:
        return ""
    if not isinstance(value, str) or "\0" in value:
        raise _wrong(name, "text without a NUL character")
    return value


def flag(message: Mapping[str, Any], name: str) -> bool | None:
    """None where the field is missing."""
    value = _value(message, name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(name, "true or false")
    return value


def number(message: Mapping[str, Any], name: str, most: int = (1 << 32) - 1) -> int:
    value = _value(message, name)
    if value is None:
        return 0
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise _wrong(name, f"an integer from 0 to {most}")
    return value


def message_of(message: Mapping[str, Any], name: str) -> Message | None:
    value = _value(message, name)
    if value is not None and not isinstance(value, dict):
        raise _wrong(name, "an object")
    return value


def texts(message: Mapping[str, Any], name: str) -> list[str]:
    value = _value(message, name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) and "\0" not in item for item in value):
        raise _wrong(name, "a list of texts without NUL characters")
    return value


def text_map(message: Mapping[str, Any], name: str) -> dict[str, str]:
    value = message_of(message, name) or {}
    for key, item in value.items():
        if not isinstance(item, str) or "\0" in item or "\0" in key:
            raise _wrong(name, "an object of texts without NUL characters")
    return value


def data_of(message: Mapping[str, Any], name: str) -> bytes | None:
    """The bytes of a field in base64, standard or URL-safe, with or without padding; None where it is missing."""
    value = _value(message, name)
    if value is None:
        return None
    try:
        if not isinstance(value, str):
            raise ValueError
        plain = value.replace("-", "+").replace("_", "/")
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (ValueError, binascii.Error):
        raise _wrong(name, "base64") from None


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def word(message: Mapping[str, Any], name: str, words: Mapping[str, int]) -> int:
    """An enum value, given by its name or its number."""
    value = _value(message, name)
    found = words.get(value) if isinstance(value, str) else value
    if isinstance(found, bool) or not isinstance(found, int) or found not in words.values():
        raise _wrong(name, f"one of {', '.join(words)}")
    return found
