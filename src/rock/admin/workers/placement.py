"""Placement of sandboxes: updates the scheduler with the reports of workers, and counts its choices until each sandbox
has started."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping

from rock.admin.workers.client import Worker
from rock.admin.workers.registry import WorkerRegistry
from rock.errors import NoCapacity, RockError, Unavailable, Unsupported
from rock.protocol.node import NodeStatus
from rock.protocol.routes import OUTAGE
from rock.protocol.sandbox import SandboxConfig, State
from rock.scheduler.base import Placement, Reservations, Scheduler
from rock.store.base import Record, Store

log = logging.getLogger("rock.admin")

_FRESH = 1.0  # seconds for which a report is current
_STALE = 5.0  # seconds after which a report is not used for placement
_AGAIN = 1.0  # seconds between two placements of a sandbox that waits for capacity
_HOLDING = (State.PENDING, State.RUNNING, State.STOPPING)
_NEW = 0.1  # the same when the last report shows no free capacity, and for a group, which may fill many workers


class Placer:
    """The scheduler with current reports of workers. A placement sends no request, except the first in a while: reports
    arrive in the background, and placements between two reports are counted here. A worker itself rejects sandboxes
    that exceed its capacity.

    reservations: the external scheduler of a cluster, used while a sandbox starts.
    """

    def __init__(
        self, scheduler: Scheduler, workers: WorkerRegistry, reservations: Reservations | None = None
    ) -> None:
        self._scheduler = scheduler
        self._workers = workers
        self.reservations = reservations
        self.statuses: Mapping[str, NodeStatus] = {}
        self._asked_at = float("-inf")
        self._version = -1  # version of the worker registry that it has loaded
        self._asking: asyncio.Task[None] | None = None
        self._failed: RockError | None = None
        self._placed: dict[str, list[tuple[str, float]]] = {}  # (worker, GPUs) by the sandboxes that start there

    @property
    def exclusive(self) -> bool:
        """Whether each sandbox has a worker of its own, which ends with it."""
        return self.reservations is not None and self.reservations.exclusive

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)

    async def place(self, sandbox_id: str, config: SandboxConfig) -> Worker:
        """Choose a worker; call `landed` when the start is over, or is abandoned."""
        await self._known()
        if config.volumes or config.snapshot is not None:
            return self._pinned(config)
        try:
            name = self._scheduler.place(config)
        except NoCapacity:
            await self._known(_NEW)  # sandboxes that stopped since the last report free capacity
            name = self._scheduler.place(config)
        if self._workers.is_failing(name):  # the next report excludes it
            self._scheduler.landed(name, config.num_gpus or 0.0)
            await self._known(0.0)
            name = self._scheduler.place(config)
        self._placed.setdefault(sandbox_id, []).append((name, config.num_gpus or 0.0))
        return self._there(name)

    async def awaited(self, sandbox_id: str, config: SandboxConfig, seconds: float) -> Worker:
        """`place`, with retries while no worker has capacity; after `seconds` the error of the last one."""
        end = time.monotonic() + seconds
        changed = asyncio.Event()

        def ready(_: str) -> None:
            changed.set()

        self._workers.on_ready.append(ready)
        try:
            while True:
                changed.clear()
                try:
                    return await self.place(sandbox_id, config)
                except (NoCapacity, Unavailable):
                    if (left := end - time.monotonic()) <= 0:
                        raise
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(_AGAIN, left)):
                        await changed.wait()
        finally:
            self._workers.on_ready.remove(ready)

    async def place_group(
        self, ids: list[str], config: SandboxConfig, placement: Placement, whole: bool
    ) -> list[Worker]:
        """Workers for the first of these sandboxes, with `whole` for all of them."""
        await self._known(_NEW)
        if config.volumes or config.snapshot is not None:
            return [self._pinned(config)] * len(ids)
        names = self._scheduler.place_group(config, len(ids), placement, whole)
        for sandbox_id, name in zip(ids, names, strict=False):
            self._placed.setdefault(sandbox_id, []).append((name, config.num_gpus or 0.0))
        return [self._there(name) for name in names]

    def _pinned(self, config: SandboxConfig) -> Worker:
        """The worker of its volumes or its snapshot, which rejects what exceeds its capacity. Unavailable."""
        what = "the snapshot" if config.snapshot is not None else "the volumes"
        name = (config.volumes[0].worker if config.volumes else config.snapshot_worker) or ""
        if name not in self.statuses:
            away = name not in self._workers or self._workers.is_silent(name) or self._workers.is_failing(name)
            raise Unavailable(f"worker {name}, which has {what} of the sandbox, accepts no sandboxes now",
                              hint="retry when it is ready: rock worker ls", details=OUTAGE if away else None)
        return self._there(name)

    def _there(self, name: str) -> Worker:
        worker = self._workers.get(name)
        if worker is None:
            raise Unavailable(f"worker {name} went away just now", hint="retry", details=OUTAGE)
        return worker

    async def reserve(self, record: Record) -> Worker:
        """The worker that the cluster's scheduler chooses, once it has joined. There is no time limit."""
        assert self.reservations is not None
        kept_on = record.info.worker if record.info.kept else None
        name = await self.reservations.reserve(record.id, record.config, kept_on)
        worker = await self._came(name)
        await worker.check(record.config)
        return worker

    async def _came(self, name: str) -> Worker:
        """The worker, as soon as it accepts commands: a node that the cluster starts for this takes a while."""
        changed = asyncio.Event()

        def tell(_: str) -> None:
            changed.set()

        self._workers.on_ready.append(tell)
        try:
            while not self._workers.is_ready(name):
                await changed.wait()
                changed.clear()
            return self._workers[name]
        finally:
            self._workers.on_ready.remove(tell)

    async def check(self, config: SandboxConfig) -> None:
        """Raise the errors that a create would raise at once on some worker, when the worker is not chosen yet."""
        if config.snapshot is not None:
            raise Unsupported("snapshot: a Ray cluster chooses the worker of a sandbox, and a snapshot is on one",
                              hint="use the scheduler of ROCK, or leave snapshot unset")  # fmt: skip
        if config.volumes:
            raise Unsupported("volumes: the cluster decides on which worker a sandbox runs, and volumes stay on one",
                              hint="use the scheduler of ROCK, or leave volumes unset")  # fmt: skip
        if self.reservations is not None:
            self.reservations.check(config)
            if self.reservations.exclusive:
                return  # each worker has a sandbox already
        for worker in self._workers.values():
            with contextlib.suppress(Unavailable):
                await worker.check(config)
                return

    async def sweep(self, store: Store) -> None:
        """Release the reservations of ended or unknown sandboxes."""
        if self.reservations is None:
            return
        for sandbox_id in await self.reservations.held():
            record = await store.get(sandbox_id)
            if record is None or record.state not in _HOLDING:
                log.warning("sandbox %s is over; what was set aside for it is given back", sandbox_id)
                await self.reservations.release(sandbox_id)

    def landed(self, sandbox_id: str) -> None:
        """Its start succeeded or failed."""
        for name, gpus in self._placed.pop(sandbox_id, ()):
            self._scheduler.landed(name, gpus)

    async def refresh(self) -> None:
        """Load current reports, after a worker has rejected a sandbox that its last report had capacity for."""
        with contextlib.suppress(Unavailable):
            await self._known(0.0)

    def status(self, name: str) -> NodeStatus | None:
        """The last report of a worker."""
        return self.statuses.get(name)

    async def _known(self, stale: float = _STALE) -> None:
        """Ensure that there are reports, none older than `stale` seconds, and request newer ones. Unavailable."""
        age, gone = time.monotonic() - self._asked_at, self._version != self._workers.version
        if age <= min(_FRESH, stale) and not gone:
            if self._failed is not None:  # missing reports do not mean missing capacity
                raise self._failed
            return
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask(), name="worker reports")
        if age > stale or gone or len(self._workers) <= 1:
            await asyncio.shield(self._asking)
            if self._failed is not None:
                raise self._failed

    async def _ask(self) -> None:
        version = self._workers.version
        try:
            found, self._failed = await self._workers.statuses(_NEW), None
        except RockError as error:
            found, self._failed = {}, error
        self.statuses = found
        self._scheduler.report(found)
        self._asked_at, self._version = time.monotonic(), version
