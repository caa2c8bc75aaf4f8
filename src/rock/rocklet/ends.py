"""Sandboxes of this machine that ended by themselves."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict

from rock.errors import DiskFull, Exited, Expired, Lost, OutOfMemory, RockError
from rock.protocol.node import NodeEvent, NodeEvents
from rock.protocol.sandbox import Cause

_ERRORS: dict[Cause, type[RockError]] = {
    Cause.OUT_OF_MEMORY: OutOfMemory, Cause.DISK_FULL: DiskFull, Cause.EXITED: Exited, Cause.LOST: Lost}
_KEPT_EVENTS = 10_000
_KEPT_ENDS = 5_000


class Ends:
    """Each is an event for whoever follows what happens here, and the answer to who asks for the sandbox later.

    boot: the run of the server that the numbers of the events belong to. closing: nobody has to wait for an event.
    """

    def __init__(self, boot: str) -> None:
        self._boot = boot
        self.closing = False
        self._events: list[NodeEvent] = []
        self._number = 0
        self._changed = asyncio.Condition()
        self._ends: OrderedDict[str, tuple[Cause, str]] = OrderedDict()

    def tell(self, sandbox_id: str, cause: Cause, reason: str) -> None:
        """One ended; whoever waits is told by `notify`."""
        self._ends[sandbox_id] = (cause, reason)
        while len(self._ends) > _KEPT_ENDS:
            self._ends.popitem(last=False)
        self._number += 1
        self._events.append(NodeEvent(number=self._number, sandbox_id=sandbox_id, cause=cause, reason=reason,
                                      at=time.time()))  # fmt: skip
        del self._events[:-_KEPT_EVENTS]

    async def notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def forget(self, sandbox_id: str) -> None:
        """Another has its name now."""
        self._ends.pop(sandbox_id, None)

    def error(self, sandbox_id: str) -> RockError | None:
        """What to tell who asks for one that ended; None when it did not."""
        found = self._ends.get(sandbox_id)
        if found is None:
            return None
        cause, reason = found
        return _ERRORS.get(cause, Expired)(f"sandbox {sandbox_id} is gone: {reason}", sandbox_id=sandbox_id)

    async def since(self, after: int, wait: float) -> NodeEvents:
        """Events with a number above `after`; waits up to `wait` seconds for one."""
        try:
            async with asyncio.timeout(wait), self._changed:
                await self._changed.wait_for(lambda: self._number > after or self.closing)
        except TimeoutError:
            pass
        return NodeEvents(boot=self._boot, events=[event for event in self._events if event.number > after])
