"""The sandbox service: create, stop, list. Each change loads a record, decides, saves, then commands the worker.

records.py changes the records; starts.py runs the starts in progress; retention.py cleans up workers and operates on
stopped sandboxes. The service creates these parts, and passes each of them the parts and the functions that it uses.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from rock import faults
from rock.admin.pools import Pools
from rock.admin.sandboxes import lifecycle
from rock.admin.sandboxes.commits import Commits
from rock.admin.sandboxes.environment_hosts import EnvironmentHosts
from rock.admin.sandboxes.groups import Groups
from rock.admin.sandboxes.lifecycle import Effect, Event
from rock.admin.sandboxes.records import Records
from rock.admin.sandboxes.retention import Archive, Cleanup, RetainedSandboxes
from rock.admin.sandboxes.starts import CREATES, WAITS, Starts
from rock.admin.snapshots import Snapshots
from rock.admin.volumes import Volumes
from rock.admin.workers.client import Worker
from rock.admin.workers.placement import Placer
from rock.admin.workers.registry import WorkerRegistry
from rock.errors import Conflict, NoCapacity, RockError, Unavailable
from rock.protocol.action import ConnectionList
from rock.protocol.keys import Caller
from rock.protocol.node import NodeStatus, SandboxList
from rock.protocol.routes import NOTHING_BEGUN
from rock.protocol.sandbox import Cause, Phase, SandboxConfig, SandboxInfo, State
from rock.scheduler.base import Reservations, Scheduler
from rock.store.base import Query, Record, Store
from rock.store.blobs import Blobs

log = logging.getLogger("rock.admin")

_ELSEWHERE = 0.2  # seconds between two checks of a start on another server
_CLUSTER = 12.0  # seconds that a stop waits for a cluster that does not respond
_MOST_PLACED = 4  # workers that are tried for one sandbox before the create is rejected


class Service:
    """The control plane over a store, a scheduler and workers."""

    def __init__(
        self,
        store: Store,
        scheduler: Scheduler,
        workers: WorkerRegistry,
        blobs: Blobs | None = None,
        archive_limit: int = 64 << 30,
        reservations: Reservations | None = None,
        snapshot_ttl: float = 3600.0,
        capacity_wait: float = 0.0,
    ) -> None:
        self.store = store
        self.workers = workers
        self.records = Records(store)
        self.placer = Placer(scheduler, workers, reservations)
        self.volumes = Volumes(store, workers)
        self.cleanup = Cleanup(self.records, workers, reservations)
        self.archive = Archive(self.records, workers, self.cleanup, blobs, archive_limit)
        self.start_tasks = Starts(self.records, workers, self.placer, self.archive, capacity_wait)
        self._capacity_wait = capacity_wait
        started = self.start_tasks.waited
        self.kept = RetainedSandboxes(self.records, workers, self.cleanup, self.archive, self.stop, started)
        self.commits = Commits(self.records, workers, archive_limit)
        self.groups = Groups(store, self.placer, self.start_tasks, self.archive.check, self.resolve, self.stop)
        self.snapshots = Snapshots(store, self.records, workers, self.groups, snapshot_ttl)
        self.pools = Pools(store, workers, self.snapshots)
        self.envs = EnvironmentHosts(store, workers, self.placer, started, self.insert)
        # called with an id before a pause, and after a resume or a failed pause
        self.on_pausing: list[Callable[[str], Awaitable[None]]] = []
        self.on_continued: list[Callable[[str], None]] = []
        self.start_tasks.on_failed.append(self.groups.launch_failed)
        self.records.on_withdrawn.append(self.start_tasks.withdraw)
        self.records.on_effect[Effect.RELEASE].append(self._release)
        self.records.on_effect[Effect.LAUNCH].append(self.start_tasks.begin)
        self.records.on_effect[Effect.ARCHIVE].append(self.archive.begin)

    async def close(self) -> None:
        """Cancel the operations in progress; their records stay unchanged for the next start."""
        tasks = [*self.start_tasks.tasks(), *self.cleanup.tasks()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.start_tasks.queue.close()
        await self.groups.close()
        await self.snapshots.close()
        await self.volumes.close()
        await self.placer.close()
        await self.archive.close()
        await self.commits.close()

    def _release(self, record: Record) -> None:
        if record.state is not State.STOPPING:  # else `stop` waits for the cleanup itself
            self.cleanup.begin(record)

    # ---- create ----

    async def create(
        self, config: SandboxConfig, key: str | None, wait: float, caller: Caller, sandbox_id: str | None = None
    ) -> SandboxInfo:
        """Create a sandbox, or, for a known key of this tenant, return the existing one.

        Waits up to `wait` seconds for the start; a start that fails meanwhile raises its reason. sandbox_id: its id,
        where the config has none, so that the sandboxes of a burst share one config.
        """
        try:
            record = await self.insert(config, key, caller, sandbox_id)
        except RockError as error:
            # A sandbox that was created earlier may no longer fit now.
            known = await self.store.by_key(key, caller.owner) if key else None
            if known is None:
                CREATES.of("refused", error.code).add()
                raise
            record = known
            if record.state is State.PENDING:  # it may have been saved just now, by a store that then failed
                self.start_tasks.begin(record)
        info = await self.start_tasks.waited(record, wait)
        return await self._how_far(info) if wait > 0 and info.state is State.PENDING else info

    async def insert(
        self, config: SandboxConfig, key: str | None, caller: Caller, sandbox_id: str | None = None
    ) -> Record:
        """Insert the record of a new sandbox and start it."""
        self.archive.check(config)
        config = await self.resolve(config, caller.owner)
        sandbox_id = sandbox_id or config.sandbox_id or secrets.token_hex(16)
        record: Record | None = None
        try:
            worker, status, waits = None, None, None
            if self.placer.reservations is not None:
                await self.placer.check(config)
            else:
                try:
                    worker, status = await self._placed(sandbox_id, config)
                except (NoCapacity, Unavailable) as error:
                    if not self._capacity_wait or config.volumes or config.snapshot is not None:
                        raise
                    waits = error.message
            info = lifecycle.new_info(sandbox_id, config, worker.name if worker else None, status, caller.owner)
            if waits is not None:
                phase = Phase(status="waiting", message=f"waits for a worker: {waits}", started_at=info.created_at)
                info = info.model_copy(update={"phases": {WAITS: phase}})
            record = await self.store.insert(Record(info, config, key), caller.quota)
            await faults.point("create.saved")
            if record.state is State.PENDING:
                # not one found by its key
                self.start_tasks.begin(record, fresh=record.info.created_at == info.created_at)
            return record
        finally:
            if record is None or sandbox_id not in self.start_tasks:
                self.placer.landed(sandbox_id)

    async def resolve(self, config: SandboxConfig, owner: str) -> SandboxConfig:
        """The config with the ids and the worker of its volumes and its snapshot. NotFound, Conflict, InvalidConfig,
        Unsupported."""
        if config.volumes:
            config = await self.volumes.resolve(config, owner)
        if config.snapshot is not None:
            return await self.snapshots.resolve(config, owner)
        return config if config.snapshot_worker is None else config.model_copy(update={"snapshot_worker": None})

    async def _placed(self, sandbox_id: str, config: SandboxConfig) -> tuple[Worker, NodeStatus | None]:
        """A worker that accepts it. An unreachable worker, or one that rejects because of its lease, is skipped:
        `place` excludes it for a while."""
        for left in reversed(range(min(_MOST_PLACED, len(self.workers)) or 1)):
            worker = await self.placer.place(sandbox_id, config)
            try:
                await worker.check(config)
                return worker, self.placer.status(worker.name)
            except Unavailable as error:
                if not left or not any(error.details.get(name) is True for name in NOTHING_BEGUN):
                    raise
                log.info("worker %s does not take sandbox %s: %s", worker.name, sandbox_id, error.message)
                self.placer.landed(sandbox_id)
        raise AssertionError("the last try returns or raises")

    # ---- read ----

    async def get(self, sandbox_id: str, *, wait: float = 0.0, touch: bool = False, usage: bool = False) -> SandboxInfo:
        """Status, with the current report of its worker. `wait`: seconds, while it is pending."""
        record = await self.records.load(sandbox_id)
        if record.state is State.PENDING:
            record = await self.start_tasks.ended(record, wait)
            if record.state is State.PENDING and wait > 0 and record.id not in self.start_tasks:
                record = await self._started_elsewhere(record, wait)
            if record.state is State.PENDING:
                return await self._how_far(record.info)
        if record.state is not State.RUNNING:
            return record.info
        if self.workers.is_silent(record.info.worker or ""):
            return record.info.model_copy(update={"is_alive": False})
        try:
            found = await self.workers.required(record.info.worker).get(sandbox_id, touch=touch, usage=usage)
        except RockError as error:
            log.info("worker of %s: %s", sandbox_id, error)
            return record.info.model_copy(update={"is_alive": False})
        return lifecycle.seen(record, found)

    async def _how_far(self, info: SandboxInfo) -> SandboxInfo:
        """Adds the progress of the image from its worker, while the sandbox waits for it."""
        status = await self.workers.status(info.worker) if info.worker is not None else None
        words = status.fetching.get(info.image) if status is not None else None
        if words is None:
            return info
        image = Phase(status="running", message=words, started_at=info.created_at)
        return info.model_copy(update={"phases": {**info.phases, "image": image}})

    async def _started_elsewhere(self, record: Record, wait: float) -> Record:
        """The record once another server has started it, or after `wait` seconds."""
        end = time.monotonic() + wait
        while record.state is State.PENDING and (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(_ELSEWHERE, left))
            record = await self.records.load(record.id)
        return record

    async def connections(self, sandbox_id: str) -> ConnectionList:
        """Its connections, as stored by its worker. Unavailable when that does not respond."""
        record = await self.records.load(sandbox_id)
        worker = self.workers.get(record.info.worker or "")
        return await worker.connections(sandbox_id) if worker is not None else ConnectionList()

    async def list(self, query: Query, history: bool = False) -> SandboxList:
        """A page. `history`: include the state history, which is most of a record."""
        records = await self.store.list(query)
        last = records[-1].info if len(records) == query.limit else None
        items = [r.info if history else r.info.model_copy(update={"state_history": []}) for r in records]
        return SandboxList(
            items=items, next=f"{last.created_at!r}:{last.sandbox_id}" if last else None
        )

    # ---- pause ----

    async def pause(self, sandbox_id: str) -> SandboxInfo:
        """Stop its processes until it is resumed. Idempotent. Conflict when it does not run or has requests in
        progress; Unsupported by its runtime."""
        record, worker = await self._on_worker(sandbox_id, "paused")
        try:
            for hook in self.on_pausing:
                await hook(record.id)
            await worker.pause(record.id)
        except BaseException:
            self._continue(record.id)
            raise
        return await self._noted(record, time.time() if record.info.paused_at is None else record.info.paused_at)

    async def resume(self, sandbox_id: str) -> SandboxInfo:
        """Continue a paused sandbox. Idempotent."""
        record, worker = await self._on_worker(sandbox_id, "resumed")
        await worker.resume(record.id)
        self._continue(record.id)
        return await self._noted(record, None)

    def _continue(self, sandbox_id: str) -> None:
        for hook in self.on_continued:
            hook(sandbox_id)

    async def _on_worker(self, sandbox_id: str, what: str) -> tuple[Record, Worker]:
        record = await self.records.load(sandbox_id)
        if record.state is not State.RUNNING:
            raise Conflict(f"sandbox {sandbox_id} is {record.state.value}: it cannot be {what}", sandbox_id=sandbox_id,
                           hint="only a running sandbox can")  # fmt: skip
        worker = self.workers.get(record.info.worker or "")
        if worker is None:
            raise Unavailable(f"worker {record.info.worker} is not known here", sandbox_id=sandbox_id, hint="retry")
        return record, worker

    async def _noted(self, record: Record, paused_at: float | None) -> SandboxInfo:
        if record.info.paused_at != paused_at:
            record = await self.records.amend(record.id, when=State.RUNNING, paused_at=paused_at)
        return record.info

    # ---- deadline ----

    async def set_deadline(self, sandbox_id: str, deadline: float, fields: dict[str, Any]) -> SandboxInfo:
        """Replace the deadline of a sandbox that starts or runs, and change `fields` of its record. deadline: seconds
        since the epoch; 0 is never. Conflict in any other state."""
        record = await self.records.load(sandbox_id)
        if record.state in (State.PENDING, State.RUNNING):
            record = await self.records.amend(sandbox_id, when=record.state, deadline=deadline, **fields)
        if record.info.deadline != deadline:
            raise Conflict(f"sandbox {sandbox_id} is {record.state.value}: it has no deadline", sandbox_id=sandbox_id,
                           hint="only a sandbox that starts or runs has one")  # fmt: skip
        for begin in self.records.on_effect[Effect.SCHEDULE]:
            begin(record)
        return record.info

    # ---- stop ----

    async def stop(
        self, sandbox_id: str, cause: Cause = Cause.USER, reason: str = "stopped by its user"
    ) -> SandboxInfo:
        """Stop it and wait until its worker is cleaned up, except for retained files; a stopped one stays unchanged.

        Where a cluster makes a machine for each sandbox and does not respond, the result is `stopping`: the stop is
        accepted, and the leader completes it when the cluster responds."""
        record = await self.records.apply(sandbox_id, Event.STOP, cause=cause, reason=reason)
        if record.state is State.STOPPING:
            later = self.placer.exclusive
            try:
                async with asyncio.timeout(_CLUSTER if later else None):
                    record = await self.finish_stop(record)
            except (Unavailable, TimeoutError) as error:
                self.records.unfinished(sandbox_id)
                if not later:
                    raise
                log.warning("stop of %s: %r; it continues when the cluster responds", sandbox_id, error)
            except BaseException:
                self.records.unfinished(sandbox_id)
                raise
        return record.info

    async def finish_stop(self, record: Record) -> Record:
        if record.info.worker is None or self.placer.exclusive:
            await self.start_tasks.give_up(record.id)  # else it would make the machine, or be placed, later
        if record.info.archive is not None:
            return await self._give_up_restore(record)
        await faults.point("stop.saved")
        gone = await self.cleanup.once(record)
        await faults.point("stop.released")
        record = await self.records.apply(record.id, Event.DESTROYED, known=record)
        return await self.records.amend(record.id, **gone) if gone else record

    async def _give_up_restore(self, record: Record) -> Record:
        """Stop during a restore from the archive: the archive still exists."""
        await self.start_tasks.give_up(record.id)
        record = await self.records.load(record.id)
        if record.state is not State.STOPPING:
            return record
        worker = await self.workers.current(record.info.worker)
        if worker is not None:
            await worker.destroy(record.id)
        await faults.point("restore.given_up")
        return await self.records.apply(record.id, Event.RESTORE_FAILED, known=record)
