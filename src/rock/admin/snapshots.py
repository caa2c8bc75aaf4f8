"""Snapshots: checkpoint, rollback, fork, retention, and resolution of their names in the config of a new sandbox.

    checkpoint  row "creating" ─► files on the worker ─► row "ready"
    delete      row "deleting" ─► files removed       ─► no row

Each step is idempotent. After a crash `settle` completes or undoes them, and removes files without a row. The worker
decides whether a layer is in use, because it alone starts sandboxes on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from rock import faults
from rock.admin.recordings import Recordings
from rock.admin.sandboxes.groups import Groups
from rock.admin.sandboxes.records import Records
from rock.admin.workers.client import Worker
from rock.admin.workers.registry import WorkerRegistry
from rock.errors import Conflict, InvalidConfig, NotFound, RockError, Unavailable
from rock.protocol.action import GroupRequest
from rock.protocol.keys import Caller
from rock.protocol.node import NodeSandbox
from rock.protocol.sandbox import SandboxConfig, SandboxInfo, State
from rock.protocol.snapshots import (
    CheckpointRequest,
    Forkable,
    ForkRequest,
    ForkResult,
    NodeCheckpoint,
    NodeImport,
    NodeSnapshot,
    SnapshotInfo,
)
from rock.store.base import Record, Store
from rock.store.snapshots import unknown

T = TypeVar("T")
log = logging.getLogger("rock.admin")

_FIXED = ("image", "image_os", "runtime", "isolation", "disk", "inodes", "snapshot", "snapshot_worker", "sandbox_id",
          "name")  # fmt: skip
_EVERY = 15.0  # seconds between two looks for expired snapshots
_REPORTED = ("memory", "files", "bytes", "layers", "paused_ms", "left_out", "parent")


class Snapshots:
    """The snapshots of all tenants. ttl: default retention after the last use, in seconds."""

    def __init__(self, store: Store, records: Records, workers: WorkerRegistry, groups: Groups,
                 ttl: float = 3600.0) -> None:
        self._store = store
        self._records = records
        self._workers = workers
        self._groups = groups
        self._ttl = ttl
        self.recordings = Recordings(store)
        self._tasks: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        """Cancel the operations in progress; the next start completes or undoes them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _whole(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of an operation that continues when its client disconnects."""
        task = asyncio.create_task(work, name="snapshot")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    # ---- checkpoint, rollback, fork ----

    async def checkpoint(self, sandbox_id: str, spec: CheckpointRequest, key: str | None) -> SnapshotInfo:
        """Take a snapshot of a running sandbox, or, for a known key of its tenant, return the existing one. Conflict,
        Unsupported, StorageFull, QuotaExceeded; the sandbox then continues unchanged."""
        return await self._whole(self._checkpoint(sandbox_id, spec, key))

    async def _checkpoint(self, sandbox_id: str, spec: CheckpointRequest, key: str | None) -> SnapshotInfo:
        record, worker = await self._running(sandbox_id, "takes no snapshots")
        now = time.time()
        info = SnapshotInfo(
            snapshot_id=secrets.token_hex(16), name=spec.name, tenant=record.tenant, worker=worker.name,
            sandbox_id=sandbox_id, image=record.info.image, state="creating", created_at=now, used_at=now,
            ttl_seconds=self._ttl if spec.ttl_seconds is None else spec.ttl_seconds,
        )  # fmt: skip
        row = await self._store.snapshots.add(info, key)
        if row.sandbox_id != sandbox_id:
            raise Conflict("the idempotency key belongs to a snapshot of another sandbox",
                           hint="use a new idempotency key")  # fmt: skip
        if row.state != "creating":
            return row
        await faults.point("snapshot.create.saved")
        try:
            before = await self.recordings.mark(record)
            made = await worker.checkpoint(sandbox_id, NodeCheckpoint(
                snapshot_id=row.snapshot_id, tenant=row.tenant, name=row.name, memory=spec.memory, files=spec.files,
                wait=spec.wait))  # fmt: skip
            await faults.point("snapshot.create.made")
            ready = await self._ready(row, made)
            await self.recordings.taken(record, ready, before)
            return ready
        except RockError:
            await self._store.snapshots.remove(row.snapshot_id)  # files without a row are removed by `settle`
            raise

    async def _ready(self, row: SnapshotInfo, made: NodeSnapshot) -> SnapshotInfo:
        ready = row.model_copy(update={"state": "ready", "used_at": time.time(),
                                       **{name: getattr(made, name) for name in _REPORTED}})  # fmt: skip
        await self._store.snapshots.save(ready)
        return ready

    async def rollback(self, sandbox_id: str, name: str) -> SandboxInfo:
        """Return a running sandbox to a snapshot of its tenant, by id or name. NotFound, Conflict, Unsupported; the
        sandbox then continues unchanged."""
        return await self._whole(self._rollback(sandbox_id, name))

    async def _rollback(self, sandbox_id: str, name: str) -> SandboxInfo:
        record, worker = await self._running(sandbox_id, "cannot be rolled back")
        row = await self._usable(record.tenant, name)
        if row.worker != worker.name:
            raise Conflict(f"snapshot {name} is on worker {row.worker}, and sandbox {sandbox_id} on {worker.name}",
                           sandbox_id=sandbox_id, hint="start a new sandbox from it: SandboxConfig(snapshot=...)")
        await self._store.snapshots.use(row.snapshot_id, time.time())
        await faults.point("snapshot.rollback.begun")
        back: NodeSandbox = await worker.rollback(sandbox_id, row.snapshot_id)
        await self.recordings.rolled_back(record, row.snapshot_id)
        await faults.point("snapshot.rollback.done")
        if record.info.paused_at is not None and not back.paused:
            record = await self._records.amend(sandbox_id, when=State.RUNNING, paused_at=None)
        return record.info

    async def forkable(self, sandbox_id: str) -> Forkable:
        """The level that a checkpoint of a running sandbox would have now. Conflict, Unsupported."""
        _, worker = await self._running(sandbox_id, "takes no snapshots")
        found = await worker.forkable(sandbox_id)
        return Forkable(memory=found.memory, reasons=found.reasons)

    async def fork(self, sandbox_id: str, spec: ForkRequest, key: str | None, caller: Caller,
                   allowed: Callable[[SandboxConfig], Awaitable[SandboxConfig]]) -> ForkResult:
        """Take one snapshot, and start `count` sandboxes from it as a group. allowed: checks what the caller may
        request."""
        config = await allowed(_config_of_children((await self._records.load(sandbox_id)).config, spec.changes))
        asked = CheckpointRequest(**spec.model_dump(include=set(CheckpointRequest.model_fields)))
        taken = await self.checkpoint(sandbox_id, asked, None if key is None else f"fork {key}")
        config = config.model_copy(update={"snapshot": taken.snapshot_id})
        request = GroupRequest(config=config, size=spec.count, mode="best_effort" if spec.best_effort else "gang")
        try:
            group = await self._groups.create(request, key, spec.start, caller)
        except RockError:
            if spec.name is None and key is None:  # no client has its id
                await self._discard(taken)
            raise
        return ForkResult(snapshot=taken, group=group)

    async def _discard(self, row: SnapshotInfo) -> None:
        try:
            await self._whole(self._delete(row))
        except RockError as error:  # its retention ends
            log.info("snapshot %s stays for now: %s", row.snapshot_id, error)

    async def _running(self, sandbox_id: str, what: str) -> tuple[Record, Worker]:
        record = await self._records.load(sandbox_id)
        if record.state is not State.RUNNING:
            raise Conflict(f"sandbox {sandbox_id} is {record.state.value}: it {what}", sandbox_id=sandbox_id,
                           hint="only a running sandbox has snapshots taken")  # fmt: skip
        worker = self._workers.get(record.info.worker or "")
        if worker is None:
            raise Unavailable(f"worker {record.info.worker} is not known here", sandbox_id=sandbox_id, hint="retry")
        return record, worker

    # ---- read ----

    async def list(self, tenant: str | None, sandbox: str | None = None) -> Sequence[SnapshotInfo]:
        """The snapshots of a tenant, oldest first; None is all tenants."""
        return await self._store.snapshots.list(tenant, sandbox=sandbox)

    async def get(self, tenant: str | None, name: str) -> SnapshotInfo:
        """A snapshot by id or name, with the sandboxes that run on it. NotFound."""
        row = await self._find(tenant, name)
        worker = self._workers.get(row.worker)
        if worker is not None and not self._workers.is_silent(row.worker):
            try:
                found = (await worker.snapshots()).snapshots.get(row.snapshot_id)
                row = row.model_copy(update={"users": found.users if found is not None else []})
            except RockError as error:
                log.info("snapshots of worker %s: %s", row.worker, error)
        return row

    async def _find(self, tenant: str | None, name: str) -> SnapshotInfo:
        row = await self._store.snapshots.find(tenant, name)
        if row is None:
            raise unknown(name)
        return row

    async def _usable(self, tenant: str, name: str) -> SnapshotInfo:
        row = await self._find(tenant, name)
        if row.state != "ready":
            raise Conflict(f"snapshot {name} cannot be used: its state is {row.state!r}", hint="retry later")
        return row

    async def resolve(self, config: SandboxConfig, tenant: str) -> SandboxConfig:
        """The config with the id, the worker and the image of its snapshot. NotFound, Conflict, InvalidConfig,
        Unsupported."""
        row = await self._usable(tenant, config.snapshot or "")
        if "image" in config.model_fields_set and config.image != row.image:
            raise InvalidConfig(f"image={config.image!r}: snapshot {row.name or row.snapshot_id} is of {row.image!r}",
                                hint="leave image unset")  # fmt: skip
        if any(mount.worker != row.worker for mount in config.volumes or ()):
            raise InvalidConfig(f"snapshot {row.name or row.snapshot_id} is on worker {row.worker}, and the volumes "
                                "are not", hint="create the volumes on that worker")  # fmt: skip
        await self._store.snapshots.use(row.snapshot_id, time.time())
        return config.model_copy(update={"snapshot": row.snapshot_id, "snapshot_worker": row.worker,
                                         "image": row.image})  # fmt: skip

    # ---- export and import ----

    async def export(self, tenant: str | None, name: str) -> AsyncGenerator[bytes]:
        """A snapshot as a tar, without the memory of processes. NotFound, Conflict, Unavailable, Unsupported."""
        row = await self._find(tenant, name)
        if row.state != "ready":
            raise Conflict(f"snapshot {name} cannot be exported: its state is {row.state!r}", hint="retry later")
        await self._store.snapshots.use(row.snapshot_id, time.time())
        stream = self._workers.required(row.worker).export_snapshot(row.snapshot_id)
        first = await anext(stream)  # errors before it have a status

        async def whole() -> AsyncGenerator[bytes]:
            async with contextlib.aclosing(stream):
                yield first
                async for part in stream:
                    yield part

        return whole()

    async def take_in(self, tenant: str, name: str | None, worker: str | None, ttl: float | None,
                      data: AsyncIterator[bytes]) -> SnapshotInfo:
        """Create a snapshot from such a tar, on a worker. NotFound, Conflict, InvalidConfig, ImageError, StorageFull,
        QuotaExceeded."""
        if worker is None:
            worker = next(iter(await self._workers.statuses()))
        elif not self._workers.is_known(worker):
            raise NotFound(f"there is no worker {worker}", hint="`rock worker ls` lists the workers")
        chosen, now = self._workers.required(worker), time.time()
        row = await self._store.snapshots.add(SnapshotInfo(
            snapshot_id=secrets.token_hex(16), name=name, tenant=tenant, worker=worker, state="creating",
            created_at=now, used_at=now, ttl_seconds=self._ttl if ttl is None else ttl))  # fmt: skip
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)  # `settle` does not take it for one that was interrupted
        try:
            await faults.point("snapshot.import.saved")
            made = await chosen.import_snapshot(row.snapshot_id, NodeImport(tenant=tenant, name=name), data)
            await faults.point("snapshot.import.made")
            row = row.model_copy(update={"sandbox_id": made.sandbox_id, "image": made.image})
            return await self._ready(row, made)
        except BaseException:
            # Files without a row are removed by `settle`.
            await asyncio.shield(self._store.snapshots.remove(row.snapshot_id))
            raise
        finally:
            self._tasks.discard(task)

    # ---- delete ----

    async def delete(self, tenant: str | None, name: str) -> SnapshotInfo:
        """Delete a snapshot; its layer stays while sandboxes or other snapshots use it. NotFound, Conflict while a pool
        uses it, Unavailable."""
        row = await self._find(tenant, name)
        pools = (await self._pools()).get(row.snapshot_id)
        if pools:
            raise Conflict(f"snapshot {name} is used by pool {pools[0]}", hint=f"first: rock pool rm {pools[0]}")
        return await self._whole(self._delete(row))

    async def _pools(self) -> dict[str, Sequence[str]]:
        """Names of pools by the ids of their snapshots."""
        found: dict[str, Sequence[str]] = {}
        for pool in await self._store.pools.list():
            if pool.config.snapshot is not None:
                found[pool.config.snapshot] = [*found.get(pool.config.snapshot, ()), pool.name]
        return found

    async def _delete(self, row: SnapshotInfo) -> SnapshotInfo:
        row = row.model_copy(update={"state": "deleting"})
        await self._store.snapshots.save(row)  # from here on no new sandbox finds it
        await faults.point("snapshot.delete.saved")
        worker = await self._workers.current(row.worker)
        if worker is not None:  # else the worker is lost; if it returns, `settle` removes the files
            await worker.delete_snapshot(row.snapshot_id)
        await faults.point("snapshot.delete.gone")
        await self._store.snapshots.remove(row.snapshot_id)
        return row

    async def expire(self) -> int:
        """Delete the snapshots whose retention has ended; one on which a sandbox runs, or of which
        there is a pool, stays. Returns their number."""
        gone = 0
        by_worker: dict[str, list[SnapshotInfo]] = {}
        pools = await self._pools()
        for row in await self._store.snapshots.expired(time.time()):
            if row.snapshot_id in pools:
                await self._store.snapshots.use(row.snapshot_id, time.time())
                continue
            by_worker.setdefault(row.worker, []).append(row)
        for name, rows in by_worker.items():
            worker = await self._workers.current(name)
            here = (await worker.snapshots()).snapshots if worker is not None else {}
            for row in rows:
                found = here.get(row.snapshot_id)
                if found is not None and found.users:
                    await self._store.snapshots.use(row.snapshot_id, time.time())
                    continue
                await self._delete(row)
                gone += 1
        return gone

    async def run(self) -> None:
        """Delete expired snapshots until it is cancelled."""
        while True:
            try:
                await self.expire()
            except Exception as error:
                log.warning("deleting expired snapshots: %r; trying again", error)
            await asyncio.sleep(min(_EVERY, max(0.5, self._ttl / 4)))

    # ---- workers ----

    async def refuse_removal(self, worker: str) -> None:
        """Raise Conflict while a worker has snapshots."""
        rows = await self._store.snapshots.list(worker=worker)
        if rows:
            raise Conflict(f"worker {worker} has {len(rows)} snapshots, which are lost with it",
                           hint=f"delete them first, or: rock worker rm --force {worker}")  # fmt: skip

    async def lose(self, worker: str) -> None:
        """Remove the records of the snapshots of a worker that is removed."""
        for row in await self._store.snapshots.list(worker=worker):
            log.warning("snapshot %s is lost with its worker %s", row.snapshot_id, worker)
            await self._store.snapshots.remove(row.snapshot_id)

    async def settle(self, worker: Worker) -> None:
        """Complete or undo the unfinished operations of a worker, and remove files without a row."""
        try:
            here = (await worker.snapshots()).snapshots  # before the rows: files have a row before they exist
        except NotFound:
            return  # a worker of an older version
        except Unavailable as error:
            log.warning("snapshots of worker %s: %s; they are compared when it is back", worker.name, error)
            return
        rows = {row.snapshot_id: row for row in await self._store.snapshots.list(worker=worker.name)}
        busy = {task.get_name() for task in self._tasks}
        for row in rows.values():
            try:
                await self._settle(worker, row, here.get(row.snapshot_id), bool(busy))
            except RockError as error:
                log.error("settling snapshot %s: %s", row.snapshot_id, error)
        for snapshot_id in here.keys() - rows.keys() if not busy else ():
            log.warning("removing snapshot %s of worker %s: it has no record", snapshot_id, worker.name)
            try:
                await worker.delete_snapshot(snapshot_id)
            except RockError as error:
                log.error("removing snapshot %s: %s", snapshot_id, error)

    async def _settle(self, worker: Worker, row: SnapshotInfo, found: NodeSnapshot | None, busy: bool) -> None:
        if row.state == "deleting":
            await self._delete(row)
        elif row.state == "creating" and not busy:
            if found is not None and found.created_at:
                await self._ready(row, found)
            else:
                if found is not None:  # files without the worker's record
                    await worker.delete_snapshot(row.snapshot_id)
                await self._store.snapshots.remove(row.snapshot_id)
        elif row.state == "ready" and found is None:
            log.error("snapshot %s has no files on its worker %s", row.snapshot_id, row.worker)
            await self._store.snapshots.remove(row.snapshot_id)


def _config_of_children(config: SandboxConfig, changes: dict[str, Any]) -> SandboxConfig:
    """The config of the original with these changes, without its names. InvalidConfig."""
    wrong = sorted(set(changes) & set(_FIXED))
    if wrong:
        raise InvalidConfig(f"changes: {', '.join(wrong)} cannot differ in a fork",
                            hint="start a sandbox from the snapshot instead, or leave them out")  # fmt: skip
    fields = config.model_dump(exclude={"sandbox_id", "name", "snapshot", "snapshot_worker"}, exclude_unset=True)
    unknown_names = sorted(set(changes) - set(SandboxConfig.model_fields))
    if unknown_names:
        raise InvalidConfig(f"changes: there is no field {unknown_names[0]!r} in SandboxConfig", hint="check its name")
    try:
        return SandboxConfig.model_validate({**fields, **changes})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InvalidConfig(f"changes: the value of {place} is not valid: {first['msg']}",
                            hint="see SandboxConfig") from None  # fmt: skip
