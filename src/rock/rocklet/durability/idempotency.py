"""Idempotent requests: each idempotency key is executed once, and work ends when all its clients have disconnected."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from rock.errors import Conflict, RockError
from rock.http.asgi import Answer, Disconnected, Request, failure
from rock.http.event_loop import settled
from rock.protocol.routes import IDEMPOTENCY_KEY
from rock.rocklet.commands.handover import ended_with_client
from rock.rocklet.durability import resume
from rock.rocklet.sandbox import Supervisor
from rock.settings import RECONNECT_TIMEOUT

_KEY = IDEMPOTENCY_KEY.encode()
_REMEMBERED = 2_000  # responses that are retained however old they are
_REMEMBERED_SIZE = 64 << 20  # bytes of all retained responses
_RETRIED = 3.0  # reconnect periods for which a key is retained at least
_PROMPT = 0.5  # seconds after which the connection of the client is watched
_GRACE = 1.0  # seconds for a client with a broken connection to repeat the request with the same key

Place = tuple[str, str]


@dataclass
class _Work:
    """Work in progress, and the number of requests that wait for it."""

    task: asyncio.Task[Answer]
    waiting: int = 0


def _place(request: Request) -> Place | None:
    """The identity of a request with a key; the same key on another path is another request."""
    key = request.header(_KEY)
    return None if key is None else (str(request.scope["path"]), key)


def _dropped() -> Answer:
    return failure(Conflict(
        "this was done, and its answer was dropped to free memory",
        hint="look what it did; write large output to a file"))  # fmt: skip


def place_of(request: Request) -> str | None:
    """The same identity as text, for the journal."""
    place = _place(request)
    return None if place is None else "\n".join(place)


class IdempotentCalls:
    """Responses by idempotency key: a repeated request gets the first response and has no second effect."""

    def __init__(self, reconnect: float = RECONNECT_TIMEOUT) -> None:
        """reconnect: seconds during which a client may retry."""
        self._kept = _RETRIED * max(reconnect, 1.0)
        self._running: dict[Place, _Work] = {}  # never removed before the work has ended, however long it takes
        self._answers: OrderedDict[Place, tuple[float, Answer]] = OrderedDict()  # with the time of each
        self._whole: OrderedDict[Place, int] = OrderedDict()  # sizes of the responses that still have their body
        self._size = 0
        self._streams: OrderedDict[Place, float] = OrderedDict()

    def first(self, request: Request) -> None:
        """Accept a streamed request once per key: Conflict when the key was accepted before."""
        place = _place(request)
        if place is None:
            return
        if place in self._streams:
            raise Conflict(
                "a request with this key was begun already, and its answer was a stream, which is not kept",
                hint="look what it did; ask without ?stream=1 for an answer that can be had again",
            )
        now = self._streams[place] = time.monotonic()
        while len(self._streams) > _REMEMBERED and next(iter(self._streams.values())) < now - self._kept:
            self._streams.popitem(last=False)

    async def do(self, request: Request, work: Coroutine[Any, Any, Answer], *, abandon: bool = False) -> Answer:
        """The response of `work`, which is awaited once per key.

        abandon: cancel the work when every client that waits for it has disconnected. Otherwise the work is finished.
        """
        place = _place(request)
        if place is not None and (known := self._answers.get(place)) is not None:
            work.close()
            return known[1]
        entry = None if place is None else self._running.get(place)
        if entry is None:
            entry = _Work(asyncio.ensure_future(work))
            if place is not None:
                self._running[place] = entry
                entry.task.add_done_callback(lambda task: self._finished(place, task))
        else:
            work.close()
        entry.waiting += 1
        try:
            await settled(entry.task, _PROMPT)
            if abandon and not entry.task.done():
                await self._watch(entry, request, 0.0 if place is None else _GRACE)
            return entry.task.result() if entry.task.done() else await asyncio.shield(entry.task)
        except BaseException:
            if entry.waiting == 1 and not entry.task.done():
                entry.task.cancel()
                await asyncio.wait({entry.task})
            raise
        finally:
            entry.waiting -= 1

    async def call(self, sandbox: Supervisor, request: Request, work: Callable[[], Awaitable[Answer]]) -> Answer:
        """The response of a short operation in a sandbox, executed once per key, also across a crash."""

        async def journaled() -> Answer:
            with sandbox.active():
                return await resume.done_once(sandbox, place_of(request), work)

        return await self.do(request, journaled())

    async def _watch(self, entry: _Work, request: Request, grace: float) -> None:
        """Return when the work is done; Disconnected when its client has disconnected and no other request waits for
        it."""
        gone = asyncio.ensure_future(request.disconnected())
        try:
            await asyncio.wait({entry.task, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if not entry.task.done():
            await asyncio.wait({entry.task}, timeout=grace)
            raise Disconnected

    def _finished(self, place: Place, task: asyncio.Task[Answer]) -> None:
        del self._running[place]
        if task.cancelled():
            self._remember(place, failure(ended_with_client()))
            return
        error = task.exception()
        if error is None:
            self._remember(place, task.result())
        elif isinstance(error, RockError) and not error.retryable:
            self._remember(place, failure(error))

    def _remember(self, place: Place, reply: Answer) -> None:
        now = time.monotonic()
        self._answers[place] = (now, reply)
        self._whole[place] = len(reply.body)
        self._size += len(reply.body)
        while len(self._answers) > _REMEMBERED and next(iter(self._answers.values()))[0] < now - self._kept:
            old, _ = self._answers.popitem(last=False)
            self._size -= self._whole.pop(old, 0)
        while self._size > _REMEMBERED_SIZE and len(self._whole) > 1:  # the key is retained without the body
            old, size = self._whole.popitem(last=False)
            self._size -= size
            self._answers[old] = (self._answers[old][0], _DROPPED)


_DROPPED = _dropped()
