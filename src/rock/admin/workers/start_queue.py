"""Start queue: FIFO by request, round-robin across tenants, with a limit on young starts.

    single starts      a queue for each tenant ─┐  one of each queue in turn, while
    starts of groups   a queue for each tenant ─┴► fewer than `most` young ones are in progress ─► begun

Thousands of starts that begin at the same time all end late, and delay a start beside them. A start that is no longer
young waits for a long operation, such as a pull of an image. It is not counted, so it does not delay others further.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable

_MOST = 1000  # young starts in progress,
_EACH = 10  # or so many for each worker, where that is more
_YOUNG = 10.0  # seconds for which a start is young. With a shorter time, all would begin at once where all are slow
_PATIENT = 10.0  # maximum seconds for which the records of a group are delayed
_TOGETHER = 0.05  # starts that begin within so many seconds age together

_Line = tuple[str, bool]  # tenant, and whether it is of groups


class _Age:
    """Starts that began at nearly the same time."""

    __slots__ = ("at", "left")

    def __init__(self, at: float) -> None:
        self.at = at
        self.left = 0


class Ticket:
    """A start's place in the queue. turn: None where it may begin at once; else its result is True when it may begin,
    False when it is canceled."""

    __slots__ = ("age", "turn")

    def __init__(self) -> None:
        self.turn: asyncio.Future[bool] | None = None
        self.age: _Age | None = None


class _Entry:
    """The admission of a tenant's groups."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0


class StartQueue:
    """Call `ask` for each start, and `leave` when it is over; `close` at the end. workers: current number of workers;
    young: seconds."""

    def __init__(self, workers: Callable[[], int], young: float = _YOUNG) -> None:
        self._workers = workers
        self._young_for = young
        self._lines: OrderedDict[_Line, deque[Ticket]] = OrderedDict()
        self._ages: deque[_Age] = deque()  # the young starts, the oldest first
        self._under_way = 0  # number of young starts
        self._timer: asyncio.TimerHandle | None = None
        self._entries: dict[str, _Entry] = {}
        self._emptied: dict[str, asyncio.Future[None]] = {}  # by tenants whose next group waits for it

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def waiting(self) -> int:
        """Number of starts in all queues."""
        return sum(map(len, self._lines.values()))

    def ask(self, tenant: str, grouped: bool) -> Ticket:
        """A ticket for a start, at the end of its queue if it has to wait."""
        ticket, loop = Ticket(), asyncio.get_running_loop()
        if not self._lines and self._has_room(loop.time()):
            self._let_in(ticket, loop.time())
            return ticket
        ticket.turn = loop.create_future()
        self._lines.setdefault((tenant, grouped), deque()).append(ticket)
        self._arm(loop)
        return ticket

    @staticmethod
    def withdraw(ticket: Ticket) -> None:
        """Cancel a start that has not begun."""
        if ticket.turn is not None and not ticket.turn.done():
            ticket.turn.set_result(False)

    def leave(self, ticket: Ticket) -> None:
        """A start is over, or was canceled in its queue."""
        self.withdraw(ticket)
        age, ticket.age = ticket.age, None
        if age is None:
            return
        age.left -= 1
        if age.at >= 0:
            self._under_way -= 1
            if self._lines:
                self._next()

    @contextlib.asynccontextmanager
    async def group(self, tenant: str, wait: float) -> AsyncGenerator[None]:
        """The records of one group of a tenant at a time are stored, when the starts of earlier groups have begun.
        wait: seconds that its client waits; after these, and after _PATIENT, the records are stored in any case."""
        entry, held = self._entries.setdefault(tenant, _Entry()), False
        entry.users += 1
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(wait, _PATIENT)):
                    held = await entry.lock.acquire()
                    await self._begun(tenant)
            yield
        finally:
            if held:
                entry.lock.release()
            entry.users -= 1
            if not entry.users:
                del self._entries[tenant]

    async def _begun(self, tenant: str) -> None:
        """Wait until no start of the tenant's groups is queued. One caller at a time."""
        if (tenant, True) not in self._lines:
            return
        empty = self._emptied[tenant] = asyncio.get_running_loop().create_future()
        try:
            await empty
        finally:
            del self._emptied[tenant]

    # ---- order ----

    def _has_room(self, now: float) -> bool:
        while self._ages and now - self._ages[0].at > self._young_for:
            old = self._ages.popleft()
            self._under_way -= old.left
            old.at = -1.0
        return self._under_way < _MOST or self._under_way < _EACH * self._workers()

    def _let_in(self, ticket: Ticket, now: float) -> None:
        if not self._ages or now - self._ages[-1].at > _TOGETHER:
            self._ages.append(_Age(now))
        ticket.age = self._ages[-1]
        ticket.age.left += 1
        self._under_way += 1

    def _next(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._lines and self._has_room(now):
            key, line = self._lines.popitem(last=False)
            ticket = line.popleft()
            if line:
                self._lines[key] = line
            elif key[1] and (empty := self._emptied.get(key[0])) is not None and not empty.done():
                empty.set_result(None)
            assert ticket.turn is not None
            if not ticket.turn.done():
                self._let_in(ticket, now)
                ticket.turn.set_result(True)
        self._arm(loop)

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        """Schedule the next check of the queues for the time when the starts in progress are no longer young."""
        if self._lines and self._timer is None:
            self._timer = loop.call_later(self._young_for / 4, self._look)

    def _look(self) -> None:
        self._timer = None
        self._next()
