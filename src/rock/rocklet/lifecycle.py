"""The creation of sandboxes on this machine, the ends of replaced ones, and ends as events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence

from rock import faults
from rock.errors import DiskFull, Exited, Expired, Lost, OutOfMemory, RockError, Unavailable
from rock.protocol.node import NodeEvent, NodeEvents
from rock.protocol.routes import OUTAGE
from rock.protocol.sandbox import Cause, Phase, SandboxConfig
from rock.rocklet.retained import RetainedSandboxes
from rock.rocklet.runtimes import Runtimes
from rock.rocklet.sandbox import Supervisor
from rock.runtime.base import Handle, Runtime
from rock.telemetry import tracing

log = logging.getLogger("rock.node")

# ---- creation ----

Made = tuple[Runtime, Handle, dict[str, Phase]]


async def make(runtimes: Runtimes, sandbox_id: str, config: SandboxConfig) -> Made:
    """Create a new sandbox, its image first."""
    runtime, began = runtimes.of(config), time.time()
    try:
        await runtimes.prepare_image(runtime, config)
        image = _done("on disk", began)
        began = time.time()
        with tracing.span("create sandbox", {"rock.sandbox_id": sandbox_id, "rock.runtime": runtime.name}):
            await faults.point("node.create.begun")
            handle = await runtime.create(sandbox_id, config)
            await faults.point("node.create.made")
    except RockError as error:
        error.sandbox_id = sandbox_id
        raise
    return runtime, handle, {"image": image, "sandbox": _done("running", began)}


async def wake_sandbox(kept: RetainedSandboxes, sandbox_id: str, config: SandboxConfig) -> Made:
    """Start a sandbox from its retained files."""
    began = time.time()
    await faults.point("node.wake.begun")
    runtime, handle = await kept.wake(sandbox_id, config)
    await faults.point("node.wake.made")
    return runtime, handle, {"image": Phase(status="success", message="on disk"), "sandbox": _done("running", began)}


def _done(message: str, began: float) -> Phase:
    return Phase.made(status="success", message=message, started_at=began, completed_at=time.time())


# ---- sandboxes that a rollback replaced ----


class Replaced:
    """The sandboxes that rollbacks have replaced, until they are removed: one for each id, which its successor has. A
    crash before that leaves them without a record, so the next start removes them."""

    def __init__(self) -> None:
        self._ending: dict[str, asyncio.Task[None]] = {}

    def tasks(self) -> Sequence[asyncio.Task[None]]:
        return list(self._ending.values())

    async def gone(self, sandbox_id: str) -> None:
        """Wait until the one is removed that the last rollback of this sandbox replaced."""
        if (task := self._ending.get(sandbox_id)) is not None:
            await asyncio.wait({task})

    async def end(self, old: Supervisor, *, whole: bool) -> None:
        """End one, and return when all its processes have ended. whole: when all of it is removed, with the output of
        its background processes; RockError then. Otherwise its files and limits are removed in the background."""
        task = self._ending[old.id] = asyncio.create_task(old.replaced(logs=whole), name=f"replaced-{old.id}")
        task.add_done_callback(lambda _: self._removed(old.id, task))
        if whole:
            await asyncio.shield(task)
            return
        ended = asyncio.create_task(old.runtime.wait(old.handle), name=f"end-of-replaced-{old.id}")
        try:
            await asyncio.wait({task, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done() and ended.exception() is not None:  # which tells nothing about its end
                await asyncio.wait({task})
        finally:
            ended.cancel()
            await asyncio.gather(ended, return_exceptions=True)

    def _removed(self, sandbox_id: str, task: asyncio.Task[None]) -> None:
        if self._ending.get(sandbox_id) is task:
            del self._ending[sandbox_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("what a rollback of %s replaced is not removed: %s; the next start tries again", sandbox_id,
                        error)


# ---- events of ends ----

_ERRORS: dict[Cause, type[RockError]] = {
    Cause.OUT_OF_MEMORY: OutOfMemory, Cause.DISK_FULL: DiskFull, Cause.EXITED: Exited, Cause.LOST: Lost}
_KEPT_EVENTS = 10_000
_KEPT_ENDS = 5_000


class Ends:
    """The sandboxes that ended by themselves. Each end is an event for followers, and the error of later requests to
    the sandbox.

    boot: the run of the server that the numbers of the events belong to.
    """

    def __init__(self, boot: str) -> None:
        self._boot = boot
        self._closing = False
        self._events: list[NodeEvent] = []
        self._number = 0
        self._changed = asyncio.Event()  # another one after each change
        self._ends: OrderedDict[str, tuple[Cause, str]] = OrderedDict()

    def tell(self, sandbox_id: str, cause: Cause, reason: str) -> None:
        """Record one end; `notify` wakes the waiting calls."""
        self._ends[sandbox_id] = (cause, reason)
        while len(self._ends) > _KEPT_ENDS:
            self._ends.popitem(last=False)
        self._number += 1
        self._events.append(NodeEvent(number=self._number, sandbox_id=sandbox_id, cause=cause, reason=reason,
                                      at=time.time()))  # fmt: skip
        del self._events[:-_KEPT_EVENTS]

    def notify(self) -> None:
        """Wake the waiting calls."""
        self._changed.set()
        self._changed = asyncio.Event()

    def let_go(self) -> None:
        """The server stops: calls that wait for events get Unavailable. Idempotent."""
        self._closing = True
        self.notify()

    def forget(self, sandbox_id: str) -> None:
        """Another sandbox uses the name now."""
        self._ends.pop(sandbox_id, None)

    def error(self, sandbox_id: str) -> RockError | None:
        """The error for a request to a sandbox that ended; None when it did not."""
        found = self._ends.get(sandbox_id)
        if found is None:
            return None
        cause, reason = found
        return _ERRORS.get(cause, Expired)(f"sandbox {sandbox_id} is gone: {reason}", sandbox_id=sandbox_id)

    async def since(self, after: int, wait: float, boot: str = "") -> NodeEvents:
        """Events with a number above `after`; waits up to `wait` seconds for one, but not if `boot` is another run: its
        numbers are not those of this one. Unavailable while the server stops: an empty response would be followed by
        the next request at once."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait if boot in ("", self._boot) else 0):
                while self._number <= after and not self._closing:
                    await self._changed.wait()
        if self._closing and self._number <= after:
            raise Unavailable("the worker is stopping; its sandboxes continue", details=OUTAGE,
                              hint="ask for its events again once it has restarted")
        return NodeEvents(boot=self._boot, events=[event for event in self._events if event.number > after])
