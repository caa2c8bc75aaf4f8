"""The warm pool: sandboxes made ahead for images that were used of late, so that a claim costs nothing.

A member is a whole sandbox with pid 1 connected; only its limits and its name are set at the claim. The pool never
makes anybody wait: when it is empty, the caller makes a sandbox by itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

from rock import errors
from rock.telemetry.metrics import REGISTRY

_IMAGES = 4
_PAUSE_AFTER_FAILURE = 5.0  # seconds
_PAUSE_AFTER_CLAIM = 0.03  # seconds, as long as claims keep coming, but at most so many times:
_MOST_PAUSES = 5

Member = TypeVar("Member")
Key = TypeVar("Key")
log = logging.getLogger(__name__)
CLAIMS = REGISTRY.counter("rock_pool_claims_total", "Sandboxes asked of the warm pool: hit or miss", "outcome")


class Pool(Generic[Key, Member]):
    """`size` members for each of the few keys that were used last. make: prepares one; drop: destroys one."""

    def __init__(self, size: int, make: Callable[[Key], Awaitable[Member]],
                 drop: Callable[[Member], Coroutine[Any, Any, None]], alive: Callable[[Member], bool]) -> None:
        self._size = size
        self._make = make
        self._drop = drop
        self._alive = alive
        self._ready: OrderedDict[Key, deque[Member]] = OrderedDict()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._dropping: set[asyncio.Task[None]] = set()

    def claim(self, key: Key) -> Member | None:
        """A ready member, or None; either way more of this kind are made in the background."""
        if self._size <= 0:
            return None
        ready = self._ready.setdefault(key, deque())
        self._ready.move_to_end(key)
        self._wake.set()
        if self._task is None:
            self._task = asyncio.create_task(self._refill(), name="namespace pool")
        while ready:
            member = ready.popleft()
            if self._alive(member):
                CLAIMS.of("hit").add()
                return member
            task = asyncio.create_task(self._drop(member), name="namespace pool: a dead member")
            self._dropping.add(task)
            task.add_done_callback(self._dropping.discard)
        CLAIMS.of("miss").add()
        return None

    @property
    def ready(self) -> int:
        """How many members are ready."""
        return sum(len(members) for members in self._ready.values())

    async def close(self) -> None:
        """Stop making members and destroy those that are ready."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        members = [member for ready in self._ready.values() for member in ready]
        self._ready.clear()
        await self._discard(members)
        await asyncio.gather(*self._dropping, return_exceptions=True)

    async def _refill(self) -> None:
        while True:
            await self._wake.wait()
            await self._calm()
            while len(self._ready) > _IMAGES:
                _, old = self._ready.popitem(last=False)
                await self._discard(list(old))
            while (key := self._missing()) is not None:
                try:
                    member = await self._make(key)
                except errors.RockError as error:
                    log.warning("the warm pool could not make a sandbox: %s", error)
                    await asyncio.sleep(_PAUSE_AFTER_FAILURE)
                    break
                if key in self._ready:
                    self._ready[key].append(member)
                else:
                    await self._discard([member])

    async def _calm(self) -> None:
        """Let those who just claimed go first: making a sandbox takes a CPU for 10 ms."""
        for _ in range(_MOST_PAUSES):
            self._wake.clear()
            await asyncio.sleep(_PAUSE_AFTER_CLAIM)
            if not self._wake.is_set():
                return

    def _missing(self) -> Key | None:
        for key, ready in reversed(self._ready.items()):
            if len(ready) < self._size:
                return key
        return None

    async def _discard(self, members: list[Member]) -> None:
        for member in members:
            await self._drop(member)
