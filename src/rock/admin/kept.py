"""What can be done with a sandbox that was stopped: restart it, delete it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rock import faults
from rock.admin import infos
from rock.admin.lifecycle import Event
from rock.errors import Conflict
from rock.protocol.keys import Quota
from rock.protocol.sandbox import SandboxInfo, State
from rock.store.base import Record

if TYPE_CHECKING:
    from rock.admin.service import Service

_NOT_KEPT = "set auto_delete_seconds or auto_archive_seconds, and the files of the next one are kept"


class Kept:
    """Stopped sandboxes and their files."""

    def __init__(self, service: Service) -> None:
        self._service = service

    # ---- restart ----

    async def restart(
        self, sandbox_id: str, key: str | None = None, wait: float = 0.0, quota: Quota | None = None
    ) -> SandboxInfo:
        """Start it again over its files: the same id, no sessions. For a key that was seen, what became of that.

        Waits up to `wait` seconds for the start; one that fails meanwhile raises its reason, and leaves it as it was.
        Conflict when it is not stopped, or its files are gone. QuotaExceeded.
        """
        service = self._service
        await service.releases.settled(sandbox_id)
        record = await service.load(sandbox_id)
        if not _asked_before(record, key):
            event = Event.RESTORE if record.state is State.ARCHIVED else Event.RESTART
            record = await service.apply(sandbox_id, event, known=record, key=key, check=_has_files, quota=quota)
        return await service.launches.waited(record, wait)

    # ---- delete ----

    async def delete(self, sandbox_id: str, force: bool = False) -> SandboxInfo:
        """Forget a stopped one and its files; with `force` it is stopped first."""
        service = self._service
        if force:
            await service.stop(sandbox_id)
        record = await self._deleted(sandbox_id)
        await faults.point("delete.files_gone")
        await service.store.delete(sandbox_id)
        return record.info

    async def expire(self, sandbox_id: str) -> None:
        """Delete one whose time is over; its tombstone stays."""
        await self._deleted(sandbox_id)

    async def _deleted(self, sandbox_id: str) -> Record:
        await self._service.releases.settled(sandbox_id)
        return await self.finish_delete(await self._service.apply(sandbox_id, Event.DELETE))

    async def finish_delete(self, record: Record) -> Record:
        """Remove the files of one that is deleted, wherever they are."""
        service = self._service
        await faults.point("delete.saved")
        worker = await service.there(record.info.worker)
        if record.info.kept and worker is not None:
            await worker.destroy(record.id)
        if any(step.event == Event.ARCHIVE for step in record.info.state_history):
            await service.archive.forget(record.id)
        if record.info.kept or record.info.archive:
            return await service.amend(record.id, kept=False, archive=None)
        return record

    # ---- when a worker does not have them ----

    async def lost(self, record: Record) -> None:
        """Its worker does not have the files: its tombstone says so."""
        await self._service.amend(record.id, **infos.files_lost(record))


def _asked_before(record: Record, key: str | None) -> bool:
    asked = (step.event for step in record.info.state_history if key is not None and step.key == key)
    return any(event in (Event.RESTART, Event.RESTORE) for event in asked)


def _has_files(record: Record) -> None:
    """Raise Conflict for a stopped sandbox without files."""
    if record.state is State.STOPPED and not record.info.kept:
        why = "its files went with its stop" if not record.config.keeps_files else "its files are gone"
        raise Conflict(f"sandbox {record.id}: {why}", sandbox_id=record.id, hint=_NOT_KEPT)
