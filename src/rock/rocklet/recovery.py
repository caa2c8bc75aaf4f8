"""The recovery of the sandboxes of an earlier rocklet process, after a restart of the server.

    survey ── every record is read, resources without one are removed ──► all sandboxes are known
    found  ── attaches to the sessions and processes of one sandbox: at its first request, or in the background

Between the two steps a sandbox is *unattached*: it is listed, counted against the limits and protected against removal.
A request to it waits until it is attached.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from rock import faults
from rock.errors import Unavailable
from rock.host import atomic_file
from rock.protocol.node import NodeSandbox
from rock.protocol.routes import OUTAGE
from rock.protocol.sandbox import Cause, SandboxConfig
from rock.rocklet.durability import resume
from rock.rocklet.lifecycle import Ends
from rock.rocklet.retained import Quarantine, RetainedSandboxes
from rock.rocklet.runtimes import Runtimes
from rock.rocklet.sandbox import Supervisor
from rock.rocklet.snapshots import Snapshots
from rock.rocklet.state import StateDirectory
from rock.runtime.base import Handle, Liveness, Notes, Runtime

log = logging.getLogger("rock.node")

_AT_ONCE = 16  # sandboxes that are attached at the same time
_IN_BACKGROUND = 4  # of those, the maximum without a request
_WHILE_AWAY = "it ended while no server was running"


@dataclass(frozen=True)
class Unattached:
    """A sandbox whose pid 1 exists, and to which this rocklet process has no connection yet."""

    id: str
    config: SandboxConfig
    runtime: Runtime
    handle: Handle
    record: dict[str, Any]

    @property
    def spools(self) -> str:
        """The name of its spool folder."""
        return os.path.basename(str(self.record.get("spools") or ""))

    @property
    def serves_programs(self) -> bool:
        """Whether its programs wait for the rocklet: for a network connection or the gateway."""
        return "egress" in self.handle.data or bool(self.record.get("gateway_port"))

    def describe(self) -> NodeSandbox:
        return NodeSandbox(sandbox_id=self.id, alive=True, paused=bool(self.record.get("paused")),
                           isolation=self.handle.isolation, enforced=dict(self.handle.enforced),
                           runtime=self.handle.runtime)  # fmt: skip


class Recovery:
    """The recovery of a node, surveyed once when its runtimes are open. supervisors: of the node, to which attached
    sandboxes are added. supervise: makes the supervisor of a sandbox, with the name of its spool folder."""

    def __init__(
        self, state_dir: StateDirectory, runtimes: Runtimes, kept: RetainedSandboxes, quarantine: Quarantine,
        snapshots: Snapshots, ends: Ends, supervisors: dict[str, Supervisor],
        supervise: Callable[[str, SandboxConfig, Runtime, Handle, str | None], Supervisor],
    ) -> None:
        self._state_dir = state_dir
        self._runtimes = runtimes
        self._kept = kept
        self._quarantine = quarantine
        self._snapshots = snapshots
        self._ends = ends
        self._supervisors = supervisors
        self._supervise = supervise
        self._known: dict[str, list[str]] = {}  # ids by runtime
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self._later = False
        self._began = time.monotonic()
        self._attaching: dict[str, asyncio.Task[None]] = {}
        self._background: asyncio.Task[None] | None = None
        self._leaving = False
        self.unattached: dict[str, Unattached] = {}

    # ---- survey ----

    async def survey(self, *, later: bool) -> None:
        """Recover running and stopped sandboxes, and remove resources without a record. later: sandboxes whose runtime
        notes them at once stay unattached; `begin` attaches them."""
        self._known = {name: [] for name in self._runtimes.names()}
        self._later, self._began = later, time.monotonic()
        await asyncio.gather(*(self._guarded(sandbox_id, self._read(sandbox_id)) for sandbox_id in
                               self._state_dir.ids()))  # fmt: skip
        await faults.point("node.recovery.read")
        await self._runtimes.sweep(self._known)
        await asyncio.to_thread(self._state_dir.sweep_logs)
        used = {supervisor.spools.path.name for supervisor in self._supervisors.values()}
        unused = self._state_dir.unused(used | {one.spools for one in self.unattached.values()})
        if self._quarantine.ids():  # some resources may belong to quarantined sandboxes
            self._quarantine.spools = unused
        else:
            await asyncio.to_thread(self._state_dir.sweep, unused)

    async def _guarded(self, sandbox_id: str, work: Coroutine[Any, Any, None]) -> None:
        async with self._gate:
            try:
                await work
            except Exception as error:  # an unreadable record stays unchanged, for a server that can read it
                log.exception("sandbox %s could not be found again", sandbox_id)
                self._hold(sandbox_id, f"it could not be found again ({error!r})")

    def _hold(self, sandbox_id: str, why: str) -> None:
        """Quarantine a sandbox that cannot be used: its resources are removed only on request."""
        if not self._quarantine.add(sandbox_id, why):
            self._ends.tell(sandbox_id, Cause.LOST, f"{why}, and {_WHILE_AWAY}")
        for ids in self._known.values():
            ids.append(sandbox_id)

    async def _read(self, sandbox_id: str) -> None:
        try:
            config, handle, record = self._state_dir.load(sandbox_id)
            runtime = self._runtimes[handle.runtime]
        except OSError as error:
            self._hold(sandbox_id, f"its record on the server's disk cannot be read ({error.strerror})")
            return
        except atomic_file.Damaged as error:  # an unreadable record may be a newer server's
            log.error("the record of sandbox %s is damaged: %s", sandbox_id, error)
            self._hold(sandbox_id, "its record on the server's disk is damaged")
            return
        one = Unattached(sandbox_id, config, runtime, handle, record)
        if record.get("resting"):
            await self._recover_files(one)
        elif self._later and not self._inherits(record) and isinstance(runtime, Notes) \
                and runtime.note_running(handle):
            self._known[handle.runtime].append(handle.id)
            self.unattached[sandbox_id] = one
        else:
            await self._attach(one)

    @staticmethod
    def _inherits(record: dict[str, Any]) -> bool:
        """Whether a snapshot has sessions that this sandbox has not opened yet; until it is attached, nothing else
        shows that."""
        return record.get("inherited", [None])[0] is not None

    async def _recover_files(self, one: Unattached) -> None:
        """Recover the retained files of a sandbox that does not run, or remove what is left of it."""
        if one.config.keeps_files and await self._kept.recover(one.config, one.runtime, one.handle):
            await asyncio.to_thread(self._state_dir.remove_logs, one.id)
            self._known[one.handle.runtime].append(one.handle.id)
            return
        await one.runtime.destroy(one.handle)
        await asyncio.to_thread(self._state_dir.remove, one.id)

    # ---- attaching ----

    async def _attach(self, one: Unattached) -> None:
        if await one.runtime.recover(one.handle) is Liveness.GONE:
            why = "it ended before the server found it again" if one.id in self.unattached else _WHILE_AWAY
            self._ends.tell(one.id, Cause.LOST, why)
            await self._recover_files(one)
            if one.id in self.unattached and one.spools:  # the survey retained them
                await asyncio.to_thread(self._state_dir.sweep, [one.spools])
            return
        self._known[one.handle.runtime].append(one.handle.id)
        supervisor = self._supervise(one.id, one.config, one.runtime, one.handle, one.record.get("spools"))
        try:
            await resume.recover(supervisor, one.record)
        except BaseException:
            await supervisor.detach()
            raise
        if self._inherits(one.record):
            inherited = one.record["inherited"]
            self._snapshots.inherit(supervisor, inherited[0], inherited[1:])
        supervisor.idle_since(self._began)
        self._supervisors[one.id] = supervisor
        supervisor.begin_idle()
        log.info("found sandbox %s again, sessions: %s", one.id, supervisor.sessions.names())

    async def found(self, sandbox_id: str) -> None:
        """Return when a sandbox is attached, or is known to have ended; at once for all others. Unavailable while the
        server is stopping."""
        one = self.unattached.get(sandbox_id)
        if one is None:
            return
        task = self._attaching.get(sandbox_id)
        if task is None:
            if self._leaving:
                raise _stopping(sandbox_id)
            task = asyncio.create_task(self._attach_later(one), name=f"recover-{sandbox_id}")
            self._attaching[sandbox_id] = task
        await asyncio.wait({task})  # a caller that leaves does not cancel it
        if task.cancelled():
            raise _stopping(sandbox_id)
        task.result()

    async def _attach_later(self, one: Unattached) -> None:
        try:
            await faults.point("node.recovery.attach")
            await self._guarded(one.id, self._attach(one))
            self._ends.notify()
            del self.unattached[one.id]
        finally:
            del self._attaching[one.id]

    def begin(self) -> None:
        """Attach all unattached sandboxes in the background."""
        if self._background is None and self.unattached:
            self._background = asyncio.create_task(self._run(), name="recovery")

    async def _run(self) -> None:
        first = sorted(self.unattached.values(), key=lambda one: not one.serves_programs)
        rest = iter([one.id for one in first])

        async def attach_some() -> None:
            for sandbox_id in rest:
                await self.found(sandbox_id)

        await asyncio.gather(*(attach_some() for _ in range(_IN_BACKGROUND)))
        log.info("all %d sandboxes are attached after %.1f s", len(first), time.monotonic() - self._began)

    async def complete(self) -> None:
        """Attach all unattached sandboxes. Unavailable when the server stops meanwhile."""
        for sandbox_id in list(self.unattached):
            await self.found(sandbox_id)

    # ---- stop ----

    def let_go(self) -> None:
        """Attach to no further sandbox; requests that wait for one get Unavailable. Idempotent."""
        self._leaving = True
        if self._background is not None:
            self._background.cancel()
        for task in self._attaching.values():
            task.cancel()

    async def close(self) -> None:
        """End all tasks. Unattached sandboxes stay unchanged, for the next rocklet process."""
        self.let_go()
        tasks = [*self._attaching.values(), *([self._background] if self._background is not None else [])]
        await asyncio.gather(*tasks, return_exceptions=True)


def _stopping(sandbox_id: str) -> Unavailable:
    return Unavailable("the server is stopping; the sandbox continues", sandbox_id=sandbox_id, details=OUTAGE,
                       hint="send the request again once the server has restarted")
