"""The recording of sandboxes with `record=True`: requests and responses on their way through the proxy (decision 58).

    request ─► entry without response ─► worker ─► entry with response ─► response to the client

A client has a response only if the recording has it too. A request with the idempotency key of a recorded one gets the
recorded response. While a sandbox repeats another recording, requests that are equal to its next entry get the response
of that entry, and the worker gets nothing.
"""

from __future__ import annotations

import time
from base64 import b64decode, b64encode
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

from rock import faults
from rock.errors import DiskFull, Exited, Expired, Lost, NotHere, OutOfMemory, RockError, StartFailed, Unavailable
from rock.http.asgi import Answer, App, Receive, Router, Scope, Send, failure
from rock.protocol.recordings import (
    LARGEST_REQUEST,
    LARGEST_RESPONSE,
    OPAQUE,
    PAGE,
    READS,
    REPLAYED,
    RecordedEntry,
    canonical,
    replay_key,
    without_id,
)
from rock.protocol.routes import IDEMPOTENCY_KEY, ROUTES
from rock.store.base import Record, Store
from rock.store.recordings import Head, opened

_REMEMBERED = 20_000
_Value = TypeVar("_Value")
_TYPE = b"content-type"
_KEPT = frozenset({_TYPE, b"x-rock-error", b"x-rock-start", b"x-rock-next", b"x-rock-running"})  # headers of responses
_LONGEST_KEY = 300
# Errors of requests that were not served, or not to their end: an entry without a response is sent again by a replay.
_NOT_DONE = frozenset(kind.code.encode() for kind in (
    DiskFull, Exited, Expired, Lost, NotHere, OutOfMemory, StartFailed, Unavailable))  # fmt: skip


def remember(known: OrderedDict[str, _Value], sandbox_id: str, value: _Value) -> None:
    """Add what is known of a sandbox; beyond a number of sandboxes the oldest entry is dropped."""
    known[sandbox_id] = value
    while len(known) > _REMEMBERED:
        known.popitem(last=False)


