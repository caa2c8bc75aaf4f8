"""Creates that come close together go to their worker in one request, and each is answered as soon as it is made.

    create, create, create ──► PUT /node/v1/sandboxes ──► a frame for each, in the order in which they are done

The first of them goes at once. While a request has had no answer yet those that come wait for one, a moment at most, so
that a single create waits for nothing and a burst has few requests. In a crowd, where each is one of hundreds that are
under way at all workers, they wait a longer moment until some are together: a part of what the crowd costs them anyway,
while a request of its own costs both sides more than what it asks for. Whatever fails with the request itself is asked
for again one by one: a create is idempotent, and a worker of an older release knows no other way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextvars import Context, ContextVar

import orjson

from rock.errors import RockError, Unavailable, from_wire
from rock.protocol.node import MOST_CREATES, NodeSandbox
from rock.protocol.routes import OUTAGE, ROUTES, SENT, Frame, FrameParser
from rock.protocol.sandbox import SandboxConfig, travelling

# ---- transports ----
#
# How requests get to a worker.

FENCE: ContextVar[int | None] = ContextVar("fence", default=None)
"""The token of the lease by which a command is given; None for what a client asked for."""

Transport = Callable[[str, str, str, bytes], Awaitable[tuple[int, bytes]]]  # method, path, query, body
# the same with a body as it comes, or one that is whole; what it gives is the status, then the answer as it comes
StreamTransport = Callable[[str, str, str, AsyncIterator[bytes] | None, bytes], AsyncGenerator[int | bytes]]


# ---- bulk ----
#


log = logging.getLogger("rock.admin")

_MOMENT = 0.01  # seconds for which those wait that come while a request has had no answer
_CROWDED = 100  # creates under way
_EACH = 0.0002  # seconds for each create under way, for which those of a crowd wait
_LONGEST = 0.2  # and at most
_ENOUGH = 8  # creates for which no more are waited for
_MOST_REQUESTS = 500  # at once; some may take minutes, to pull an image
_UNKNOWN = (404, 405)  # what an older worker answers

Made = asyncio.Future[NodeSandbox | bool]  # a bool: it is unknown; whether the worker may have made it


class CreateBatch:
    """Creates that are under way at all workers of a server, and how many those are."""

    def __init__(self) -> None:
        self.size = 0
        self.workers = 0

    @property
    def moment(self) -> float:
        """Seconds for which a create waits for others to its worker; 0 where there is no crowd, or none for each."""
        return min(_LONGEST, self.size * _EACH) if self.size >= max(_CROWDED, 2 * self.workers) else 0.0


class CreateBatcher:
    """The creates of one worker. streams: carries a request whose answer comes in pieces. alone: creates one. crowd: of
    the server, to which they count."""

    def __init__(
        self, name: str, streams: StreamTransport, alone: Callable[[str, SandboxConfig], Awaitable[NodeSandbox]],
        crowd: CreateBatch | None = None,
    ) -> None:  # fmt: skip
        self._name = name
        self._streams = streams
        self._alone = alone
        self._crowd = crowd or CreateBatch()
        self._crowd.workers += 1
        self._waiting: dict[str, tuple[SandboxConfig, Made]] = {}
        self._asking: set[asyncio.Task[None]] = set()
        self._silent = 0  # requests without an answer
        self._due: asyncio.Handle | None = None
        self._known = True  # the worker knows this way
        self._closed = False

    async def close(self) -> None:
        """Nobody is asked any more; who waits is told that the worker is lost."""
        if not self._closed:
            self._crowd.workers -= 1
        self._closed = True
        if self._due is not None:
            self._due.cancel()
        for _, made in self._waiting.values():
            _set(made, False)
        self._waiting.clear()
        for task in list(self._asking):
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)

    async def create(self, sandbox_id: str, config: SandboxConfig) -> NodeSandbox:
        """Make one. Errors as they were raised there."""
        full = len(self._asking) >= _MOST_REQUESTS
        # What is done by a lease carries its token, in a request of its own.
        if not self._known or full or FENCE.get() is not None or sandbox_id in self._waiting:
            return await self._alone(sandbox_id, config)
        if self._closed:
            raise self._lost()
        made: Made = asyncio.get_running_loop().create_future()
        self._waiting[sandbox_id] = config, made
        self._crowd.size += 1
        try:
            self._arm()
            found = await made
        except asyncio.CancelledError:
            if (entry := self._waiting.get(sandbox_id)) is not None and entry[1] is made:
                del self._waiting[sandbox_id]
            raise
        finally:
            self._crowd.size -= 1
        if isinstance(found, NodeSandbox):
            return found
        if self._closed:
            raise self._lost(sent=found)
        try:
            return await self._alone(sandbox_id, config)
        except Unavailable as error:
            if found and error.details.get("unsent"):
                raise Unavailable(error.message, hint=error.hint, details=SENT) from None
            raise

    def _lost(self, sent: bool = False) -> Unavailable:
        return Unavailable(f"worker {self._name} was lost while it was asked", hint="retry",
                           details=SENT if sent else OUTAGE)  # fmt: skip

    def _arm(self, now: bool = False) -> None:
        """See that those who wait are asked for."""
        count = len(self._waiting)
        now = now or count == MOST_CREATES
        moment = 0.0 if now else _MOMENT if self._silent else 0.0
        if not now and (crowded := self._crowd.moment):
            now = count == _ENOUGH
            moment = 0.0 if count >= _ENOUGH else crowded
        if self._due is not None:
            if not now:
                return
            self._due.cancel()
        loop = asyncio.get_running_loop()
        self._due = loop.call_later(moment, self._flush) if moment else loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._due = None
        if not self._waiting or self._closed:
            return
        batch = dict(list(self._waiting.items())[:MOST_CREATES])
        for sandbox_id in batch:
            del self._waiting[sandbox_id]
        self._silent += 1
        # Of no request, and of none of their contexts.
        task = asyncio.create_task(self._ask(batch), name=f"creates at {self._name}", context=Context())
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
        if self._waiting:
            self._arm(now=True)

    def _heard(self) -> None:
        self._silent -= 1
        if self._waiting and not self._silent and not self._crowd.moment:
            self._arm(now=True)

    async def _ask(self, batch: dict[str, tuple[SandboxConfig, Made]]) -> None:
        row, heard, sent, left = ROUTES["node_create_many"], False, True, dict(batch)
        try:
            reply = self._streams(row.method, row.path, "", None, _body(batch))
            async with contextlib.aclosing(reply):
                status, parser = await anext(reply), FrameParser()
                if status != 200:
                    self._known = status not in _UNKNOWN
                    sent = status not in (*_UNKNOWN, Unavailable.status)  # these refuse the request as a whole
                    return
                async for part in reply:
                    assert isinstance(part, bytes)
                    for kind, payload in parser.feed(part):
                        _tell(left, kind, payload)
                    if not heard:
                        heard = True
                        self._heard()
        except (RockError, ValueError) as error:
            log.info("creates at %s: %s", self._name, error)
            sent = not (isinstance(error, Unavailable) and error.details.get("unsent"))
        finally:
            for _, made in left.values():
                _set(made, sent)
            if not heard:
                self._heard()


def _body(batch: dict[str, tuple[SandboxConfig, Made]]) -> bytes:
    """A NodeCreates. What is the same for many is written once."""
    places: dict[bytes, int] = {}
    sandboxes = []
    for sandbox_id, (config, _) in batch.items():
        sandboxes.append((sandbox_id, places.setdefault(travelling(config), len(places))))
    return b'{"configs":[%s],"sandboxes":%s}' % (b",".join(places), orjson.dumps(sandboxes))


def _tell(left: dict[str, tuple[SandboxConfig, Made]], kind: Frame, payload: bytes) -> None:
    """Pass on what came of one. ValueError for what is none of it."""
    if kind is Frame.RESULT:
        found = NodeSandbox.model_validate_json(payload)
        entry = left.pop(found.sandbox_id, None)
        if entry is not None:
            _set(entry[1], found)
        return
    told = orjson.loads(payload)
    entry = left.pop(str(told.get("sandbox_id")), None) if isinstance(told, dict) else None
    if entry is not None and not entry[1].done():
        entry[1].set_exception(from_wire(told))


def _set(made: Made, found: NodeSandbox | bool) -> None:
    if not made.done():
        made.set_result(found)
