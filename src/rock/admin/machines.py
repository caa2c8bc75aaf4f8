"""Machines that exist for one sandbox each, as pods: ends that the cluster reports, orphans, and workers that are gone.

    the cluster reports that a machine ended ──► its sandbox ends with that cause, without waiting for the lease
    a machine without a live record          ──► released
    a worker without a machine               ──► removed from the registry
    a pool of warm machines that lacks some  ──► filled

The leader runs this.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from rock.admin.sandboxes.lifecycle import Event
from rock.admin.sandboxes.service import Service
from rock.errors import NotFound, RockError
from rock.kubernetes.pods import PodReservations
from rock.protocol.keys import POD_PREFIX
from rock.protocol.sandbox import Cause, State
from rock.scheduler.base import MachineEnd
from rock.store.base import Query

log = logging.getLogger("rock.workers")

_LOOK = 0.5
_SWEEP = 10.0  # seconds between two searches for orphans
_ALIVE = (State.PENDING, State.RUNNING, State.STOPPING)


class Machines:
    """The loop of the leader over reserved machines."""

    def __init__(self, service: Service, pods: PodReservations) -> None:
        self._service = service
        self._pods = pods
        self._swept_at = float("-inf")

    async def run(self) -> None:
        """Run until it is canceled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._repeated("looking at pods", self.look))
            group.create_task(self._repeated("warm pods", self._pods.warm.tend))  # waits while the API server is away

    async def _repeated(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except Exception as error:
                log.warning("%s: %r; trying again", what, error)
            await asyncio.sleep(_LOOK)

    async def look(self) -> None:
        """Check all machines once."""
        for worker, ended in self._pods.failures().items():
            if not await self._end(worker, ended) and not self._pods.is_here(worker):
                self._pods.forget(worker)
        registry = self._service.workers
        for worker, reason in self._pods.silent().items():
            if registry.is_silent(worker):
                await self._end(worker, MachineEnd(Cause.LOST, reason))
        if time.monotonic() - self._swept_at > _SWEEP:
            await self._service.placer.sweep(self._service.store)
            names = [name for name in {*registry, *registry.lost()} if name.startswith(POD_PREFIX)]
            for worker in names:
                if not self._pods.is_here(worker) and await self._pods.is_gone(worker):
                    await self._end(worker, MachineEnd(Cause.LOST, f"its pod {worker} is gone"))
                    await registry.dismiss(worker)
            self._swept_at = time.monotonic()

    async def _end(self, worker: str, ended: MachineEnd) -> int:
        """Record the end of the sandboxes of a worker; returns their number."""
        records = await self._service.store.list(Query(states=_ALIVE, fields={"worker": worker}))
        for record in records:
            try:
                await self._service.records.apply(record.id, Event.ENDED, known=record, cause=ended.cause,
                                                  reason=ended.reason)  # fmt: skip
            except NotFound:
                continue
            except RockError as error:
                log.error("the end of %s: %s", record.id, error)
        return len(records)