class Recorder:
    """Records what passes for recorded sandboxes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: OrderedDict[str, bool] = OrderedDict()
        self._repeats: dict[str, _Repeat] = {}
        self._rows = Router("recorded")
        for route in ROUTES.values():
            if route.plane == "data":
                self._rows.add(route, _nowhere)

    async def records(self, sandbox_id: str) -> bool:
        """Whether requests to a sandbox are recorded."""
        known = self._known.get(sandbox_id)
        if known is None:
            record = await self._store.get(sandbox_id)
            if record is None:
                return False
            known = bool(record.config.record)
            remember(self._known, sandbox_id, known)
            if known:
                await opened(self._store, record)
        return known

    def noted(self, record: Record) -> None:
        """A record was saved in this process. Its store need not be read, unless a recording has to be opened."""
        if record.config.record:
            self._known.pop(record.id, None)
        else:
            remember(self._known, record.id, False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send, sandbox_id: str, forward: App) -> None:
        """Serve a request to a recorded sandbox. forward: leads to its worker."""
        websocket = scope["type"] == "websocket"
        row = self._rows.match("WEBSOCKET" if websocket else scope["method"], scope["path"])
        name = row[2].name if row is not None else ""
        entry = RecordedEntry(number=0, at=time.time(), route=name, method=scope.get("method", ""),
                              target=_target(scope))  # fmt: skip
        if name in OPAQUE:
            await self._store.recordings.begin(sandbox_id, entry, None)
        if websocket or name not in REPLAYED | READS:
            await forward(scope, receive, send)
            return
        body, receive = await _body(receive)
        headers = dict(scope["headers"])
        key = headers.get(IDEMPOTENCY_KEY.encode(), b"").decode("latin-1")[:_LONGEST_KEY] or None
        entry.request_type = headers.get(_TYPE, b"").decode("latin-1")[:200]
        if body is not None:
            entry.request, entry.request_bytes = b64encode(body).decode(), len(body)
        found = await self._store.recordings.admit(sandbox_id, entry, key, name in REPLAYED)
        while isinstance(found, Head):
            repeated = await self._repeated(sandbox_id, found, entry)
            if repeated is not None:
                await _answer(repeated).send(send)
                return
            found = await self._store.recordings.admit(sandbox_id, entry, key, False)
        if isinstance(found, RecordedEntry):
            if _answers(found):
                await _answer(found).send(send)
                return
            entry = found
        else:
            entry.number = found or 0
        await faults.point("proxy.recorded.begun")
        if entry.number == 0:  # the recording is full
            await forward(scope, receive, send)
            return
        await forward(scope, receive, _Recorded(send, entry, lambda: self._finish(sandbox_id, entry)))

    async def _finish(self, sandbox_id: str, entry: RecordedEntry) -> None:
        entry.finished_at = time.time()
        await self._store.recordings.finish(sandbox_id, entry)
        await faults.point("proxy.recorded.finished")

    # ---- repetition ----

    async def _repeated(self, sandbox_id: str, head: Head, entry: RecordedEntry) -> RecordedEntry | None:
        """The recorded entry that is equal to this request to a sandbox that repeats a recording. None ends that."""
        repeat = self._repeats.get(sandbox_id)
        if repeat is None:
            assert head.repeats is not None
            repeat = self._repeats[sandbox_id] = _Repeat(self._store, sandbox_id, head.repeats, head.repeated)
        found = await repeat.next(entry)
        if found is None:
            self._repeats.pop(sandbox_id, None)
        return found


class _Repeat:
    """The place in a recording up to which a client has repeated its requests."""

    def __init__(self, store: Store, sandbox_id: str, source: str, number: int) -> None:
        self._store = store
        self._sandbox_id = sandbox_id
        self._source = source
        self._number = number
        self._ahead: deque[RecordedEntry] = deque()

    async def next(self, asked: RecordedEntry) -> RecordedEntry | None:
        """The next entry, if the request is equal to it. None ends the repetition."""
        while True:
            if not self._ahead:
                self._ahead.extend(await self._store.recordings.list(self._source, self._number, PAGE))
            if not self._ahead:  # the client has repeated all of it
                await self._store.recordings.advance(self._sandbox_id, self._number, self._number + 1)
                return None
            entry = self._ahead.popleft()
            if entry.route in REPLAYED or entry.route in READS:
                break
            self._number = entry.number
        answer: RecordedEntry | None = entry
        if not _answers(entry):  # in progress at the end of its sandbox: the replay may have its response
            key = replay_key(self._source, entry.number)
            answer = await self._store.recordings.known(self._sandbox_id, key)
        same = entry.route == asked.route and without_id(entry.target) == without_id(asked.target) and \
            entry.request is not None and asked.request is not None and \
            canonical(entry.route, b64decode(entry.request)) == canonical(asked.route, b64decode(asked.request))
        if not same or answer is None or not _answers(answer):
            await self._store.recordings.advance(self._sandbox_id, self._number, entry.number)
            return None
        self._number = entry.number
        await self._store.recordings.advance(self._sandbox_id, self._number, None)
        return answer


# ---- messages ----

class _Recorded:
    """Forwards a response, and holds its end until it is recorded. If that fails, the client gets the error instead: a
    repetition of the request gets the response of the worker."""

    def __init__(self, send: Send, entry: RecordedEntry, finish: Callable[[], Awaitable[None]]) -> None:
        self._send = send
        self._entry = entry
        self._finish = finish
        self._parts: list[bytes] = []
        self._size = 0
        self._code = b""
        self._start: MutableMapping[str, Any] | None = None  # held until there is a part of the body
        self._length: int | None = None  # Content-Length: a client has the response with its last byte
        self._last = b""  # the part with that byte, which is held until the response is recorded
        self._refused = False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        entry = self._entry
        if self._refused:
            return
        if message["type"] == "http.response.start":
            entry.status = int(message["status"])
            self._code = next((value for name, value in message["headers"] if name.lower() == b"x-rock-error"), b"")
            lines = [name.decode("latin-1") + ": " + value.decode("latin-1")
                     for name, value in message["headers"] if name.lower() in _KEPT]  # fmt: skip
            entry.response_type = "\n".join(lines)[:1000]
            length = next((value for name, value in message["headers"] if name.lower() == b"content-length"), b"")
            self._length = int(length) if length.isdigit() and len(length) < 20 else None
            self._start = message
            return
        if message["type"] == "http.response.body":
            part = bytes(message.get("body", b""))
            self._size += len(part)
            if self._size <= LARGEST_RESPONSE:
                self._parts.append(part)
            else:
                self._parts.clear()
            if message.get("more_body", False) and self._length is not None and self._size >= self._length:
                self._last += part
                return
            if not message.get("more_body", False) and self._code not in _NOT_DONE:
                entry.response_bytes = self._size
                whole = self._size <= LARGEST_RESPONSE
                entry.response = b64encode(b"".join(self._parts)).decode() if whole else None
                try:
                    await self._finish()
                except RockError as error:
                    if self._start is None:
                        raise ConnectionAbortedError("a response that began could not be recorded") from error
                    self._refused = True
                    await failure(error).send(self._send)
                    return
        if self._start is not None:
            start, self._start = self._start, None
            await self._send(start)
        if self._last:
            message, self._last = {**message, "body": self._last + bytes(message.get("body", b""))}, b""
        await self._send(message)


async def _body(receive: Receive) -> tuple[bytes | None, Receive]:
    """The body of a request, and its messages again. None for one that is larger than the limit."""
    messages: deque[Any] = deque()
    parts: list[bytes] = []
    size, whole = 0, False
    while not whole and size <= LARGEST_REQUEST:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request":
            break
        part = bytes(message.get("body", b""))
        parts.append(part)
        size += len(part)
        whole = not message.get("more_body", False)

    async def again() -> Any:
        return messages.popleft() if messages else await receive()

    return b"".join(parts) if whole and size <= LARGEST_REQUEST else None, again


def _answers(entry: RecordedEntry) -> bool:
    """Whether an entry has a whole response."""
    return entry.status is not None and entry.finished_at is not None and entry.response is not None


def _answer(entry: RecordedEntry) -> Answer:
    """The recorded response."""
    if entry.response is None or entry.status is None:
        return failure(Unavailable(f"the response of entry {entry.number} is not recorded", hint="replay it"))
    pairs = [line.split(": ", 1) for line in entry.response_type.split("\n") if ": " in line]
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs]
    kind = next((value for name, value in headers if name.lower() == _TYPE), b"application/json")
    others = [(name, value) for name, value in headers if name.lower() != _TYPE]
    return Answer(b64decode(entry.response), entry.status, kind, headers=others)


def _target(scope: Scope) -> str:
    query: bytes = scope.get("query_string", b"")
    return str(scope["path"]) + (f"?{query.decode('latin-1')}" if query else "")


async def _nowhere(request: Any) -> Answer:
    raise AssertionError("the table is used for names only")
