"""The current workers: those given at the start, and those that joined.

A server reads the registry in the store each second. Only the monotonic clock of this process measures silence: the
time since the heartbeat count of a worker last changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rock.admin.workers.client import Worker
from rock.errors import Conflict, NotFound, RockError, Unavailable
from rock.http.asgi import App
from rock.protocol.node import PROCESS, Beat, JoinWorker, Lease, NodeStatus, WorkerInfo, WorkerLease, WorkerState
from rock.protocol.routes import OUTAGE
from rock.store.base import Workers, unknown

log = logging.getLogger("rock.workers")

_LOOK = 1.0
_GAP = 3.0  # maximum seconds of silence that count between two reads
_ASK = 5.0  # timeout in seconds for the status of a worker of ROCK_WORKERS
_STATUS_AGE = 1.0


@dataclass(frozen=True)
class Reached:
    """The client of a worker that joined, and the application that forwards requests to its sandboxes. close: ends
    both; requests in progress fail with Unavailable. failing: whether it accepted no connection a moment ago."""

    worker: Worker
    app: App
    close: Callable[[], Awaitable[None]]
    failing: Callable[[], bool]


@dataclass
class _Member:
    info: WorkerInfo
    changed_at: float  # monotonic: when its heartbeat count was last seen to change
    reached: Reached
    status: NodeStatus | None  # of that heartbeat: the same object until the next one, by which callers detect changes
    joined: bool = True  # whether the worker knows its epoch: it has sent a heartbeat in it


class WorkerRegistry(Mapping[str, Worker]):
    """Workers by name. fixed: those of the start. apps: the data plane of each; updated. reach: connects to workers
    that join; without it none may join.

    on_change: called with a name when a worker joined, joined again under another epoch, or left. on_ready: called
    with a name when a worker that joined knows its epoch: before that it refuses commands.
    """

    def __init__(
        self, fixed: Mapping[str, Worker], apps: dict[str, App], registry: Callable[[], Workers] | None = None,
        reach: Callable[[WorkerInfo], Reached] | None = None, lease: Lease | None = None,
    ) -> None:  # fmt: skip
        self.fixed = fixed
        self.apps = apps
        self.lease = lease or Lease.of(10.0)
        self.on_change: list[Callable[[str], None]] = []
        self.on_ready: list[Callable[[str], None]] = []
        # fields of DirectAccess with the address of a worker, and the key that signs tokens for it
        self.direct: Callable[[WorkerInfo], tuple[dict[str, Any], str] | None] = lambda info: None
        self.check_join: Callable[[JoinWorker], Awaitable[None]] | None = None  # raises for one that must not join
        self.processes: Mapping[str, str] = {}  # URLs by name of the rocklets that this server has started
        self.version = 0  # grows when a worker joins, leaves, or is drained
        self._in_join: Counter[str] = Counter()  # requests to join that are being saved, by worker
        self._joining: dict[str, int] = {}  # epochs that were assigned here, and without a heartbeat yet
        self._registry = registry
        self._reach = reach
        self._members: dict[str, _Member] = {}
        self._lost: dict[str, WorkerInfo] = {}
        self._task: asyncio.Task[None] | None = None
        self._looking = asyncio.Lock()
        self._looked_at = float("-inf")
        self._asked: dict[str, NodeStatus] = {}
        self._asked_at = float("-inf")

    # ---- Mapping ----

    def __getitem__(self, name: str) -> Worker:
        member = self._members.get(name)
        return self.fixed[name] if member is None else member.reached.worker

    def __contains__(self, name: object) -> bool:
        return name in self._members or name in self.fixed

    def __iter__(self) -> Iterator[str]:
        return iter([*self.fixed, *self._members])

    def __len__(self) -> int:
        return len(self.fixed) + len(self._members)

    # ---- start and stop ----

    async def open(self) -> None:
        """Read the registry, and follow it from now on."""
        if self._reach is None:
            return
        await self.refresh()
        self._task = asyncio.create_task(self._follow(), name="workers")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        for name in list(self._members):
            await self._forget(name)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_LOOK)
            try:
                await self.refresh()
            except Exception as error:
                log.warning("who joined cannot be seen: %r; trying again", error)

    async def refresh(self) -> None:
        """Read the registry now. Unavailable."""
        if self._registry is None or self._reach is None:
            return
        async with self._looking:
            found = {info.name: info for info in await self._registry().list() if self._is_member(info)}
            now = time.monotonic()
            unheard = now - self._looked_at - _GAP
            if unheard > 0:  # this process or the store was suspended: no heartbeat could be seen
                for member in self._members.values():
                    member.changed_at += unheard
            self._looked_at = now
            self._lost = {name: info for name, info in found.items() if info.is_lost}
            changed, ready = [], []
            for name in [name for name in self._members if name not in found or found[name].is_lost]:
                log.warning("worker %s is gone", name)
                await self._forget(name)
                changed.append(name)
            for name, info in found.items():
                if info.is_lost:
                    continue
                before = self.is_ready(name)
                if await self._seen(name, info, now):
                    changed.append(name)
                if self.is_ready(name) and (not before or name in changed):
                    ready.append(name)
        self._notify(changed, ready)

    def _is_member(self, info: WorkerInfo) -> bool:
        """Whether a row of the registry is one to follow: not that of a process which this server does not run."""
        return info.name not in self.fixed and (not info.url.startswith(PROCESS) or info.name in self.processes)

    async def _learn(self, info: WorkerInfo) -> None:
        """One row of the registry, without the others: a thousand workers that join read each row once."""
        async with self._looking:
            name = info.name
            member, before = self._members.get(name), self.is_ready(name)
            if member is not None and (member.info.epoch, member.info.beat) > (info.epoch, info.beat):
                return  # a later one was read meanwhile
            changed = await self._seen(name, info, time.monotonic())
            ready = self.is_ready(name) and (not before or changed)
            self._lost.pop(name, None)
        self._notify([name] if changed else [], [name] if ready else [])

    def _notify(self, changed: Sequence[str], ready: Sequence[str]) -> None:
        self.version += bool(changed)
        for name in changed:
            for listener in self.on_change:
                listener(name)
        for name in ready:
            for listener in self.on_ready:
                listener(name)

    async def _seen(self, name: str, info: WorkerInfo, now: float) -> bool:
        """Update the state of a worker; returns whether it needs to be settled again."""
        assert self._reach is not None
        member = self._members.get(name)
        if member is not None and (member.info.epoch, member.info.url) == (info.epoch, info.url):
            self.version += member.info.state is not info.state
            member.joined |= self._knows(name, info.epoch)
            if member.info.beat != info.beat:
                member.changed_at, member.status = now, info.status
            member.info = info
            return False
        if member is not None:
            await self._forget(name)
        log.info("worker %s at %s, epoch %d", name, info.url, info.epoch)
        made = self._reach(info)
        self._members[name] = _Member(info, now, made, info.status, self._knows(name, info.epoch))
        self.apps[name] = made.app
        return True

    def _knows(self, name: str, epoch: int) -> bool:
        """Whether a worker knows the epoch of its row: not while a request to join is saved, which may have set it."""
        return self._joining.get(name) != epoch and name not in self._in_join

    async def _forget(self, name: str) -> None:
        member = self._members.pop(name)
        self.version += 1
        self.apps.pop(name, None)
        with contextlib.suppress(Exception):
            await member.reached.close()

    # ---- lookup ----

    def required(self, name: str | None) -> Worker:
        """The worker of that name. Unavailable when it is lost, or not known here yet."""
        worker = self.get(name or "")
        if worker is None:
            raise Unavailable(f"worker {name} is not there now", hint="retry when it is back: rock worker ls",
                              details=OUTAGE)  # fmt: skip
        return worker

    async def current(self, name: str | None) -> Worker | None:
        """A worker; None for a lost or removed one, by the current registry. Unavailable."""
        if name and name not in self and name not in self._lost:
            await self.refresh()
        return self.get(name or "")

    # ---- state of workers ----

    def is_ready(self, name: str) -> bool:
        """Whether a worker is there and knows its epoch."""
        member = self._members.get(name)
        return name in self.fixed if member is None else member.joined

    def is_failing(self, name: str) -> bool:
        """Whether a worker that joined accepted no connection a moment ago."""
        member = self._members.get(name)
        return member is not None and member.reached.failing()

    def is_silent(self, name: str) -> bool:
        """Whether a worker that joined has sent no heartbeat for longer than its lease."""
        member = self._members.get(name)
        return member is not None and member.changed_at < time.monotonic() - self.lease.fence

    def silent(self) -> list[WorkerInfo]:
        """Workers that have been silent for so long that they are to be declared lost."""
        now = time.monotonic()
        if now - self._looked_at > _GAP:
            return []  # no heartbeats were read; the next read restarts the measurement
        limit = now - self.lease.lost
        return [member.info for member in self._members.values() if member.changed_at < limit]

    def sandboxes_of(self, names: Iterable[str]) -> int:
        """The number of sandboxes of some workers that joined, by their last heartbeats."""
        statuses = [self._members[name].status for name in names if name in self._members]
        return sum(status.sandboxes for status in statuses if status is not None)

    def lost(self) -> list[str]:
        """Names of lost workers in the registry."""
        return list(self._lost)

    def lost_epochs(self) -> dict[str, int]:
        """Lost workers, with the epochs in which they were lost."""
        return {name: info.epoch for name, info in self._lost.items()}

    def is_known(self, name: str) -> bool:
        """Whether it is a current worker, or is in the registry, or is a process that starts."""
        return name in self.fixed or name in self._members or name in self._lost or name in self.processes

    async def statuses(self, age: float = _STATUS_AGE) -> dict[str, NodeStatus]:
        """Reports of the workers that accept sandboxes, at most a few seconds old: a worker itself rejects sandboxes
        that exceed its capacity. age: maximum age in seconds of requested reports."""
        await self._ask_fixed(age)
        limit = time.monotonic() - self.lease.fence  # it may have given up its lease since
        joined = {
            name: member.status
            for name, member in self._members.items()
            if member.info.state is WorkerState.READY and member.status is not None
            and member.changed_at > limit and member.joined and not member.reached.failing()
        }
        if not self._asked and not joined and len(self):
            away = any(member.info.state is WorkerState.READY for member in self._members.values())
            raise Unavailable("no worker takes sandboxes now: they are not reached, or are being drained", hint="retry",
                              details=OUTAGE if away else None)  # fmt: skip
        return {**self._asked, **joined}

    async def status(self, name: str) -> NodeStatus | None:
        """The last report of a worker, at most a few seconds old."""
        if name in self.fixed:
            await self._ask_fixed(_STATUS_AGE)
            return self._asked.get(name)
        member = self._members.get(name)
        return member.status if member is not None else None

    async def _ask_fixed(self, age: float) -> None:
        if time.monotonic() - self._asked_at > age:
            asked = await asyncio.gather(*(_ask(worker) for worker in self.fixed.values()))
            self._asked = {name: status for name, status in zip(self.fixed, asked, strict=True) if status is not None}
            self._asked_at = time.monotonic()

    async def infos(self) -> list[WorkerInfo]:
        """All workers, including lost ones."""
        asked = await asyncio.gather(*(_ask(worker) for worker in self.fixed.values()))
        fixed = [
            WorkerInfo(name=name, status=status, state=WorkerState.LOST if status is None else WorkerState.READY)
            for name, status in zip(self.fixed, asked, strict=True)
        ]
        joined = [] if self._registry is None else await self._registry().list()
        return [*fixed, *(self._seen_now(info) for info in joined)]

    def _seen_now(self, info: WorkerInfo) -> WorkerInfo:
        """A row of the registry, with the silence of its worker as measured here."""
        if info.is_lost or not self.is_silent(info.name):
            return info
        return info.model_copy(update={"state": WorkerState.UNREACHABLE})

    # ---- requests of workers and operators ----

    async def join(self, spec: JoinWorker) -> WorkerLease:
        """A worker joins. Conflict, Unavailable."""
        if spec.name in self.fixed:
            raise NotFound(f"{spec.name} is a worker of ROCK_WORKERS", hint="choose another --name")
        if spec.url.startswith(PROCESS) and self.processes.get(spec.name) != spec.url:
            raise NotFound(f"{spec.name} is no process of this server", hint="choose another --name")
        if self.check_join is not None:
            await self.check_join(spec)
        self._in_join[spec.name] += 1
        try:
            info = await self._table().join(spec)
        finally:
            self._in_join[spec.name] -= 1
            if not self._in_join[spec.name]:
                del self._in_join[spec.name]
        if info.epoch != spec.epoch:
            self._joining[info.name] = info.epoch  # the worker does not know its epoch before it has the response
        await self._learn(info)
        return self._leased(info)

    async def beat(self, name: str, beat: Beat) -> WorkerLease:
        """A heartbeat. Conflict when its lease is over; NotFound, Unavailable."""
        info = await self._table().beat(name, beat)
        if self._joining.get(name) == info.epoch:
            del self._joining[name]
            await self._learn(info)  # from here on it may get sandboxes
        return self._leased(info)

    async def drain(self, name: str, draining: bool, evacuating: bool = False) -> WorkerInfo:
        """Set whether a worker is drained, and whether its sandboxes are archived. NotFound."""
        info = await self._table().drain(name, draining, evacuating)
        await self.refresh()
        return info

    def joined(self, name: str) -> WorkerInfo | None:
        """A worker that joined and is not silent."""
        member = self._members.get(name)
        return None if member is None or self.is_silent(name) else member.info

    def evacuating(self) -> list[str]:
        """Workers whose sandboxes are to be archived: by a drain, or as the worker itself requests."""
        infos = [member.info for member in self._members.values()]
        return [one.name for one in infos if one.evacuating or (one.status is not None and one.status.evacuate)]

    async def lose(self, info: WorkerInfo, surely: bool = False) -> bool:
        """Declare a silent worker lost; with `surely`, also when it sent a heartbeat meanwhile."""
        return await self._table().lose(info.name, info.epoch, None if surely else info.beat)

    async def remove(self, name: str) -> None:
        """Remove a lost worker. Conflict, NotFound."""
        await self._table().remove(name)
        await self.refresh()

    async def dismiss(self, name: str) -> None:
        """Remove a worker whose machine is gone for good. The next refresh shows it."""
        member = self._members.get(name)
        info = member.info if member is not None else self._lost.get(name)
        if info is None:
            return
        await self._table().lose(name, info.epoch)
        with contextlib.suppress(Conflict, NotFound):
            await self._table().remove(name)

    async def info(self, name: str) -> WorkerInfo:
        """A worker that joined. NotFound."""
        for info in await self._table().list():
            if info.name == name:
                return info
        raise unknown(name)

    def _table(self) -> Workers:
        if self._registry is None or self._reach is None:
            raise NotFound("this server accepts no workers",
                           hint="start it with ROCK_WORKERS=none; workers can join such a server")
        return self._registry()

    def _leased(self, info: WorkerInfo) -> WorkerLease:
        return WorkerLease(name=info.name, epoch=info.epoch, seconds=self.lease.fence, stop=self.lease.stop,
                           beat=self.lease.beat, draining=info.draining)  # fmt: skip


async def _ask(worker: Worker) -> NodeStatus | None:
    try:
        async with asyncio.timeout(_ASK):
            return await worker.status()
    except (RockError, TimeoutError) as error:
        log.warning("worker %s: %r", worker.name, error)
        return None
