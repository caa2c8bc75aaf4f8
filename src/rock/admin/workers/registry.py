"""The workers that there are now: those given at the start, and those that joined.

A server looks at the registry of the store each second. What it says of time is measured here alone: since when a
worker's count of heartbeats has stood still, by the monotonic clock of this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass

from rock.admin.workers.client import Worker
from rock.errors import NotFound, RockError, Unavailable
from rock.http.asgi import App
from rock.protocol.node import Beat, JoinWorker, Lease, NodeStatus, WorkerInfo, WorkerLease, WorkerState
from rock.protocol.routes import OUTAGE
from rock.store.base import Workers, unknown

log = logging.getLogger("rock.workers")

_LOOK = 1.0
_GAP = 3.0  # most seconds of silence that count from one look to the next
_ASK = 5.0  # seconds that a worker of ROCK_WORKERS may take to tell how it is
_STATUS_AGE = 1.0


@dataclass(frozen=True)
class Reached:
    """How one that joined is commanded, and how requests to its sandboxes are handed on. close: ends both; what is
    under way is answered as Unavailable. failing: whether it took no connection a moment ago."""

    worker: Worker
    app: App
    close: Callable[[], Awaitable[None]]
    failing: Callable[[], bool]


@dataclass
class _Member:
    info: WorkerInfo
    changed_at: float  # monotonic: when its heartbeats were last seen to go on
    reached: Reached
    status: NodeStatus | None  # of that heartbeat: the same object until the next, by which others know it
    joined: bool = True  # whether the worker knows its epoch: it has sent a heartbeat in it


class WorkerRegistry(Mapping[str, Worker]):
    """Workers by name. fixed: those of the start. apps: the data plane of each; kept up to date. reach: how those that
    join are reached; without it none may.

    on_change: called with a name when one came, came back under another epoch, or went.
    """

    def __init__(
        self, fixed: Mapping[str, Worker], apps: dict[str, App], registry: Callable[[], Workers] | None = None,
        reach: Callable[[WorkerInfo], Reached] | None = None, lease: Lease | None = None,
    ) -> None:  # fmt: skip
        self.fixed = fixed
        self.apps = apps
        self.lease = lease or Lease.of(10.0)
        self.on_change: list[Callable[[str], None]] = []
        self.version = 0  # grows when one comes, goes, or is drained
        self._joining: dict[str, int] = {}  # epochs that were given here, and in which no heartbeat came yet
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

    # ---- life ----

    async def open(self) -> None:
        """Know who joined, from now on."""
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
        """Look at the registry now. Unavailable."""
        if self._registry is None or self._reach is None:
            return
        async with self._looking:
            found = {info.name: info for info in await self._registry().list() if info.name not in self.fixed}
            now = time.monotonic()
            unheard = now - self._looked_at - _GAP
            if unheard > 0:  # this process stood still, or the store: nobody could be heard
                for member in self._members.values():
                    member.changed_at += unheard
            self._looked_at = now
            self._lost = {name: info for name, info in found.items() if info.is_lost}
            changed = []
            for name in [name for name in self._members if name not in found or found[name].is_lost]:
                log.warning("worker %s is gone", name)
                await self._forget(name)
                changed.append(name)
            for name, info in found.items():
                if not info.is_lost and await self._seen(name, info, now):
                    changed.append(name)
        self.version += bool(changed)
        for name in changed:
            for listener in self.on_change:
                listener(name)

    async def _seen(self, name: str, info: WorkerInfo, now: float) -> bool:
        """Remember what is known of it; whether it has to be looked after anew."""
        assert self._reach is not None
        member = self._members.get(name)
        if member is not None and (member.info.epoch, member.info.url) == (info.epoch, info.url):
            self.version += member.info.state is not info.state
            member.joined |= self._joining.get(name) != info.epoch
            if member.info.beat != info.beat:
                member.changed_at, member.status = now, info.status
            member.info = info
            return False
        if member is not None:
            await self._forget(name)
        log.info("worker %s at %s, epoch %d", name, info.url, info.epoch)
        made = self._reach(info)
        self._members[name] = _Member(info, now, made, info.status, self._joining.get(name) != info.epoch)
        self.apps[name] = made.app
        return True

    async def _forget(self, name: str) -> None:
        member = self._members.pop(name)
        self.version += 1
        self.apps.pop(name, None)
        with contextlib.suppress(Exception):
            await member.reached.close()

    # ---- what is known ----

    def is_failing(self, name: str) -> bool:
        """Whether a worker that joined took no connection a moment ago."""
        member = self._members.get(name)
        return member is not None and member.reached.failing()

    def is_silent(self, name: str) -> bool:
        """Whether a worker that joined has sent no heartbeat for longer than its lease."""
        member = self._members.get(name)
        return member is not None and member.changed_at < time.monotonic() - self.lease.fence

    def silent(self) -> list[WorkerInfo]:
        """Those that have not been heard of for so long that they are lost."""
        now = time.monotonic()
        if now - self._looked_at > _GAP:
            return []  # nobody listened: the next look tells since when they are silent
        limit = now - self.lease.lost
        return [member.info for member in self._members.values() if member.changed_at < limit]

    def lost(self) -> list[str]:
        """Names of those that the registry holds for lost."""
        return list(self._lost)

    def lost_epochs(self) -> dict[str, int]:
        """Those, with the epochs in which they were lost."""
        return {name: info.epoch for name, info in self._lost.items()}

    def is_known(self, name: str) -> bool:
        """Whether it is there, or was and is remembered."""
        return name in self.fixed or name in self._members or name in self._lost

    async def statuses(self, age: float = _STATUS_AGE) -> dict[str, NodeStatus]:
        """What those report that may be given sandboxes, a few seconds old at most: a worker refuses by itself what it
        has no room for. age: seconds, for those that are asked."""
        await self._ask_fixed(age)
        limit = time.monotonic() - self.lease.fence  # it may have given up since
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
        """What one of them reported last, a few seconds old at most."""
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
        """All that are known, lost ones too."""
        asked = await asyncio.gather(*(_ask(worker) for worker in self.fixed.values()))
        fixed = [
            WorkerInfo(name=name, status=status, state=WorkerState.LOST if status is None else WorkerState.READY)
            for name, status in zip(self.fixed, asked, strict=True)
        ]
        joined = [] if self._registry is None else await self._registry().list()
        return [*fixed, *(self._seen_now(info) for info in joined)]

    def _seen_now(self, info: WorkerInfo) -> WorkerInfo:
        """A row of the registry, with what is known here of how long its worker is silent."""
        if info.is_lost or not self.is_silent(info.name):
            return info
        return info.model_copy(update={"state": WorkerState.UNREACHABLE})

    # ---- what workers and operators ask ----

    async def join(self, spec: JoinWorker) -> WorkerLease:
        """Conflict, Unavailable."""
        if spec.name in self.fixed:
            raise NotFound(f"{spec.name} is a worker of ROCK_WORKERS", hint="choose another --name")
        info = await self._table().join(spec)
        if info.epoch != spec.epoch:
            self._joining[info.name] = info.epoch  # it does not know that before it has our answer
        await self.refresh()
        return self._leased(info)

    async def beat(self, name: str, beat: Beat) -> WorkerLease:
        """Conflict when its lease is over; NotFound, Unavailable."""
        info = await self._table().beat(name, beat)
        if self._joining.get(name) == info.epoch:
            del self._joining[name]
            await self.refresh()  # from here on it may be given sandboxes
        return self._leased(info)

    async def drain(self, name: str, draining: bool) -> WorkerInfo:
        """NotFound."""
        info = await self._table().drain(name, draining)
        await self.refresh()
        return info

    async def lose(self, info: WorkerInfo, surely: bool = False) -> bool:
        """Take one for lost that has been silent; `surely`, whatever it did meanwhile."""
        return await self._table().lose(info.name, info.epoch, None if surely else info.beat)

    async def remove(self, name: str) -> None:
        """Forget a lost one. Conflict, NotFound."""
        await self._table().remove(name)
        await self.refresh()

    async def info(self, name: str) -> WorkerInfo:
        """One that joined. NotFound."""
        for info in await self._table().list():
            if info.name == name:
                return info
        raise unknown(name)

    def _table(self) -> Workers:
        if self._registry is None or self._reach is None:
            raise NotFound("no worker can join this server")
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
