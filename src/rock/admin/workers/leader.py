"""Leader election: of all admins that share a store, the holder of the lease runs the reconciler.

The lease has a fencing token that grows with each new holder. Every command of a reconciler has it (`FENCE`), and a
worker rejects a token below one that it has received. An admin that was suspended for a while, and does not know yet
that it is no longer the leader, therefore has no effect.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
import uuid
from collections.abc import Callable

from rock.admin.reconciler import Reconciler
from rock.admin.workers.client import FENCE
from rock.errors import RockError
from rock.store.base import Lease, Store

log = logging.getLogger("rock.reconciler")

LEASE = "reconciler"
_SECONDS = 6.0  # duration of a lease in seconds: the longest time without a reconciler after the leader crashes
_RENEW = 2.0
_TRY = 1.0


class Leader:
    """Runs the reconciler that `make` returns while this admin is the leader."""

    def __init__(self, store: Store, make: Callable[[], Reconciler]) -> None:
        self._store = store
        self._make = make
        self._holder = uuid.uuid4().hex
        self._reconciler: Reconciler | None = None
        self._lease: Lease | None = None
        self._until = 0.0
        self._task: asyncio.Task[None] | None = None
        self._starting: asyncio.Task[None] | None = None

    @property
    def token(self) -> int | None:
        """The fencing token of the held lease."""
        return self._lease.token if self._lease else None

    async def start(self) -> None:
        """With a store of its own an admin leads at once, and has settled unfinished operations of a crash when this
        returns."""
        if not self._store.shared:
            self._reconciler = self._make()
            await self._reconciler.start()
            return
        await self._look()
        if self._starting is not None:
            await asyncio.wait({self._starting}, timeout=_SECONDS)
        self._task = asyncio.create_task(self._hold(), name="leader")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        led = self._lease is not None
        await self._step_down("the server ends")
        if led:
            try:
                await self._store.drop_lease(LEASE, self._holder)  # the next leader need not wait for its expiry
            except RockError as error:
                log.info("giving the lease back: %s", error)

    async def _hold(self) -> None:
        while True:
            await asyncio.sleep(_RENEW if self._lease else _TRY)
            try:
                await self._look()
            except Exception:
                log.exception("the lease; trying again")

    async def _look(self) -> None:
        """Acquire or renew the lease."""
        asked = time.monotonic()
        try:
            async with asyncio.timeout(_RENEW):
                lease = await self._store.take_lease(LEASE, self._holder, _SECONDS)
        except (RockError, TimeoutError) as error:
            log.warning("the lease cannot be asked for: %r", error)
            if self._lease is not None and time.monotonic() > self._until - _RENEW:
                await self._step_down("the store does not answer")
            return
        if lease is None or (self._lease is not None and lease.token != self._lease.token):
            await self._step_down("another admin leads")
        if lease is not None:
            self._until = asked + _SECONDS
            if self._lease is None:
                self._lead(lease)

    def _lead(self, lease: Lease) -> None:
        log.info("this admin leads, token %d", lease.token)
        self._lease = lease
        context = contextvars.copy_context()
        context.run(FENCE.set, lease.token)
        self._reconciler = self._make()
        self._starting = asyncio.create_task(self._settle(self._reconciler), name="lead", context=context)

    async def _settle(self, reconciler: Reconciler) -> None:
        while True:
            try:
                await reconciler.start()
                return
            except Exception as error:
                log.error("settling: %r; trying again", error)
                await reconciler.close()
                await asyncio.sleep(_TRY)

    async def _step_down(self, why: str) -> None:
        if self._lease is not None:
            log.warning("this admin leads no more: %s", why)
        self._lease = None
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
            self._starting = None
        if self._reconciler is not None:
            await self._reconciler.close()
            self._reconciler = None
