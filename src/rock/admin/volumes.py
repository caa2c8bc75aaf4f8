"""Volumes: create, delete, and resolution of their names in the config of a new sandbox.

    create  row "creating" ─► folder on the worker ─► row "ready"
    delete  row "deleting" ─► folder removed       ─► no row

Each step is idempotent. After a crash `settle` completes both, and removes folders without a row. The worker decides
whether a sandbox uses a volume, because it alone starts sandboxes with it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from rock import faults
from rock.admin.workers.client import Worker
from rock.admin.workers.registry import WorkerRegistry
from rock.errors import Conflict, InvalidConfig, NotFound, RockError, Unavailable
from rock.protocol.node import CreateVolume, NodeVolume, VolumeInfo
from rock.protocol.routes import OUTAGE
from rock.protocol.sandbox import SandboxConfig, parse_size
from rock.store.base import Store
from rock.store.volumes import unknown

T = TypeVar("T")
log = logging.getLogger("rock.admin")


class Volumes:
    """The volumes of all tenants."""

    def __init__(self, store: Store, workers: WorkerRegistry) -> None:
        self._store = store
        self._workers = workers
        self._tasks: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        """Cancel the operations in progress; the next start completes them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _whole(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of an operation that continues when its client disconnects."""
        task = asyncio.create_task(work, name="volume")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    # ---- create ----

    async def create(self, spec: CreateVolume, key: str | None, tenant: str) -> VolumeInfo:
        """Create a volume, or, for a known key of this tenant, return the existing one. Conflict when the name is
        taken, NotFound for the worker, Unavailable, StorageFull, QuotaExceeded."""
        return await self._whole(self._create(spec, key, tenant))

    async def _create(self, spec: CreateVolume, key: str | None, tenant: str) -> VolumeInfo:
        name = await self._chosen(spec.worker)
        info = VolumeInfo(name=spec.name, volume_id=secrets.token_hex(16), worker=name, state="creating",
                          size=parse_size(spec.size, "size"), created_at=time.time(), tenant=tenant)  # fmt: skip
        row = await self._store.volumes.add(info, key)
        if row.state != "creating":
            return row
        await faults.point("volume.create.saved")
        try:
            return await self._made(row)
        except RockError:
            await self._store.volumes.remove(row.volume_id)  # a folder without a row is removed by `settle`
            raise

    async def _made(self, row: VolumeInfo) -> VolumeInfo:
        worker = self._workers.required(row.worker)
        await worker.create_volume(row.volume_id, NodeVolume(name=row.name, tenant=row.tenant, size=row.size))
        await faults.point("volume.create.made")
        await self._store.volumes.mark(row.volume_id, "ready")
        return row.model_copy(update={"state": "ready"})

    async def _chosen(self, name: str | None) -> str:
        """A worker that accepts sandboxes: the named one, else the one with the fewest volumes."""
        ready = await self._workers.statuses()
        if name is None:
            if not ready:
                raise Unavailable("no worker accepts volumes now", hint="retry", details=OUTAGE)
            counts = Counter(row.worker for row in await self._store.volumes.list())
            return min(ready, key=lambda one: (counts[one], one))
        if name not in ready:
            if not self._workers.is_known(name):
                raise NotFound(f"there is no worker {name}", hint="rock worker ls")
            raise Unavailable(f"worker {name} accepts no volumes now: it is lost, unreachable or being drained",
                              hint="choose another worker, or retry when it is ready: rock worker ls")  # fmt: skip
        return name

    # ---- read ----

    async def list(self, tenant: str | None) -> Sequence[VolumeInfo]:
        """The volumes of a tenant, oldest first; None is all tenants."""
        return await self._store.volumes.list(tenant)

    async def get(self, tenant: str, name: str) -> VolumeInfo:
        """A volume. NotFound."""
        found = await self._store.volumes.find(tenant, name)
        if found is None:
            raise unknown(name)
        return found

    async def resolve(self, config: SandboxConfig, tenant: str) -> SandboxConfig:
        """The config with the ids and the worker of its volumes. NotFound; InvalidConfig for volumes of different
        workers."""
        mounts = []
        for mount in config.volumes or ():
            row = await self.get(tenant, mount.name)
            if row.state != "ready":
                raise Conflict(f"volume {row.name} cannot be used: its state is {row.state!r}", hint="retry later")
            mounts.append(mount.model_copy(update={"volume_id": row.volume_id, "worker": row.worker}))
        places = sorted({mount.worker or "" for mount in mounts})
        if len(places) > 1:
            raise InvalidConfig(f"the volumes are on different workers: {', '.join(places)}",
                                hint="a sandbox runs on one worker; create its volumes there")  # fmt: skip
        return config.model_copy(update={"volumes": mounts})

    # ---- delete ----

    async def delete(self, tenant: str, name: str) -> VolumeInfo:
        """Delete a volume and its files. NotFound, Unavailable, Conflict while a sandbox uses it."""
        return await self._whole(self._delete(await self.get(tenant, name)))

    async def _delete(self, row: VolumeInfo) -> VolumeInfo:
        await self._store.volumes.mark(row.volume_id, "deleting")  # from here on no new sandbox finds it
        await faults.point("volume.delete.saved")
        worker = await self._workers.current(row.worker)
        if worker is not None:  # else the worker is lost; if it returns, `settle` removes the folder
            try:
                await worker.delete_volume(row.volume_id)
            except Conflict as error:
                await self._store.volumes.mark(row.volume_id, "ready")
                raise Conflict(f"volume {row.name} is in use: {error.message}", hint=error.hint,
                               details=error.details) from None  # fmt: skip
        await faults.point("volume.delete.gone")
        await self._store.volumes.remove(row.volume_id)
        return row.model_copy(update={"state": "deleting"})

    # ---- workers ----

    async def refuse_removal(self, worker: str) -> None:
        """Raise Conflict while a worker has volumes."""
        rows = await self._store.volumes.list(worker=worker)
        if rows:
            names = ", ".join(row.name for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
            raise Conflict(f"worker {worker} has {len(rows)} volumes, which are lost with it: {names}",
                           hint=f"delete them first, or: rock worker rm --force {worker}")  # fmt: skip

    async def lose(self, worker: str) -> None:
        """Remove the records of the volumes of a worker that is removed."""
        for row in await self._store.volumes.list(worker=worker):
            log.warning("volume %s is lost with its worker %s", row.name, worker)
            await self._store.volumes.remove(row.volume_id)

    async def settle(self, worker: Worker) -> None:
        """Complete the unfinished operations of a worker, and remove folders without a row."""
        try:
            # Before the rows: a folder has a row before it exists.
            here = (await worker.volumes()).volumes
        except NotFound:
            return  # a worker of an older version
        except Unavailable as error:
            log.warning("volumes of worker %s: %s; they are compared when it is back", worker.name, error)
            return
        rows = {row.volume_id: row for row in await self._store.volumes.list(worker=worker.name)}
        for row in rows.values():
            try:
                if row.state == "creating":
                    await self._made(row)
                elif row.state == "deleting":
                    await self._delete(row)
                elif row.volume_id not in here:
                    log.error("volume %s has no files on its worker %s", row.name, worker.name)
            except RockError as error:
                log.error("settling volume %s: %s", row.name, error)
        for volume_id in here.keys() - rows.keys():
            log.warning("removing volume %s of worker %s: it has no record", volume_id, worker.name)
            try:
                await worker.delete_volume(volume_id)
            except RockError as error:
                log.error("removing volume %s: %s", volume_id, error)
