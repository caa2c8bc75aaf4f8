"""Warm pools of tenants: definitions in the store, their distribution to the workers, and their states (decision 57).

The leader sends each worker all of its pools every few seconds, so a worker needs no memory of them: after a restart of
the server or the worker, the pools are filled again. A definition in the store keeps its snapshot.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from pydantic import ValidationError

from rock.admin.snapshots import Snapshots
from rock.admin.workers.client import Worker
from rock.admin.workers.registry import WorkerRegistry
from rock.errors import InvalidConfig, NotFound, RockError
from rock.protocol.pools import (
    BUDGET,
    NodePool,
    NodePools,
    NodePoolState,
    NodePoolStates,
    PoolInfo,
    SetPool,
    StoredPool,
)
from rock.protocol.sandbox import NAME_PATTERN, SandboxConfig
from rock.protocol.wire import explain
from rock.store.base import Store
from rock.store.pools import unknown

log = logging.getLogger("rock.admin")
_EVERY = 2.0  # seconds between two distributions
_PATIENCE = 5.0  # seconds for the response of a worker


class Pools:
    """The pools of all tenants. budget: of the live configuration, see PoolRules."""

    def __init__(self, store: Store, workers: WorkerRegistry, snapshots: Snapshots) -> None:
        self._store = store
        self._workers = workers
        self._snapshots = snapshots
        self.budget: Callable[[], int] = lambda: BUDGET
        self._changed = asyncio.Event()
        self._sent: set[str] = set()  # workers that have pools

    # ---- definitions ----

    async def set(self, tenant: str, name: str, spec: SetPool,
                  allowed: Callable[[SandboxConfig], Awaitable[SandboxConfig]]) -> PoolInfo:
        """Define a pool, or replace its definition. allowed: checks what the caller may request. InvalidConfig,
        Forbidden, NotFound, Conflict, QuotaExceeded."""
        if not re.fullmatch(NAME_PATTERN, name):
            raise InvalidConfig(f"{name[:100]!r} is no name of a pool", hint="use letters, digits, dots and dashes")
        try:
            config = await allowed(spec.config())
        except ValidationError as error:
            raise explain(error, SetPool) from None
        if config.snapshot is not None:
            config = await self._snapshots.resolve(config, tenant)
        saved = await self._store.pools.save(StoredPool(
            tenant=tenant, name=name, created_at=time.time(), config=config, minimum=spec.minimum,
            maximum=spec.maximum))  # fmt: skip
        self._changed.set()
        return _info(saved, {})

    async def delete(self, tenant: str, name: str) -> PoolInfo:
        """Delete a pool; its unclaimed sandboxes end within seconds. NotFound."""
        found = await self._store.pools.find(tenant, name)
        if found is None:
            raise unknown(name)
        await self._store.pools.remove(tenant, name)
        self._changed.set()
        return _info(found, {})

    async def list(self, tenant: str | None) -> Sequence[PoolInfo]:
        """The pools of a tenant with their states; None is all tenants."""
        rows = await self._store.pools.list(tenant)
        if not rows:
            return []
        workers = [worker for worker in self._workers.values() if not self._workers.is_silent(worker.name)]
        found = await asyncio.gather(*(self._asked(worker) for worker in workers))
        states = {worker.name: one.pools for worker, one in zip(workers, found, strict=True)}
        return [_info(row, {worker: pools[row.id] for worker, pools in states.items() if row.id in pools})
                for row in rows]  # fmt: skip

    @staticmethod
    async def _asked(worker: Worker) -> NodePoolStates:
        try:
            async with asyncio.timeout(_PATIENCE):
                return await worker.pools()
        except (RockError, TimeoutError) as error:
            log.info("pools of worker %s: %r", worker.name, error)
            return NodePoolStates()

    # ---- distribution ----

    async def run(self) -> None:
        """Send the pools to the workers until it is cancelled."""
        while True:
            self._changed.clear()
            try:
                await self.distribute()
            except Exception as error:
                log.warning("sending the pools to the workers: %r; trying again", error)
            try:
                async with asyncio.timeout(_EVERY):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def distribute(self) -> None:
        """Send each worker its pools. A worker that never had one gets no request."""
        rows = await self._store.pools.list()
        self._sent.intersection_update(self._workers)
        wanted = {name: [row for row in rows if row.config.snapshot_worker in (None, name)] for name in self._workers}
        names = [name for name, pools in wanted.items() if (pools or name in self._sent)
                 and self._workers.is_ready(name) and not self._workers.is_silent(name)]  # fmt: skip
        await asyncio.gather(*(self._send(self._workers[name], wanted[name]) for name in names))

    async def _send(self, worker: Worker, rows: Sequence[StoredPool]) -> None:
        spec = NodePools(budget=self.budget(), pools=[
            NodePool(pool=row.id, config=row.config, minimum=row.minimum, maximum=row.maximum) for row in rows])
        self._sent.add(worker.name)
        try:
            async with asyncio.timeout(_PATIENCE):
                await worker.define_pools(spec)
        except NotFound:  # a worker of an older version
            log.info("worker %s has no pools: its version is older", worker.name)
        except (RockError, TimeoutError) as error:
            log.warning("the pools of worker %s: %r; trying again", worker.name, error)
            return
        if not rows:
            self._sent.discard(worker.name)


def _info(row: StoredPool, states: Mapping[str, NodePoolState]) -> PoolInfo:
    """A pool with the sum of its states by worker."""
    hits, misses = sum(one.hits for one in states.values()), sum(one.misses for one in states.values())
    return PoolInfo(
        name=row.name, tenant=row.tenant, image=row.config.image, snapshot=row.config.snapshot,
        memory=row.config.memory, network=row.config.network, minimum=row.minimum, maximum=row.maximum,
        created_at=row.created_at, ready=sum(one.ready for one in states.values()),
        target=sum(one.target for one in states.values()), hits=hits, misses=misses,
        hit_rate=hits / (hits + misses) if hits + misses else None,
        errors={worker: one.error for worker, one in states.items() if one.error},
    )  # fmt: skip
