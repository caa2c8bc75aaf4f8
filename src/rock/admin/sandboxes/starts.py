"""Starts in progress on this server: of new sandboxes, restarts, and restores from the archive."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from rock import faults
from rock.admin.sandboxes import lifecycle
from rock.admin.sandboxes.lifecycle import Event
from rock.admin.sandboxes.records import Records
from rock.admin.sandboxes.retention import Archive, archived_config
from rock.admin.workers.client import Worker
from rock.admin.workers.placement import Placer
from rock.admin.workers.registry import WorkerRegistry
from rock.admin.workers.start_queue import StartQueue, Ticket
from rock.errors import Lost, NoCapacity, RockError, SandboxError, Unavailable, from_wire, unexpected
from rock.http.event_loop import settled
from rock.protocol.node import NodeSandbox
from rock.protocol.routes import LOST_CONTACT, NOTHING_BEGUN
from rock.protocol.sandbox import Cause, SandboxInfo, State
from rock.settings import RECONNECT_TIMEOUT
from rock.store.base import Record, VersionConflict
from rock.telemetry import tracing
from rock.telemetry.metrics import REGISTRY

# ---- metrics ----

CREATES = REGISTRY.counter(
    "rock_sandbox_creates_total", "Sandboxes asked for: running, failed or refused, with the code of the error",
    "outcome", "cause",
)  # fmt: skip
STARTS = REGISTRY.histogram("rock_sandbox_start_seconds", "From a pending record to a running sandbox", "outcome")


# ---- starts ----


log = logging.getLogger("rock.admin")

WAITS = "worker"  # the phase of a start that waits for a worker
_BEFORE = 0.5  # seconds before the time limit of a start at which the wait for a worker ends
_MOST_REJECTIONS = 5  # full workers that a start tries after the first
_PAUSE, _LONGEST_PAUSE = 0.1, 1.0  # seconds between two attempts of a start whose worker is unreachable


class Starts:
    """One task per sandbox; the queue orders them. `Service.close` cancels them. on_failed: called with the record of a
    sandbox that could not be started. on_restarted: called with the id of a sandbox that runs again from its files,
    before its start has ended for its clients; it raises nothing."""

    def __init__(
        self, records: Records, workers: WorkerRegistry, placer: Placer, archive: Archive, capacity_wait: float = 0.0
    ) -> None:
        """capacity_wait: seconds that a sandbox without a worker waits for one."""
        self._records = records
        self._workers = workers
        self._placer = placer
        self._archive = archive
        self._capacity_wait = capacity_wait
        self.on_failed: list[Callable[[Record], None]] = []
        self.on_restarted: list[Callable[[str], Awaitable[None]]] = []
        self.queue = StartQueue(lambda: len(workers))
        self._tasks: dict[str, asyncio.Task[Record]] = {}
        self._waiting: dict[str, Ticket] = {}  # tickets of starts that have not begun
        self._late: set[asyncio.Task[None]] = set()  # that wait for requests of starts that failed by their time limit

    def __contains__(self, sandbox_id: str) -> bool:
        return sandbox_id in self._tasks

    def tasks(self) -> list[asyncio.Task[Any]]:
        return [*self._tasks.values(), *self._late]

    def begin(self, record: Record, fresh: bool = False) -> asyncio.Task[Record]:
        """Start a pending sandbox in the background; one task per sandbox.

        fresh: no worker has received it before, so that it may be placed again while none has begun with it.
        """
        task = self._tasks.get(record.id)
        if task is None:
            task = asyncio.create_task(self._launch(record, fresh), name=f"launch-{record.id}")
            self._tasks[record.id] = task
            task.add_done_callback(lambda done: self._launched(record.id, done))
        return task

    def _launched(self, sandbox_id: str, task: asyncio.Task[Record]) -> None:
        self._tasks.pop(sandbox_id, None)
        self._placer.landed(sandbox_id)
        if not task.cancelled() and task.exception() is not None:
            log.error("launch of %s: %r", sandbox_id, task.exception())
            self._records.unfinished(sandbox_id)

    async def _launch(self, record: Record, fresh: bool) -> Record:
        ticket = self.queue.ask(record.tenant, record.info.group is not None)
        try:
            if ticket.turn is not None:
                self._waiting[record.id] = ticket
                try:
                    begins = await ticket.turn
                finally:
                    del self._waiting[record.id]
                if not begins:
                    return await self._records.store.get(record.id) or record
            return await self._begun(record, fresh)
        finally:
            self.queue.leave(ticket)

    def withdraw(self, sandbox_id: str) -> None:
        """It is no longer pending: a queued start is canceled."""
        ticket = self._waiting.get(sandbox_id)
        if ticket is not None:
            self.queue.withdraw(ticket)

    async def _begun(self, record: Record, fresh: bool) -> Record:
        restored, began = record.info.archive is not None, time.monotonic()
        request: asyncio.Task[NodeSandbox] | None = None
        try:
            with tracing.span("start sandbox", {"rock.sandbox_id": record.id, "rock.image": record.config.image}):
                async with asyncio.timeout(record.config.startup_timeout):
                    worker = await self._worker_for(record)
                    await faults.point("launch.begun")
                    request = asyncio.create_task(self._started(worker, record, fresh))
                    await settled(request)
                    made = request.result()
                    await faults.point("launch.made")
        except asyncio.CancelledError:
            if request is not None:
                await _cancel(request)
            raise
        except TimeoutError:
            error: RockError = SandboxError(
                f"sandbox {record.id} did not start within {record.config.startup_timeout:g} s", sandbox_id=record.id
            )
        except RockError as raised:
            error = raised
        except Exception as raised:
            log.exception("launch of %s", record.id)
            error = unexpected(raised, record.id)
        else:
            CREATES.of("running", "").add()
            STARTS.of("running").observe(time.monotonic() - began)
            new = await self._records.apply(record.id, Event.LAUNCHED, known=record, **lifecycle.running(made))
            if restored and new.info.archive is None:
                await self._archive.forget(record.id)
            if (restored or record.info.kept) and new.state is State.RUNNING:
                for hook in self.on_restarted:
                    await hook(record.id)
            return new
        CREATES.of("failed", error.code).add()
        STARTS.of("failed").observe(time.monotonic() - began)
        wire = error.to_wire()
        wire["error"]["sandbox_id"] = record.id
        outstanding = request is not None and not request.done()
        new = await self._failed(record, error, wire, restored)
        if outstanding and request is not None:
            late = asyncio.create_task(self._answered_late(record, request), name=f"late-{record.id}")
            self._late.add(late)
            late.add_done_callback(self._late.discard)
        return new

    async def _failed(self, record: Record, error: RockError, wire: dict[str, Any], restored: bool) -> Record:
        if restored:
            return await self._records.apply(record.id, Event.RESTORE_FAILED, reason=error.message, error=wire)
        lost: dict[str, Any] = {"kept": False} if isinstance(error, Lost) else {}
        new = await self._records.apply(
            record.id, Event.LAUNCH_FAILED, cause=Cause.START_FAILED, reason=error.message, error=wire, **lost
        )
        for listener in self.on_failed:
            listener(new)
        return new

    async def _answered_late(self, record: Record, request: asyncio.Task[NodeSandbox]) -> None:
        """The end of a request that was outstanding when its start failed by its time limit. The removal of the sandbox
        may have overtaken it on the way to the worker, which has the sandbox then."""
        try:
            await asyncio.wait({request})
        except asyncio.CancelledError:
            await _cancel(request)
            raise
        if request.cancelled() or request.exception() is not None:
            return
        now = await self._records.store.get(record.id)
        if now is not None and (now.info.created_at != record.info.created_at or
                                now.state in (State.PENDING, State.RUNNING, State.ARCHIVING)):  # fmt: skip
            return  # it was started again since, and the worker has one sandbox with this id
        if now is not None and now.state is not State.DELETED:
            await self._records.apply(record.id, Event.LAUNCHED, known=now)  # which removes it
        elif (worker := self._workers.get((now or record).info.worker or "")) is not None:
            await worker.destroy(record.id)

    async def _worker_for(self, record: Record) -> Worker:
        """Its own worker, or for one from the archive any that fits; with an external scheduler the one that it
        names."""
        if self._placer.reservations is not None:
            worker = await self._placer.reserve(record)
        elif record.info.archive is None and record.info.worker is None:
            # Before the time limit of the start, so that the error states what is missing.
            seconds = min(self._capacity_wait, max(0.0, record.config.startup_timeout - _BEFORE))
            worker = await self._placer.awaited(record.id, record.config, seconds)
            await worker.check(record.config)
        elif record.info.archive is None:
            return self._workers.required(record.info.worker)
        else:
            worker = await self._placer.place(record.id, archived_config(record))
        if worker.name != record.info.worker:
            status = self._placer.status(worker.name) or await worker.status()
            phases = {name: phase for name, phase in record.info.phases.items() if name != WAITS}
            await self._records.amend(record.id, worker=worker.name, host_name=status.host_name,
                                      host_ip=status.host_ip, phases=phases)  # fmt: skip
        return worker

    async def _started(self, worker: Worker, record: Record, fresh: bool) -> NodeSandbox:
        """Start it, with retries over short outages of the worker, for at most RECONNECT_TIMEOUT seconds. A `fresh` one
        is placed on another worker when its worker is full, or is unreachable and cannot have made it."""
        if record.info.archive is not None:
            return await self._start(worker, record)
        end, pause = time.monotonic() + RECONNECT_TIMEOUT, _PAUSE
        moves = fresh and not record.info.gang and not record.info.kept and self._placer.reservations is None
        moves = moves and not record.config.volumes
        there: Worker | None = worker
        rejections = 0
        while True:
            try:
                if there is None:
                    there = self._workers.required(record.info.worker)
                return await self._start(there, record)
            except Unavailable as error:
                if not any(error.details.get(name) is True for name in LOST_CONTACT) or time.monotonic() + pause > end:
                    raise
                moves = moves and any(error.details.get(name) is True for name in NOTHING_BEGUN)
                log.warning("sandbox %s: %s; trying again", record.id, error.message)
                await asyncio.sleep(pause)
                pause, there = min(2 * pause, _LONGEST_PAUSE), None
                current = await self._records.load(record.id)
                if current.state is not State.PENDING:
                    raise
                record = await self._moved(current) if moves else current
            except NoCapacity as error:  # other sandboxes filled the worker since its last report
                rejections += 1
                if not moves or rejections > _MOST_REJECTIONS:
                    raise
                log.info("sandbox %s: worker %s: %s; placing it again", record.id, record.info.worker, error.message)
                await self._placer.refresh()
                current = await self._records.load(record.id)
                if current.state is not State.PENDING:
                    raise
                moved = await self._placed_again(current)
                if moved is None:
                    raise
                record, there = moved, None

    async def _moved(self, record: Record) -> Record:
        """The record of a pending sandbox, placed again; on its own worker too, when no other accepts it."""
        return await self._placed_again(record) or record

    async def _placed_again(self, record: Record) -> Record | None:
        """The record of a pending sandbox on a worker that has capacity now; None when there is none."""
        placer = self._placer
        placer.landed(record.id)
        try:
            worker = await placer.place(record.id, record.config)
            status = placer.status(worker.name)
            if worker.name == record.info.worker:
                return record
            await worker.check(record.config)
            where = {} if status is None else {"host_name": status.host_name, "host_ip": status.host_ip}
            return await self._records.store.put(record.changed(worker=worker.name, **where))
        except (RockError, VersionConflict) as error:  # the next attempt gets a clearer error
            log.info("sandbox %s is not placed again: %s", record.id, error)
            return None

    async def _start(self, worker: Worker, record: Record) -> NodeSandbox:
        """Start for the first time, or from retained files."""
        if record.info.archive is not None:
            return await self._archive.restore(worker, record)
        if record.info.kept:
            return await worker.wake(record.id, record.config)
        return await worker.create(record.id, record.config)

    async def waited(self, record: Record, wait: float) -> SandboxInfo:
        """The record after a start, after at most `wait` seconds; a failed start raises its reason."""
        record = await self.ended(record, wait)
        failed = record.info.cause is Cause.START_FAILED or record.state is State.ARCHIVED
        if failed and record.info.error:
            raise from_wire(record.info.error)
        return record.info

    async def ended(self, record: Record, wait: float) -> Record:
        """The record once the start has ended, or the unchanged one after `wait` seconds."""
        launch = self._tasks.get(record.id)
        if launch is not None and wait > 0:
            await settled(launch, wait)
            if launch.cancelled():  # it was stopped meanwhile
                return await self._records.load(record.id)
            if launch.done():
                return launch.result()
        return record

    def of(self, sandbox_id: str) -> asyncio.Task[Record] | None:
        """The task of its start, if that is in progress here."""
        return self._tasks.get(sandbox_id)

    async def give_up(self, sandbox_id: str) -> None:
        """Cancel a start in progress, and wait until it has ended."""
        launch = self._tasks.get(sandbox_id)
        if launch is not None:
            launch.cancel()
            await asyncio.wait({launch})


async def _cancel(request: asyncio.Task[NodeSandbox]) -> None:
    request.cancel()
    await asyncio.wait({request})
