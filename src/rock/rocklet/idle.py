"""Descriptors of idle sandboxes: one task for all sandboxes of a worker closes those that a sandbox does not need.

A session holds three or four streams of its shell, and the spool folder up to five files. They are closed when the
sandbox had no request for ROCK_IDLE_AFTER seconds, or earlier when many sandboxes hold theirs. The next request opens
them again, at the cost of one request to pid 1. See decision 73.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from rock.host import resources
from rock.http.event_loop import settled

log = logging.getLogger("rock.node")
AFTER = 30.0  # seconds without a request
_EACH = 12  # descriptors of a sandbox with a session that is in use
_AT_ONCE = 8
_SHORT = 0.02
_PERIOD = 0.5  # seconds between two rounds while descriptors are open
_AGAIN = 5.0  # seconds after which a sandbox is tried again that could not close its descriptors


class Descriptors(Protocol):
    """A sandbox whose descriptors can be closed. last_active: time.monotonic() of its last request."""

    @property
    def id(self) -> str: ...

    @property
    def is_in_use(self) -> bool: ...

    @property
    def last_active(self) -> float: ...

    async def close_descriptors(self) -> bool:
        """Close what is not needed; False when a part stays open."""
        ...


class IdleDescriptors:
    """The sandboxes that hold descriptors of sessions, the one without requests for the longest time first.

    most: number of sandboxes above which idle ones close theirs at once; None derives it from the limit of the process.
    """

    def __init__(self, after: float = AFTER, most: int | None = None) -> None:
        self._after = after
        self._most = most
        self._open: dict[Descriptors, float] = {}  # and the time before which it is not tried
        self._added = asyncio.Event()
        self._soon: asyncio.Future[None] | None = None  # ends the wait between two rounds
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin. Idempotent."""
        if self._most is None:
            files = resources.open_files()
            self._most = 1 << 20 if files is None else max(4, files // resources.ACTIVE_FILES // _EACH)
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="idle-descriptors")

    async def close(self) -> None:
        """End the task; the descriptors stay as they are."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._open.clear()

    def note(self, sandbox: Descriptors) -> None:
        """A sandbox was used: it holds descriptors now."""
        self._open.pop(sandbox, None)
        self._open[sandbox] = 0.0
        if len(self._open) == 1:
            self._added.set()
        elif self._soon is not None and len(self._open) > (self._most or 0) and not self._soon.done():
            self._soon.set_result(None)

    def forget(self, sandbox: Descriptors) -> None:
        """A sandbox ends."""
        self._open.pop(sandbox, None)

    async def _run(self) -> None:
        while True:
            if not self._open:
                self._added.clear()
                await self._added.wait()
            if len(self._open) <= (self._most or 0):
                self._soon = asyncio.get_running_loop().create_future()
                await settled(self._soon, _PERIOD)
                self._soon = None
            else:
                await asyncio.sleep(_SHORT)  # those in use may be too many by themselves
            due = self._due()
            for first in range(0, len(due), _AT_ONCE):
                await asyncio.gather(*map(self._close_one, due[first:first + _AT_ONCE]))

    def _due(self) -> list[Descriptors]:
        found: list[Descriptors] = []
        now = time.monotonic()
        more = len(self._open) - (self._most or 0)
        for sandbox, again in list(self._open.items()):
            if sandbox.is_in_use or again > now:
                continue
            if now - sandbox.last_active < self._after and len(found) >= more:
                break  # the others were used later
            found.append(sandbox)
        return found

    async def _close_one(self, sandbox: Descriptors) -> None:
        used, closed = sandbox.last_active, False
        try:
            closed = await sandbox.close_descriptors()
        except Exception:
            log.exception("the descriptors of sandbox %s stay open", sandbox.id)
        if sandbox in self._open and sandbox.last_active == used and not sandbox.is_in_use:
            if closed:
                del self._open[sandbox]
            else:
                self._open[sandbox] = time.monotonic() + _AGAIN
