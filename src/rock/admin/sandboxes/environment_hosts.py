"""Placement of environments: selects the sandbox that hosts a new one.

Environments of one tenant and package set share sandboxes. A sandbox hosts at most PIPED environments, so that each has
pipes of its own, and no more than fit its memory according to the usage of the existing ones. The least loaded sandbox
is selected. Another one is started when all are full, or when the least loaded one uses its CPU and the cluster has
idle cores.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from rock.admin.workers.placement import Placer
from rock.admin.workers.registry import WorkerRegistry
from rock.envhub import registry
from rock.errors import NoCapacity, QuotaExceeded, RockError
from rock.protocol.env import LEASED, PIPED, OpenEnv
from rock.protocol.keys import Caller
from rock.protocol.node import NodeSandbox
from rock.protocol.sandbox import SandboxConfig, SandboxInfo, State
from rock.store.base import Query, Record, Store

_LABEL = "rock.env"
_FRESH = 0.5  # seconds for which a measurement is used
_GRANTED = 30.0  # seconds after which an environment that was opened and never made is no longer counted
_BUSY = 0.7  # share of its CPUs above which a sandbox is busy
_FULL = 0.85  # share of its memory above which a sandbox accepts no more environments
_MOST = 1000  # sandboxes of one package set and tenant that are checked


@dataclass
class _Load:
    """The load of a sandbox that hosts environments. granted: opened here, and not made yet."""

    hosted: int = 0
    made: int = 0
    granted: int = 0
    granted_at: float = 0.0
    measured_at: float = 0.0
    cpu_seconds: float | None = None
    cpu_share: float = 0.0
    memory: int = 0

    @property
    def count(self) -> int:
        return self.hosted + self.granted

    def grant(self, now: float) -> None:
        self.granted += 1
        self.granted_at = now

    def measure(self, found: NodeSandbox, cpus: float, now: float) -> None:
        hosted, made = found.environments or (0, 0)
        new = made - self.made if made >= self.made else made  # its rocklet counts from its own start
        self.granted = max(0, self.granted - new) if now - self.granted_at < _GRANTED else 0
        self.hosted, self.made = hosted, made
        usage = found.usage
        if usage is not None:
            self.memory = usage.memory_bytes or 0
            if usage.cpu_seconds is not None and self.cpu_seconds is not None and now > self.measured_at:
                self.cpu_share = (usage.cpu_seconds - self.cpu_seconds) / (now - self.measured_at) / max(cpus, 0.01)
            self.cpu_seconds = usage.cpu_seconds
        self.measured_at = now

    def fits(self, config: SandboxConfig) -> bool:
        each = self.memory / self.hosted if self.hosted else 0.0
        return self.count < PIPED and self.memory + each * (self.granted + 1) < _FULL * config.memory_bytes


class EnvironmentHosts:
    """Sandboxes that host environments, existing or new. started: waits for the start of a sandbox, up to a number of
    seconds. insert: creates a sandbox, see `Service.insert`."""

    def __init__(
        self, store: Store, workers: WorkerRegistry, placer: Placer,
        started: Callable[[Record, float], Awaitable[SandboxInfo]],
        insert: Callable[[SandboxConfig, str | None, Caller], Awaitable[Record]],
    ) -> None:  # fmt: skip
        self._store = store
        self._workers = workers
        self._placer = placer
        self._started = started
        self._insert = insert
        self._lock = asyncio.Lock()
        self._loads: dict[str, _Load] = {}

    async def open(self, spec: OpenEnv, wait: float, key: str | None, caller: Caller) -> SandboxInfo:
        """A sandbox that can host the environment: an existing one of its package set and this tenant, else a new
        one."""
        image = registry.image_for(spec)
        known = await self._store.by_key(key, caller.owner) if key else None
        if known is not None:
            return await self._started(known, wait)
        if spec.exclusive:
            return await self._started(await self._create(image, spec, key, caller), wait)
        async with self._lock:  # two concurrent first requests must not start two sandboxes
            record = await self._placed(image, spec, key, caller)
        return await self._started(record, wait)

    async def _placed(self, image: str, spec: OpenEnv, key: str | None, caller: Caller) -> Record:
        shared = spec.protocol == "task"  # instances of a training set are found by name, so they are in one sandbox
        limit = 1 if shared else _MOST
        query = Query((State.RUNNING, State.PENDING), labels={_LABEL: image}, limit=limit, tenant=caller.owner)
        hosts = await self._store.list(query)
        if shared:
            return hosts[0] if hosts else await self._create(image, spec, key, caller)
        hosts = [record for record in hosts if await self._measured(record)]
        fitting = [record for record in hosts if self._loads[record.id].fits(record.config)]
        best = min(fitting, key=lambda record: self._loads[record.id].count, default=None)
        if best is None or self._should_spread(best, len(hosts)):
            try:
                best = await self._create(image, spec, key, caller)
            except (NoCapacity, QuotaExceeded):
                if not hosts:
                    raise
                # Environments beyond those with pipes are used through the server.
                best = best or min(hosts, key=lambda record: self._loads[record.id].count)
        self._loads.setdefault(best.id, _Load()).grant(time.monotonic())
        if len(self._loads) > 2 * _MOST:
            self._loads = {id: load for id, load in self._loads.items() if time.monotonic() - load.measured_at < 60}
        return best

    def _should_spread(self, best: Record, hosts: int) -> bool:
        """Whether the least loaded sandbox is busy, and there are cores that none of these sandboxes uses."""
        load = self._loads[best.id]
        cores = sum(status.cpus for status in self._placer.statuses.values())
        return load.hosted > 0 and load.cpu_share > _BUSY and hosts < cores

    async def _measured(self, record: Record) -> bool:
        """Measure a sandbox unless a fresh measurement exists; False where its worker does not respond."""
        load = self._loads.setdefault(record.id, _Load())
        now = time.monotonic()
        if record.state is not State.RUNNING or now - load.measured_at < _FRESH:
            return True
        try:
            found = await self._workers.required(record.info.worker).get(record.id, usage=True)
        except RockError:
            return False
        load.measure(found, record.config.cpus, now)
        return found.alive

    async def _create(self, image: str, spec: OpenEnv, key: str | None, caller: Caller) -> Record:
        config = spec.config or env_host()
        config = config.model_copy(
            update={
                "image": image,
                "labels": config.labels if spec.exclusive else {**config.labels, _LABEL: image},
                # The first start installs the packages.
                "startup_timeout": max(config.startup_timeout, 1200.0),
            }
        )
        return await self._insert(config, key, caller)


def env_host() -> SandboxConfig:
    """The default sandbox that hosts environments."""
    return SandboxConfig(image="host", memory="4g", cpus=1.0, auto_clear_seconds=600, labels={LEASED: "1"})
