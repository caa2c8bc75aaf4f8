"""Requests that must not be done twice, and requests whose client went away."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from rock.errors import Conflict, RockError
from rock.protocol.routes import IDEMPOTENCY_KEY
from rock.wire.asgi import Answer, Disconnected, Request, failure
from rock.wire.waits import settled

_KEY = IDEMPOTENCY_KEY.encode()
_REMEMBERED = 2_000
_REMEMBERED_SIZE = 64 << 20  # bytes of all remembered answers
_PROMPT = 0.5  # seconds after which it is worth watching whether the client is still there
_GRACE = 1.0  # seconds for a client whose connection broke to ask again with the same key

Place = tuple[str, str]


@dataclass
class _Work:
    """What is being done, and how many requests wait for it."""

    task: asyncio.Task[Answer]
    waiting: int = 0


def _place(request: Request) -> Place | None:
    """What a request with a key is known by; a key means nothing on another path."""
    key = request.header(_KEY)
    return None if key is None else (str(request.scope["path"]), key)


def place_of(request: Request) -> str | None:
    """The same as text, for what is written down."""
    place = _place(request)
    return None if place is None else "\n".join(place)


class Once:
    """Answers by idempotency key: a request that was sent again gets the first one's answer and does nothing."""

    def __init__(self) -> None:
        self._running: dict[Place, _Work] = {}  # never forgotten before it has ended, however long it takes
        self._answers: OrderedDict[Place, Answer] = OrderedDict()
        self._size = 0
        self._streams: OrderedDict[Place, None] = OrderedDict()

    def first(self, request: Request) -> None:
        """Let a request through whose answer is a stream, once a key: Conflict when it was let through before."""
        place = _place(request)
        if place is None:
            return
        if place in self._streams:
            raise Conflict(
                "a request with this key was begun already, and its answer was a stream, which is not kept",
                hint="look what it did; ask without ?stream=1 for an answer that can be had again",
            )
        self._streams[place] = None
        while len(self._streams) > _REMEMBERED:
            self._streams.popitem(last=False)

    async def do(self, request: Request, work: Coroutine[Any, Any, Answer], *, abandon: bool = False) -> Answer:
        """The answer of `work`, which is awaited once a key.

        abandon: end the work by a cancellation when every client that waits for it has left. Else it is finished.
        """
        place = _place(request)
        if place is not None and place in self._answers:
            work.close()
            return self._answers[place]
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

    async def _watch(self, entry: _Work, request: Request, grace: float) -> None:
        """Return when the work is done; Disconnected when its client left and nobody else waits for it."""
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
            return
        error = task.exception()
        if error is None:
            self._remember(place, task.result())
        elif isinstance(error, RockError) and not error.retryable:
            self._remember(place, failure(error))

    def _remember(self, place: Place, reply: Answer) -> None:
        self._answers[place] = reply
        self._size += len(reply.body)
        while len(self._answers) > _REMEMBERED or (self._size > _REMEMBERED_SIZE and len(self._answers) > 1):
            self._size -= len(self._answers.popitem(last=False)[1].body)
