"""Batches of creates: concurrent creates for one worker share a request, and each gets its response at once.

    create, create, create ──► PUT /node/v1/sandboxes ──► a frame for each, in the order of completion

The first create is sent at once. While a request has no response yet, further creates wait for a moment at most, so
that a single create does not wait and a burst needs few requests. When hundreds of creates are in progress at all
workers, they wait longer until several are collected: that delay is a fraction of their duration, and a separate
request costs both sides more than the create itself. When a request fails as a whole, each create is repeated
separately: a create is idempotent, and a worker of an older release supports only single creates.
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
# The functions that send requests to a worker.

FENCE: ContextVar[int | None] = ContextVar("fence", default=None)
"""The token of the lease by which a command is given; None for what a client asked for."""

Transport = Callable[[str, str, str, bytes], Awaitable[tuple[int, bytes]]]  # method, path, query, body
# the same with a body that is a stream or bytes; it yields the status, then the response as it arrives
StreamTransport = Callable[[str, str, str, AsyncIterator[bytes] | None, bytes], AsyncGenerator[int | bytes]]


# ---- batches ----


log = logging.getLogger("rock.admin")

_MOMENT = 0.01  # seconds for which creates wait while a request has no response
_CROWDED = 100  # creates in progress
_EACH = 0.0002  # seconds of waiting per create in progress, when there are many
_LONGEST = 0.2  # maximum seconds of waiting
_ENOUGH = 8  # creates in a batch after which it is sent without further waiting
_MOST_REQUESTS = 500  # concurrent requests; some may take minutes, to pull an image
_UNKNOWN = (404, 405)  # statuses of an older worker

Made = asyncio.Future[NodeSandbox | bool]  # a bool: the outcome is unknown; whether the worker may have made it


class CreateBatch:
    """The number of creates in progress at all workers of a server."""

    def __init__(self) -> None:
        self.size = 0
        self.workers = 0

    @property
    def moment(self) -> float:
        """Seconds for which a create waits for others to its worker; 0 with few creates in progress."""
        return min(_LONGEST, self.size * _EACH) if self.size >= max(_CROWDED, 2 * self.workers) else 0.0


class CreateBatcher:
    """The creates of one worker. streams: sends a request with a streamed response. alone: creates one. crowd: counts
    the creates of the server."""

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
        self._silent = 0  # requests without a response
        self._due: asyncio.Handle | None = None
        self._known = True  # the worker supports batches
        self._closed = False

    async def close(self) -> None:
        """Send no more requests; waiting creates fail because the worker is lost."""
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
        """Create one sandbox. Raises the errors of the worker."""
        full = len(self._asking) >= _MOST_REQUESTS
        # A create under a lease has the fencing token, in a request of its own.
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
        """Schedule the next batch for the waiting creates."""
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
        # The task belongs to no request, and uses none of their contexts.
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
                    sent = status not in (*_UNKNOWN, Unavailable.status)  # these statuses reject the request as a whole
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
    """A NodeCreates. Equal configs are encoded once."""
    places: dict[bytes, int] = {}
    sandboxes = []
    for sandbox_id, (config, _) in batch.items():
        sandboxes.append((sandbox_id, places.setdefault(travelling(config), len(places))))
    return b'{"configs":[%s],"sandboxes":%s}' % (b",".join(places), orjson.dumps(sandboxes))


def _tell(left: dict[str, tuple[SandboxConfig, Made]], kind: Frame, payload: bytes) -> None:
    """Deliver one result. ValueError for an invalid frame."""
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
