"""The one background loop: deadlines, ends that workers tell of, and whatever a crash left undone."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import time

from rock.admin.lifecycle import Event
from rock.admin.service import Service
from rock.admin.worker import Worker
from rock.errors import NotFound, RockError
from rock.protocol.node import NodeSandbox
from rock.protocol.sandbox import Cause, State
from rock.store.base import Query, Record

log = logging.getLogger("rock.reconciler")

TOMBSTONES = 24 * 3600.0  # seconds that a stopped sandbox is remembered
_POLL = 30.0
_RETRY = 1.0


class Reconciler:
    """Makes the world and the records agree. Started once an admin; owns all its tasks."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._due: list[tuple[float, str]] = []  # (time of the next look, id)
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._checks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Settle what a former run left, then go on in the background."""
        self.service.on_schedule.append(self.schedule)
        self.service.on_unfinished.append(lambda sandbox_id: self._push(time.time() + _RETRY, sandbox_id))
        await self._settle()
        self._tasks = [
            asyncio.create_task(self._deadlines(), name="deadlines"),
            asyncio.create_task(self._prune(), name="prune"),
        ]
        self._tasks += [
            asyncio.create_task(self._follow(worker), name=f"events-{worker.name}")
            for worker in self.service.workers.values()
        ]

    async def close(self) -> None:
        tasks = [*self._tasks, *self._checks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- after a crash ----

    async def _settle(self) -> None:
        here: dict[str, dict[str, bool]] = {}
        for name, worker in self.service.workers.items():
            inventory = await worker.list()
            here[name] = {found.sandbox_id: found.alive for found in inventory.sandboxes}
        known: set[str] = set()
        after: tuple[float, str] | None = None
        while True:
            page = await self.service.store.list(
                Query(states=(State.PENDING, State.RUNNING, State.STOPPING), limit=500, after=after)
            )
            for record in page:
                known.add(record.id)
                await self._settle_one(record, here.get(record.info.worker or "", {}))
            if len(page) < 500:
                break
            after = (page[-1].info.created_at, page[-1].id)
        for name, sandboxes in here.items():
            for stray in sandboxes.keys() - known:
                log.warning("destroying sandbox %s: it has no record", stray)
                await self.service.workers[name].destroy(stray)

    async def _settle_one(self, record: Record, here: dict[str, bool]) -> None:
        alive = here.get(record.id, False)
        try:
            if record.state is State.PENDING:
                self.service.launch(record)  # create is idempotent: one that was made is found, not made again
            elif record.state is State.STOPPING:
                await self.service.finish_stop(record)
            elif alive:
                self.schedule(record)
            else:
                await self.service.apply(
                    record.id, Event.ENDED, cause=Cause.LOST, reason="it was gone when the server came back"
                )
        except RockError as error:
            log.error("settling %s: %s", record.id, error)

    # ---- deadlines ----

    def schedule(self, record: Record) -> None:
        """Look at a running sandbox when it may first be due."""
        config, now = record.config, time.time()
        times = [now + config.auto_clear_seconds] if config.auto_clear_seconds else []
        if config.timeout is not None:
            times.append((record.info.started_at or now) + config.timeout)
        if times:
            self._push(min(times), record.id)

    def _push(self, when: float, sandbox_id: str) -> None:
        heapq.heappush(self._due, (when, sandbox_id))
        if self._due[0] == (when, sandbox_id):
            self._wake.set()

    async def _deadlines(self) -> None:
        while True:
            self._wake.clear()
            delay = self._due[0][0] - time.time() if self._due else None
            if delay is None or delay > 0:
                try:
                    async with asyncio.timeout(delay if delay is None else min(delay, _POLL)):
                        await self._wake.wait()
                except TimeoutError:
                    pass
                continue
            _, sandbox_id = heapq.heappop(self._due)
            task = asyncio.create_task(self._look(sandbox_id))
            self._checks.add(task)
            task.add_done_callback(self._checks.discard)

    async def _look(self, sandbox_id: str) -> None:
        try:
            record = await self.service.load(sandbox_id)
            if record.state is State.PENDING:
                self.service.launch(record)
            elif record.state is State.STOPPING:
                await self.service.finish_stop(record)
            if record.state is not State.RUNNING:
                return
            config, now = record.config, time.time()
            if config.timeout is not None and now >= (record.info.started_at or now) + config.timeout:
                await self.service.stop(sandbox_id, Cause.DEADLINE, f"its time of {config.timeout:g} s was over")
                return
            found = await self._find(record)
            if found is None:
                return
            left = config.auto_clear_seconds - found.idle_seconds if config.auto_clear_seconds else float("inf")
            if left <= 0:
                await self.service.stop(sandbox_id, Cause.IDLE, f"it was idle for {config.auto_clear_seconds} s")
                return
            if config.timeout is not None:
                left = min(left, (record.info.started_at or now) + config.timeout - now)
            if left != float("inf"):
                self._push(now + left, sandbox_id)
        except NotFound:
            pass  # deleted meanwhile
        except RockError as error:
            log.warning("deadline of %s: %s; looking again", sandbox_id, error)
            self._push(time.time() + _RETRY, sandbox_id)
        except Exception:
            # Whatever it was: a sandbox that nobody looks at any more would run for ever.
            log.exception("deadline of %s; looking again", sandbox_id)
            self._push(time.time() + _POLL, sandbox_id)

    async def _find(self, record: Record) -> NodeSandbox | None:
        """The sandbox on its worker; None when it is not there any more, which is then recorded."""
        try:
            return await self.service.workers[record.info.worker or ""].get(record.id)
        except NotFound:
            await self.service.apply(record.id, Event.ENDED, cause=Cause.LOST, reason="its worker does not have it")
            return None

    # ---- ends ----

    async def _follow(self, worker: Worker) -> None:
        after, boot = 0, ""
        while True:
            try:
                news = await worker.events(after, _POLL)
                if boot and news.boot != boot:
                    boot, after = news.boot, 0
                    continue
                boot = news.boot
                for event in news.events:
                    with contextlib.suppress(NotFound):
                        await self.service.apply(event.sandbox_id, Event.ENDED, cause=event.cause, reason=event.reason)
                    after = max(after, event.number)  # not before it is recorded
            except Exception as error:
                log.warning("events of worker %s: %s", worker.name, error)
                await asyncio.sleep(_RETRY)

    async def _prune(self) -> None:
        while True:
            try:
                await self.service.store.prune(time.time() - TOMBSTONES)
            except Exception as error:
                log.warning("pruning: %s", error)
            await asyncio.sleep(600.0)
