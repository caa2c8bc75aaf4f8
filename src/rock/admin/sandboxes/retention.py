"""Operations on stopped sandboxes: restart, delete, archive, restore, and cleanup of their workers."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from rock import faults
from rock.admin.sandboxes import lifecycle
from rock.admin.sandboxes.lifecycle import Event
from rock.admin.sandboxes.records import Records
from rock.admin.workers.client import Worker
from rock.admin.workers.registry import WorkerRegistry
from rock.errors import (
    Conflict,
    Lost,
    NotFound,
    RockError,
    ServerError,
    Unavailable,
    Unsupported,
    from_wire,
    unexpected,
)
from rock.protocol.keys import Quota
from rock.protocol.node import NodeSandbox
from rock.protocol.sandbox import ArchivedFiles, Phase, SandboxConfig, SandboxInfo, State
from rock.scheduler.base import Reservations
from rock.store.base import Record
from rock.store.blobs import Blobs

_NOT_KEPT = "create the next one with retain or archive_after (auto_delete_seconds, auto_archive_seconds)"


class RetainedSandboxes:
    """Stopped sandboxes and their files. stop: stops a sandbox. started: waits for the start of a sandbox, up to a
    number of seconds."""

    def __init__(
        self, records: Records, workers: WorkerRegistry, cleanup: Cleanup, archive: Archive,
        stop: Callable[[str], Awaitable[SandboxInfo]], started: Callable[[Record, float], Awaitable[SandboxInfo]],
    ) -> None:  # fmt: skip
        self._records = records
        self._workers = workers
        self._cleanup = cleanup
        self._archive = archive
        self._stop = stop
        self._started = started

    # ---- restart ----

    async def restart(
        self, sandbox_id: str, key: str | None = None, wait: float = 0.0, quota: Quota | None = None
    ) -> SandboxInfo:
        """Start it again from its files: the same id, without sessions. A repetition with a known key returns the first
        result.

        Waits up to `wait` seconds for the start; a start that fails meanwhile raises its reason, and leaves the state
        unchanged. Conflict when it is not stopped, or has no files. QuotaExceeded.
        """
        await self._cleanup.settled(sandbox_id)
        record = await self._records.load(sandbox_id)
        if not _asked_before(record, key):
            event = Event.RESTORE if record.state is State.ARCHIVED else Event.RESTART
            record = await self._records.apply(sandbox_id, event, known=record, key=key, check=_has_files, quota=quota)
        return await self._started(record, wait)

    # ---- delete ----

    async def delete(self, sandbox_id: str, force: bool = False) -> SandboxInfo:
        """Delete a stopped sandbox and its files; with `force` it is stopped first."""
        if force and (await self._stop(sandbox_id)).state is State.STOPPING:
            raise Unavailable(f"sandbox {sandbox_id} is not deleted: the API server of the cluster does not respond, "
                              "and its stop, which is accepted, waits for it", sandbox_id=sandbox_id, hint="retry")
        record = await self._deleted(sandbox_id)
        await faults.point("delete.files_gone")
        await self._records.store.delete(sandbox_id)
        return record.info

    async def expire(self, sandbox_id: str) -> None:
        """Delete a sandbox whose retention has expired; its record stays."""
        await self._deleted(sandbox_id)

    async def _deleted(self, sandbox_id: str) -> Record:
        await self._cleanup.settled(sandbox_id)
        return await self.finish_delete(await self._records.apply(sandbox_id, Event.DELETE))

    async def finish_delete(self, record: Record) -> Record:
        """Remove the files of a deleted sandbox, on a worker and in the archive."""
        await faults.point("delete.saved")
        worker = await self._workers.current(record.info.worker)
        if record.info.kept and worker is not None:
            await worker.destroy(record.id)
        if any(step.event == Event.ARCHIVE for step in record.info.state_history):
            await self._archive.forget(record.id)
        if record.info.kept or record.info.archive:
            return await self._records.amend(record.id, kept=False, archive=None)
        return record

    # ---- lost files ----

    async def lost(self, record: Record) -> None:
        """Its worker does not have the files: note that in its record."""
        await self._records.amend(record.id, **lifecycle.files_lost(record))


def _asked_before(record: Record, key: str | None) -> bool:
    asked = (step.event for step in record.info.state_history if key is not None and step.key == key)
    return any(event in (Event.RESTART, Event.RESTORE) for event in asked)


def _has_files(record: Record) -> None:
    """Raise Conflict for a stopped sandbox without files."""
    if record.state is State.STOPPED and not record.info.kept:
        why = "its files are gone" if record.config.keeps_files else "they were deleted when it stopped"
        raise Conflict(f"sandbox {record.id} has no files: {why}", sandbox_id=record.id, hint=_NOT_KEPT)


# ---- archive and restore ----
#
# Archiving moves the files of a stopped sandbox from its worker to the archive; a restore moves them to any worker.

log = logging.getLogger("rock.admin")


class Archive:
    """The files of stopped sandboxes in `blobs`, one archive each, under its id. limit: maximum bytes of files in
    one."""

    def __init__(
        self, records: Records, workers: WorkerRegistry, cleanup: Cleanup, blobs: Blobs | None, limit: int
    ) -> None:
        self._records = records
        self._workers = workers
        self._cleanup = cleanup
        self._blobs = blobs
        self._limit = limit
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Cancel the archiving in progress; the next start repeats it."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if self._blobs is not None:
            await self._blobs.close()

    def check_there(self) -> None:
        """Unsupported on a server without an archive."""
        self._there()

    def _there(self) -> Blobs:
        if self._blobs is None:
            raise Unsupported("the archive feature is disabled on this server", hint="set ROCK_ARCHIVE on the server")
        return self._blobs

    def check(self, config: SandboxConfig) -> None:
        """Unsupported for a sandbox that cannot be archived as its config requests."""
        if config.auto_archive_seconds is not None:
            self.check_there()

    # ---- archive ----

    async def archive(self, sandbox_id: str, key: str | None = None, wait: float = 0.0) -> SandboxInfo:
        """Move its files to the archive, and remove them from its worker. Returns after at most `wait` seconds.

        A repeated call joins the archiving in progress. A failure within that time is raised, and leaves the sandbox
        stopped. Conflict when it runs, or has no files.
        """
        self._there()
        await self._cleanup.settled(sandbox_id)
        record = await self._records.apply(sandbox_id, Event.ARCHIVE, key=key, check=_archiving_has_files, error=None)
        task = self._tasks.get(sandbox_id)
        if task is not None and wait > 0:
            await asyncio.wait({task}, timeout=wait)
            record = await self._records.load(sandbox_id)
            if record.state is State.STOPPED and record.info.error:
                raise from_wire(record.info.error)
        return record.info

    def begin(self, record: Record) -> None:
        """Start the archiving in the background, once."""
        if record.id not in self._tasks:
            task = asyncio.create_task(self._archive(record), name=f"archive-{record.id}")
            self._tasks[record.id] = task
            task.add_done_callback(lambda done: self._done(record.id, done))

    def _done(self, sandbox_id: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(sandbox_id, None)
        if not task.cancelled() and task.exception() is not None:
            log.error("archive of %s: %r", sandbox_id, task.exception())
            self._records.unfinished(sandbox_id)

    async def _archive(self, record: Record) -> None:
        began = time.time()
        phase = Phase(status="running", message="its files are brought to the archive", started_at=began)
        record = await self._records.amend(record.id, phases={**record.info.phases, "archive": phase})
        try:
            await faults.point("archive.begun")
            files = await self._pack(record)
            await faults.point("archive.packed")
        except asyncio.CancelledError:
            raise
        except Exception as raised:
            error = raised if isinstance(raised, RockError) else unexpected(raised)
            log.warning("archive of %s: %r", record.id, raised)
            error.sandbox_id = record.id
            phases = _with_phase(record, phase, "failed", error.message)
            lost = lifecycle.files_lost(record) if isinstance(error, Lost) else {}
            await self._records.apply(record.id, Event.ARCHIVE_FAILED, error=error.to_wire(), phases=phases, **lost)
        else:
            phases = _with_phase(record, phase, "success", f"{files.size} bytes")
            await self._records.apply(record.id, Event.ARCHIVE_DONE, archive=files, phases=phases)

    async def _pack(self, record: Record) -> ArchivedFiles:
        worker = self._workers.get(record.info.worker or "")
        if worker is None:
            raise ServerError(f"worker {record.info.worker} is not known here")
        told: list[ArchivedFiles] = []
        size, sha = 0, hashlib.sha256()

        async def checked() -> AsyncGenerator[bytes]:
            nonlocal size
            async with contextlib.aclosing(worker.pack(record.id, self._limit)) as stream:
                async for part in stream:
                    if isinstance(part, ArchivedFiles):
                        told.append(part)
                        continue
                    size += len(part)
                    await asyncio.to_thread(sha.update, part)
                    yield part
            digest = f"sha256:{sha.hexdigest()}"
            if not told or (told[0].size, told[0].digest) != (size, digest):
                raise ServerError(f"the files of sandbox {record.id} did not come whole from its worker")

        data = checked()
        async with contextlib.aclosing(data):
            await self._there().put(record.id, data)  # it stores no partial archive when the last piece raises
        return told[0]

    # ---- restore ----

    async def restore(self, worker: Worker, record: Record) -> NodeSandbox:
        """Move the files of an archived sandbox to a worker, and start it there."""
        files = record.info.archive
        assert files is not None
        config = archived_config(record)
        async with contextlib.aclosing(self._there().get(record.id)) as data:
            await worker.unpack(record.id, config, files, data)
        await faults.point("restore.unpacked")
        return await worker.wake(record.id, config)

    async def forget(self, sandbox_id: str) -> None:
        """Remove its archive, if there is one."""
        if self._blobs is not None:
            await self._blobs.delete(sandbox_id)


def archived_config(record: Record) -> SandboxConfig:
    """The config with which an archived sandbox restarts: its archive has the files of its snapshot too."""
    if record.config.snapshot is None:
        return record.config
    return record.config.model_copy(update={"snapshot": None, "snapshot_worker": None})


def _with_phase(record: Record, phase: Phase, status: str, message: str) -> dict[str, Any]:
    ended = phase.model_copy(update={"status": status, "message": message, "completed_at": time.time()})
    return {**record.info.phases, "archive": ended}


def _archiving_has_files(record: Record) -> None:
    if record.state is State.STOPPED and not record.info.kept:
        raise Conflict(f"sandbox {record.id} left no files to archive", sandbox_id=record.id,
                       hint="create the next one with retain or archive_after")  # fmt: skip


# ---- cleanup of workers ----
#
# A sandbox that ended is ended on its worker too, and its files are retained or removed.


_RETRY = 5.0  # seconds
_PUT_AWAY = 10.0  # seconds to wait for the cleanup of the previous run


class Cleanup:
    """The background cleanups, at most one per sandbox. `Service.close` cancels them."""

    def __init__(self, records: Records, workers: WorkerRegistry, reservations: Reservations | None) -> None:
        self._records = records
        self._workers = workers
        self._reservations = reservations
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def tasks(self) -> list[asyncio.Task[None]]:
        return list(self._tasks.values())

    async def once(self, record: Record) -> dict[str, Any]:
        """End a sandbox on its worker, and retain or remove its files; returns changes of its info when files are lost.

        The state change that ended it determined whether they are retained.
        """
        worker, lost = await self._workers.current(record.info.worker), False
        if self._reservations is not None and record.info.worker in self._reservations.failures():
            worker = None  # its machine has ended
        try:
            if worker is not None and not record.info.kept:
                await worker.destroy(record.id)
            elif worker is not None:
                lost = not (await worker.rest(record.id)).kept
        except Unavailable:
            pod = self._reservations is not None and self._reservations.exclusive  # its end is that of the sandbox
            if worker is not None and self._workers.get(worker.name) is worker and not pod:
                raise
            # The worker is lost meanwhile: it ends its sandboxes itself, or on request when it joins again
        if self._reservations is not None:
            await self._reservations.release(record.id)
        return lifecycle.files_lost(record) if lost else {}

    def begin(self, record: Record) -> None:
        """Start the cleanup in the background, with retries until it succeeds."""
        before = self._tasks.get(record.id)
        task = asyncio.create_task(self._surely(record, before), name=f"release-{record.id}")
        self._tasks[record.id] = task
        task.add_done_callback(lambda done: self._ended(record.id, done))

    def _ended(self, sandbox_id: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(sandbox_id) is task:
            del self._tasks[sandbox_id]

    async def _surely(self, record: Record, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait({before})
        while True:
            try:
                await faults.point("release.begun")
                gone = await self.once(record)
                if gone:
                    await self._records.amend(record.id, **gone)
                return
            except NotFound:
                return
            except RockError as error:
                log.warning("release of %s: %s; trying again", record.id, error)
                await asyncio.sleep(_RETRY)

    async def settled(self, sandbox_id: str) -> None:
        """Wait until its previous run is cleaned up. Unavailable when that exceeds the time limit."""
        task = self._tasks.get(sandbox_id)
        if task is not None:
            done, _ = await asyncio.wait({task}, timeout=_PUT_AWAY)
            if not done:
                raise Unavailable(
                    f"sandbox {sandbox_id}: what is left of its last run is being put away",
                    sandbox_id=sandbox_id,
                    hint="retry",
                )
