"""Automatic pauses: the processes of an idle sandbox are stopped, and the next request continues them (decision 59).

The rocklet does both, so a pause costs no request of the admin, and a request to a paused sandbox waits only for the
continuation. The state is in the record of the sandbox before the processes stop; a rocklet that starts again continues
them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from typing import Protocol

from rock import faults
from rock.errors import RockError
from rock.protocol.sandbox import Usage
from rock.runtime.base import Handle, Pauses, Runtime, Swaps
from rock.telemetry.metrics import REGISTRY

log = logging.getLogger("rock.node")
PAUSES = REGISTRY.counter("rock_auto_pauses_total", "Sandboxes that were paused because they were idle")
WAKES = REGISTRY.histogram("rock_auto_pause_wake_seconds", "From a request to a paused sandbox to the continuation")
_RETRY = 30.0  # seconds after a pause that failed


class Pausable(Protocol):
    """What an automatic pause needs of a sandbox. is_idle: no request is in progress, and no environment is open."""

    id: str
    runtime: Runtime
    handle: Handle
    paused: bool

    @property
    def is_idle(self) -> bool: ...

    @property
    def idle_seconds(self) -> float: ...

    def touch(self) -> None: ...

    async def saved(self) -> None: ...


class AutoPause:
    """Pauses one sandbox when it was idle for `seconds`. paused: whether it is paused now."""

    def __init__(self, sandbox: Pausable, seconds: float) -> None:
        self._sandbox = sandbox
        self._seconds = seconds
        self.paused = False
        self._users = 0  # requests that need running processes
        self._lock = asyncio.Lock()
        self._saving: asyncio.Task[None] | None = None
        self._swapped: int | None = None
        self._not_swapped: str | None = None

    @contextlib.asynccontextmanager
    async def awake(self) -> AsyncGenerator[None]:
        """The processes run in this context. Unavailable, Lost."""
        self._users += 1
        try:
            if self.paused:
                await self._wake()
            yield
        finally:
            self._users -= 1

    async def _wake(self) -> None:
        async with self._lock:
            if not self.paused:
                return
            began = time.monotonic()
            runtime = self._sandbox.runtime
            assert isinstance(runtime, Pauses)
            await runtime.resume(self._sandbox.handle)
            self.paused = False
            self._sandbox.touch()
            WAKES.of().observe(time.monotonic() - began)
            await faults.point("sandbox.auto_pause.woken")
            # Without waiting: a rocklet that reads an old record continues the processes, which run already.
            self._saving = asyncio.create_task(self._save(), name=f"auto-pause-{self._sandbox.id}")

    async def _save(self) -> None:
        try:
            await self._sandbox.saved()
        except OSError as error:
            log.warning("the record of sandbox %s: %s", self._sandbox.id, error)

    async def close(self) -> None:
        """Wait for the record."""
        if self._saving is not None:
            await asyncio.gather(self._saving, return_exceptions=True)

    async def run(self) -> None:
        """Pause the sandbox whenever it is idle, until cancelled."""
        while True:
            sandbox = self._sandbox
            left = _RETRY if self.paused or sandbox.paused else self._seconds - sandbox.idle_seconds
            if self.paused:
                left = min(left, self._seconds)
            if left > 0 or self._users or not sandbox.is_idle:
                await asyncio.sleep(max(0.05, min(left, self._seconds)))
                continue
            try:
                await self._pause()
            except RockError as error:
                log.warning("sandbox %s is not paused: %s", sandbox.id, error)
                await asyncio.sleep(_RETRY)

    async def _pause(self) -> None:
        sandbox = self._sandbox
        async with self._lock:
            if self._users or sandbox.paused or not sandbox.is_idle:
                return
            assert isinstance(sandbox.runtime, Pauses)
            self.paused = True
            try:
                await sandbox.saved()
                await faults.point("sandbox.auto_pause.begun")
                await sandbox.runtime.pause(sandbox.handle)
            except BaseException:
                with contextlib.suppress(RockError):
                    await asyncio.shield(sandbox.runtime.resume(sandbox.handle))
                self.paused = False
                raise
            PAUSES.of().add()
        if not self._users and isinstance(sandbox.runtime, Swaps):
            try:
                self._swapped = await sandbox.runtime.swap_out(sandbox.handle)
                self._not_swapped = None
            except RockError as error:
                self._swapped, self._not_swapped = 0, error.message

    def report(self, usage: Usage | None) -> Usage | None:
        """The usage with the state of the pause."""
        if usage is None:
            return None
        paused = self.paused and not self._lock.locked()
        return usage.model_copy(update={
            "auto_paused": paused, "swapped_bytes": self._swapped, "not_swapped": self._not_swapped})  # fmt: skip
