"""Workers that went away: who leads takes a silent one for lost, and tells of each sandbox that it had.

Neither step is lost with a crash in between: that it is lost stands in the registry, and whoever leads next buries what
is left.
"""

from __future__ import annotations

import asyncio
import logging
import time

from rock.admin.fleet import Fleet
from rock.admin.lifecycle import Event
from rock.admin.service import Service
from rock.errors import NotFound, RockError
from rock.protocol.sandbox import Cause, State
from rock.store.base import Query, Record

log = logging.getLogger("rock.workers")

_LOOK = 0.5
_RARELY = 30.0
_ALIVE = (State.PENDING, State.RUNNING, State.STOPPING)


async def bury(service: Service, worker: str) -> int:
    """Tombstones for what a lost worker had; how many."""
    buried = 0
    while records := await service.store.list(Query(states=_ALIVE, fields={"worker": worker})):
        # Asked after the list: while it is lost in the registry, all that was listed is of an epoch that is over. Of
        # one that came back the reconciler compares what is left.
        if not await _is_lost(service, worker):
            break
        before = buried
        for record in records:
            try:
                await _bury_one(service, record, worker)
                buried += 1
            except RockError as error:
                log.error("burying %s: %s", record.id, error)
        if buried == before:
            break  # tried again by who calls
    return buried


async def _is_lost(service: Service, worker: str) -> bool:
    try:
        return (await service.workers.info(worker)).is_lost
    except NotFound:
        return not service.workers.is_known(worker)


async def _bury_one(service: Service, record: Record, worker: str) -> None:
    restored = record.state is State.PENDING and record.info.archive is not None
    event = Event.RESTORE_FAILED if restored else Event.ENDED
    await service.apply(record.id, event, known=record, cause=Cause.LOST, reason=f"its worker {worker} was lost")


class Losses:
    """The loop of who leads."""

    def __init__(self, service: Service, fleet: Fleet) -> None:
        self._service = service
        self._fleet = fleet
        self._next: dict[tuple[str, int], tuple[float, float]] = {}  # when and after what pause one is looked at again

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                await self.look()
            except Exception as error:
                log.warning("looking for lost workers: %r; trying again", error)
            await asyncio.sleep(_LOOK)

    async def look(self) -> None:
        """Once."""
        for info in self._fleet.silent():
            if await self._fleet.lose(info):
                log.warning("worker %s was not heard of for %g s: it is lost", info.name, self._fleet.lease.lost)
            await self._fleet.refresh()
        lost, now = self._fleet.lost_epochs(), time.monotonic()
        self._next = {key: later for key, later in self._next.items() if lost.get(key[0]) == key[1]}
        for key in lost.items():
            due, pause = self._next.get(key, (now, _LOOK))
            if due > now:
                continue
            buried = await bury(self._service, key[0])
            if buried:
                log.warning("worker %s was lost with %d sandboxes", key[0], buried)
            # It may stand in the registry for weeks: the longer there was nothing, the rarer a list for it.
            self._next[key] = (now + pause, min(2 * pause, _RARELY)) if not buried else (now, _LOOK)
