"""What a sandbox that ended leaves on its worker: ended there too, and its files kept or removed."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from rock import faults
from rock.admin import infos
from rock.errors import NotFound, RockError, Unavailable
from rock.store.base import Record

if TYPE_CHECKING:
    from rock.admin.service import Service

log = logging.getLogger("rock.admin")

_RETRY = 5.0  # seconds
_PUT_AWAY = 10.0  # seconds to wait for the end of a former life


class Releases:
    """In the background, the last one of each sandbox. `service.close` ends them."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def tasks(self) -> list[asyncio.Task[None]]:
        return list(self._tasks.values())

    async def once(self, record: Record) -> dict[str, Any]:
        """End what there is of it on its worker, and keep or remove its files: what has to be said when they are lost.

        Whether they are kept was decided by the step that ended it."""
        worker, lost = await self._service.there(record.info.worker), False
        try:
            if worker is not None and not record.info.kept:
                await worker.destroy(record.id)
            elif worker is not None:
                lost = not (await worker.rest(record.id)).kept
        except Unavailable:
            if worker is not None and self._service.workers.get(worker.name) is worker:
                raise
            # It was lost meanwhile: it stops by itself, or is told when it is back
        if self._service.placing.reservations is not None:
            await self._service.placing.reservations.release(record.id)
        return infos.files_lost(record) if lost else {}

    def begin(self, record: Record) -> None:
        """Do that in the background, again and again until it is done."""
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
                    await self._service.amend(record.id, **gone)
                return
            except NotFound:
                return
            except RockError as error:
                log.warning("release of %s: %s; trying again", record.id, error)
                await asyncio.sleep(_RETRY)

    async def settled(self, sandbox_id: str) -> None:
        """Wait until its former life is put away. Unavailable when that takes long."""
        task = self._tasks.get(sandbox_id)
        if task is not None:
            done, _ = await asyncio.wait({task}, timeout=_PUT_AWAY)
            if not done:
                raise Unavailable(
                    f"sandbox {sandbox_id}: what is left of its last run is being put away",
                    sandbox_id=sandbox_id,
                    hint="retry",
                )
