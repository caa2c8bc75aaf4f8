"""Warm pools: sandboxes that are created before they are requested (decision 57).

A claim sets only limits and name. It never waits: when a pool is empty, the caller creates a sandbox. There are two
kinds of pools, by `Kind` of their members:

- recent: a fixed number of members for each of the images that were used last;
- defined: requested by name, of an image or a snapshot. Its size follows the recent demand, between a minimum and a
  maximum. All defined pools together have at most `budget` members.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from rock import errors
from rock.runtime.pools import PoolState
from rock.telemetry.metrics import REGISTRY

_IMAGES = 4
_PAUSE_AFTER_FAILURE = 5.0  # seconds
_PAUSE_AFTER_CLAIM = 0.03  # seconds, extended by each further claim at most so many times:
_MOST_PAUSES = 5
_TICK = 2.0  # seconds between two looks at the sizes of defined pools
_BURST = 5.0  # seconds: claims that arrive within them need members at once
_HALF_LIFE = 60.0  # seconds in which the demand of a burst halves
_MOST_CLAIMS = 2048  # claims of a burst that are counted
RECENT = "recent"  # the label of the pools of recently used images

Member = TypeVar("Member")
Key = TypeVar("Key", bound=Hashable)
log = logging.getLogger(__name__)
CLAIMS = REGISTRY.counter("rock_pool_claims_total", "Sandboxes requested from a warm pool: hit or miss", "outcome",
                          "pool")  # fmt: skip
READY = REGISTRY.gauge("rock_pool_ready", "Unclaimed sandboxes of a defined pool", "pool")
TARGET = REGISTRY.gauge("rock_pool_target", "Size that a defined pool should have", "pool")


class Demand:
    """The recent demand: the largest number of claims in a burst, which decays."""

    def __init__(self) -> None:
        self._claims: deque[float] = deque(maxlen=_MOST_CLAIMS)
        self._level = 0.0
        self._at = 0.0

    def note(self, now: float) -> None:
        """A claim at a monotonic time."""
        self._claims.append(now)
        while self._claims[0] < now - _BURST:
            self._claims.popleft()
        self._level, self._at = max(self.level(now), float(len(self._claims))), now

    def level(self, now: float) -> float:
        """Members that the next burst needs."""
        return self._level * math.exp2((self._at - now) / _HALF_LIFE)


def shares(wanted: Sequence[tuple[int, int]], budget: int) -> list[int]:
    """The sizes of pools within a budget. wanted: minimum and wanted size of each. The minimums come first, in order;
    the rest is divided in proportion to what each wants beyond its minimum."""
    sizes = []
    for minimum, _ in wanted:
        sizes.append(min(minimum, budget))
        budget -= sizes[-1]
    more = [max(0, size - given) for (_, size), given in zip(wanted, sizes, strict=True)]
    total = sum(more)
    if total <= budget:
        return [given + extra for given, extra in zip(sizes, more, strict=True)]
    parts = [extra * budget // total for extra in more]
    for place in sorted(range(len(more)), key=lambda index: parts[index] - more[index])[: budget - sum(parts)]:
        parts[place] += 1
    return [given + part for given, part in zip(sizes, parts, strict=True)]


@dataclass
class _Stock(Generic[Member]):
    """The members of one key. name: of the defined pool, or RECENT. target: the size."""

    name: str = RECENT
    minimum: int = 0
    maximum: int = 0
    target: int = 0
    ready: deque[Member] = field(default_factory=deque)
    demand: Demand = field(default_factory=Demand)
    hits: int = 0
    misses: int = 0
    error: str = ""
    retry_at: float = 0.0

    @property
    def defined(self) -> bool:
        return self.name != RECENT


class Pool(Generic[Key, Member]):
    """`size` members for each of the most recently used keys, and the members of the defined keys. make: prepares one;
    drop: destroys one."""

    def __init__(self, size: int, make: Callable[[Key], Awaitable[Member]],
                 drop: Callable[[Member], Coroutine[Any, Any, None]], alive: Callable[[Member], bool]) -> None:
        self._size = self._usual = size
        self._make = make
        self._drop = drop
        self._alive = alive
        self._stocks: OrderedDict[Key, _Stock[Member]] = OrderedDict()
        self._budget = 0
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._dropping: set[asyncio.Task[None]] = set()

    # ---- claims ----

    def claim(self, key: Key, *, recent: bool = True) -> Member | None:
        """A ready member, or None; triggers a refill in the background. recent: a key without a pool gets one."""
        stock = self._stocks.get(key)
        if stock is None:
            if not recent or self._size <= 0:
                return None
            stock = self._stocks[key] = _Stock()
        self._stocks.move_to_end(key)
        stock.demand.note(time.monotonic())
        self._begin()
        while stock.ready:
            member = stock.ready.popleft()
            if self._alive(member):
                stock.hits += 1
                CLAIMS.of("hit", stock.name).add()
                return member
            self._dispose(member)
        stock.misses += 1
        CLAIMS.of("miss", stock.name).add()
        return None

    def members(self) -> list[Member]:
        """The ready members."""
        return [member for stock in self._stocks.values() for member in stock.ready]

    @property
    def ready(self) -> int:
        """The number of ready members."""
        return len(self.members())

    # ---- sizes ----

    def resize(self, size: int | None) -> None:
        """Change the number of members for each recently used key from now on; None is the first one."""
        self._size = self._usual if size is None else size
        self._fit()
        self._wake.set()

    def define(self, wanted: Mapping[Key, tuple[str, int, int]], budget: int) -> None:
        """Set the defined pools: name, minimum and maximum by key. Pools that are not in `wanted` end."""
        self._budget = budget
        for key, stock in list(self._stocks.items()):
            if stock.defined and key not in wanted:
                for family in (READY, TARGET):
                    family.series.pop((stock.name,), None)
                del self._stocks[key]
                for member in stock.ready:
                    self._dispose(member)
        for key, (name, minimum, maximum) in wanted.items():
            stock = self._stocks.setdefault(key, _Stock())
            if stock.name != name:
                stock.hits = stock.misses = 0
            stock.name, stock.minimum, stock.maximum = name, minimum, maximum
        self._fit()
        if wanted:
            self._begin()

    def states(self) -> dict[str, PoolState]:
        """The defined pools, by name."""
        return {stock.name: PoolState(len(stock.ready), stock.target, stock.hits, stock.misses, stock.error)
                for stock in self._stocks.values() if stock.defined}  # fmt: skip

    def _fit(self) -> None:
        """Compute the sizes anew, and drop what exceeds them."""
        now = time.monotonic()
        defined = [stock for stock in self._stocks.values() if stock.defined]
        defined.sort(key=lambda stock: stock.name)
        wanted = [(one.minimum, max(one.minimum, min(one.maximum, math.ceil(one.demand.level(now) - 0.5))))
                  for one in defined]  # fmt: skip
        for stock, size in zip(defined, shares(wanted, self._budget), strict=True):
            stock.target = size
            TARGET.of(stock.name).set(size)
            READY.of(stock.name).set(len(stock.ready))
        for stock in self._stocks.values():
            if not stock.defined:
                stock.target = max(0, self._size)
            while len(stock.ready) > stock.target:
                self._dispose(stock.ready.pop())

    def _dispose(self, member: Member) -> None:
        """Destroy a member in the background."""
        task = asyncio.create_task(self._drop(member), name="namespace pool: an unused member")
        self._dropping.add(task)
        task.add_done_callback(self._dropping.discard)

    # ---- refill ----

    def _begin(self) -> None:
        self._wake.set()
        if self._task is None:
            self._task = asyncio.create_task(self._refill(), name="namespace pool")

    async def close(self) -> None:
        """Stop the refill and destroy the ready members."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        members = self.members()
        self._stocks.clear()
        for member in members:
            await self._drop(member)
        await asyncio.gather(*self._dropping, return_exceptions=True)

    async def _refill(self) -> None:
        while True:
            defined = any(stock.defined for stock in self._stocks.values())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK if defined else None):
                    await self._wake.wait()
            await self._calm()
            recent = [key for key, stock in self._stocks.items() if not stock.defined]
            for key in recent[: max(0, len(recent) - _IMAGES)]:
                for member in self._stocks.pop(key).ready:
                    self._dispose(member)
            self._fit()
            while (key_ := self._missing()) is not None:
                await self._add(key_)

    async def _calm(self) -> None:
        """Wait for a pause between claims: creating a sandbox takes a CPU for 10 ms."""
        for _ in range(_MOST_PAUSES):
            self._wake.clear()
            await asyncio.sleep(_PAUSE_AFTER_CLAIM)
            if not self._wake.is_set():
                return

    def _missing(self) -> Key | None:
        now = time.monotonic()
        for key, stock in reversed(self._stocks.items()):
            if len(stock.ready) < stock.target and stock.retry_at <= now:
                return key
        return None

    async def _add(self, key: Key) -> None:
        """Make a member of a key; after a failure the key waits for a while."""
        try:
            member = await self._make(key)
        except errors.RockError as error:
            stock = self._stocks.get(key)
            if stock is not None:
                if stock.error != error.message:
                    log.warning("the warm pool %s could not make a sandbox: %s", stock.name, error)
                stock.error, stock.retry_at = error.message, time.monotonic() + _PAUSE_AFTER_FAILURE
                asyncio.get_running_loop().call_later(_PAUSE_AFTER_FAILURE, self._wake.set)
            return
        stock = self._stocks.get(key)
        if stock is None or len(stock.ready) >= stock.target:
            self._dispose(member)
        else:
            stock.error = ""
            stock.ready.append(member)
            if stock.defined:
                READY.of(stock.name).set(len(stock.ready))
