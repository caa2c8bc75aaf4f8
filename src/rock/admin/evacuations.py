"""Evacuations: the sandboxes of a worker that leaves move to the archive, from which a restart continues elsewhere.

    a drain with archive, or a rocklet that reports `evacuate` in its heartbeat
      running, with retention   ──► stopped (cause `drained`) ──► archived
      stopped, with its files   ──► archived
      all others                ──► unchanged; the phase `evacuation` of the sandbox states why

The leader runs this. It keeps no state: after a crash, the next leader continues with what is left on the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import replace

from rock.admin.sandboxes.service import Service
from rock.errors import RockError
from rock.protocol.node import EVACUATION
from rock.protocol.sandbox import Cause, Phase, State
from rock.store.base import Query, Record

log = logging.getLogger("rock.workers")

_LOOK = 0.5
_AT_ONCE = 4  # sandboxes of all workers that are stopped and archived at the same time
_AGAIN = 15.0  # seconds before another attempt with a sandbox that was not archived
_LONGEST = 600.0  # seconds to wait for one archive; it continues afterwards


class Evacuations:
    """The loop of the leader over workers that leave."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._not_before: dict[str, float] = {}  # by sandbox
        self._moving: dict[str, asyncio.Task[None]] = {}  # by sandbox

    async def run(self) -> None:
        """Run until it is canceled."""
        try:
            while True:
                try:
                    await self._look()
                except Exception as error:
                    log.warning("evacuations: %r; trying again", error)
                await asyncio.sleep(_LOOK)
        finally:
            tasks = list(self._moving.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self) -> None:
        """Begin to move what the workers that leave have."""
        now = time.monotonic()
        self._not_before = {id: at for id, at in self._not_before.items() if at > now}
        for worker in self._service.workers.evacuating():
            for record in await self._on(worker):
                if record.id not in self._not_before and record.id not in self._moving:
                    task = asyncio.create_task(self._move(record), name=f"evacuate-{record.id}")
                    self._moving[record.id] = task
                    task.add_done_callback(lambda _, id=record.id: self._moving.pop(id, None))  # type: ignore[misc]

    async def _on(self, worker: str) -> list[Record]:
        """Sandboxes that run there, and those of which files are there."""
        query = Query(states=(State.RUNNING, State.STOPPED, State.ARCHIVING), fields={"worker": worker})
        found: list[Record] = []
        while True:
            page = await self._service.store.list(query)
            found += [one for one in page if one.state is not State.STOPPED or one.info.kept]
            if len(page) < query.limit:
                return found
            query = replace(query, after=(page[-1].info.created_at, page[-1].id))

    async def _move(self, record: Record) -> None:
        async with self._room:
            try:
                why = await self._refusal(record)
                if why:
                    await self._note(record, why)
                    return
                if record.state is State.RUNNING:
                    reason = f"its worker {record.info.worker} is drained; a restart continues on another one"
                    await self._service.stop(record.id, Cause.DRAINED, reason)
                await self._service.archive.archive(record.id, wait=_LONGEST)
            except RockError as error:
                with contextlib.suppress(RockError):
                    await self._note(record, error.message)
            except Exception:
                log.exception("evacuation of sandbox %s", record.id)
            finally:
                self._not_before[record.id] = time.monotonic() + _AGAIN

    async def _refusal(self, record: Record) -> str:
        """Why a sandbox cannot be archived, determined before it is stopped; "" if it can."""
        try:
            self._service.archive.check_there()
        except RockError as error:
            return error.message
        if record.state is not State.RUNNING:
            return ""
        if not record.config.keeps_files:
            return "it has no retention (auto_delete_seconds, auto_archive_seconds): its files end with it"
        if self._service.workers.get(record.info.worker or "") is None:
            return "its worker does not respond"
        return ""

    async def _note(self, record: Record, why: str) -> None:
        """Record the reason, once."""
        message = f"not archived, although its worker {record.info.worker} is drained: {why}"
        known = (await self._service.records.load(record.id)).info.phases
        if EVACUATION in known and known[EVACUATION].message == message:
            return
        log.warning("sandbox %s is %s", record.id, message)
        now = time.time()
        phase = Phase(status="failed", message=message, started_at=now, completed_at=now)
        await self._service.records.amend(record.id, phases={**known, EVACUATION: phase})
